"""Full fine-tuning under every head: search on a part of the training set, then seeds on the validation images.

    python benchmarks/accuracy/study.py --weights FILE --data NAME=DIR ... [--processes N] [--minutes M] [--output FILE]

Every method has the same number of trials, at the same points of a Sobol sequence mapped onto its own ranges
(learning rate, factor for the prototypes, their weight decay, label smoothing, start from class means, scale, margin).
The setting that does best on a quarter of the training images trains on all of them with each seed. Resumable: what
the output holds already is not run again. --minutes stops in time; run the command again to go on.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from queue import Empty
from typing import Any

import timm
import torch
from features import CACHE, named_folders
from finetune import SETTINGS, Run, stored_size
from heads import METHODS, place
from images import load_images
from scipy.stats import qmc
from torch import multiprocessing

LOSS_RANGES = {"lr": (0.4, 3.0, "log"), "lr_mu": (1.0, 10.0, "log"), "decay_mu": (0.0, 0.1, "linear")}


def trials(setting: str, method: str, count: int) -> list[dict[str, Any]]:
    """The first ``count`` points of one Sobol sequence, as configurations of a method."""
    ranges = LOSS_RANGES | METHODS[method][1]
    pretrained = SETTINGS[setting][2] == "pretrained"
    configs = []
    for point in qmc.Sobol(8, seed=0).random_base2(4)[:count]:
        value = {name: place(u, range_) for u, (name, range_) in zip(point, ranges.items(), strict=False)}
        means = pretrained and (method.startswith("faim_indicatrix") or point[6] < 0.5)
        configs.append(
            {
                "setting": setting,
                "method": method,
                "lr": value.pop("lr") * SETTINGS[setting][5],
                "lr_mu": value.pop("lr_mu"),
                "decay_mu": value.pop("decay_mu"),
                "smoothing": 0.1 if point[7] < 0.5 else 0.0,
                "start": "means" if means else "random",
                "options": value,
            }
        )
    return configs


def key(config: dict[str, Any]) -> str:
    """What makes a run the same run."""
    names = ("setting", "method", "seed", "selection", "lr", "lr_mu", "decay_mu", "smoothing", "start", "options")
    return json.dumps([config[name] for name in names])


def best(records: list[dict[str, Any]], setting: str, method: str, count: int) -> dict[str, Any] | None:
    """The trial of a method that did best on the selection part; None before all its trials are there."""
    own = [r for r in records if r["selection"] and r["setting"] == setting and r["method"] == method]
    if len(own) < count:
        return None
    chosen = max(own, key=lambda r: r["top1"])
    return {name: chosen[name] for name in trials(setting, method, 1)[0]}


def worker(gpu: int, queue: Any, lock: Any, args: argparse.Namespace, deadline: float) -> None:
    """Runs from the queue, two at a time on a GPU."""
    device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.set_num_threads(1)
    images, active = {}, []
    while time.time() < deadline:
        while len(active) < (2 if device.type == "cuda" else 1):
            try:
                config = queue.get(timeout=0.5)
            except Empty:
                break
            name = config["setting"]
            if name not in images:
                images[name] = load_images(args.data[SETTINGS[name][0]], stored_size(name), args.cache)
            active.append(Run(config, images[name], args.weights, device))
        if not active:
            return
        for run in list(active):
            if not run.advance():
                record = run.finish() | {
                    "data_hash": images[run.config["setting"]].data_hash,
                    "torch": torch.__version__,
                    "timm": timm.__version__,
                    "python": platform.python_version(),
                    "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
                }
                with lock, args.output.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                active.remove(run)


def run_all(configs: list[dict[str, Any]], args: argparse.Namespace, deadline: float) -> None:
    """All configurations that the output lacks, over all GPUs."""
    done = {key(r) for r in read(args.output)}
    configs = [c for c in configs if key(c) not in done]
    print(f"{len(configs)} runs to do, {len(done)} done", flush=True)
    context = multiprocessing.get_context("spawn")
    queue, lock = context.Queue(), context.Lock()
    for config in configs:
        queue.put(config)
    gpus = max(1, torch.cuda.device_count())
    count = min(len(configs), args.processes * gpus)
    workers = [context.Process(target=worker, args=(i % gpus, queue, lock, args, deadline)) for i in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()


def read(path: Path) -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="tf_efficientnet_lite0 as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--settings", nargs="+", help="some of the settings (default: all whose data are given)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="on each GPU")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "finetune.jsonl")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    args.data = named_folders(args.data)
    settings = [s for s in args.settings or SETTINGS if SETTINGS[s][0] in args.data]
    for setting in settings:
        load_images(args.data[SETTINGS[setting][0]], stored_size(setting), args.cache)
    pairs = [(s, m) for s in settings for m in args.methods]
    search = [c | {"seed": 0, "selection": True} for s, m in pairs for c in trials(s, m, args.trials)]
    run_all(search, args, deadline)
    records = read(args.output)
    chosen = {pair: best(records, *pair, args.trials) for pair in pairs}
    finals = [c | {"seed": seed, "selection": False} for seed in range(args.seeds) for c in chosen.values() if c]
    run_all(finals, args, deadline)


if __name__ == "__main__":
    main()
