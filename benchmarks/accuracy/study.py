"""Full fine-tuning under every head: search on a part of the training set, then seeds on the validation images.

    python benchmarks/accuracy/study.py --weights NAME=FILE ... --data NAME=DIR ... [--processes N] [--minutes M]

Each method runs on the mean of the last map and on mean and second moments together, trained jointly; a linear layer
also on iSQRT-COV. Every method has the same number of trials on either features, at the same points of a Sobol sequence
mapped onto its own ranges (learning rate, factor for the prototypes, their weight decay, label smoothing, start from
class means, scale, margin). The trial with the best mean of its top-1 as trained and refitted, on a quarter of the
training images, trains on all of them with each seed. Resumable: what the output holds already is not run again.
After --minutes no run begins any more, and those in progress end; run the command again to go on.
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
from finetune import Run
from heads import METHODS, place
from images import load_images
from parts import FEATURES
from refits import default_refit
from scipy.stats import qmc
from settings import ABLATIONS, SETTINGS
from torch import multiprocessing

LOSS_RANGES = {"lr": (0.4, 3.0, "log"), "lr_mu": (1.0, 10.0, "log"), "decay_mu": (0.0, 0.1, "linear")}
STUDIED = ("linear", "cosine", "cosface", "arcface", "isomax_plus", "faim_indicatrix")
ALL = SETTINGS | ABLATIONS


def trials(setting: str, method: str, features: str, count: int) -> list[dict[str, Any]]:
    """The first ``count`` points of one Sobol sequence, as configurations of a method."""
    ranges = LOSS_RANGES | METHODS[method][1]
    configs = []
    for point in qmc.Sobol(8, seed=0).random_base2(4)[:count]:
        value = {name: place(u, range_) for u, (name, range_) in zip(point, ranges.items(), strict=False)}
        means = point[6] < 0.5 or (method.startswith("faim_indicatrix") and ALL[setting].pretrained)
        configs.append(
            {
                "setting": setting,
                "method": method,
                "features": features,
                "lr": value.pop("lr") * ALL[setting].rate,
                "lr_mu": value.pop("lr_mu"),
                "decay_mu": value.pop("decay_mu"),
                "smoothing": 0.1 if point[7] < 0.5 else 0.0,
                "start": "means" if means and features != "covariance" else "random",
                "options": value,
            }
        )
    return configs


NAMES = tuple(trials("leaf99", "linear", "mean", 1)[0])


def key(config: dict[str, Any]) -> str:
    """What makes a run the same run."""
    return json.dumps([config[name] for name in (*NAMES, "seed", "selection")])


def score(record: dict[str, Any]) -> float:
    """Of a trial: the mean of what is measured as trained and after FAIM's fixed refit, for every method alike."""
    parts = ["mean", "moments"] if record["features"] == "moments" else [record["features"]]
    return 0.5 * (record["top1"]["trained"] + record["top1"][default_refit("FAIM", parts)])


def best(records: list[dict[str, Any]], setting: str, method: str, features: str, count: int) -> dict[str, Any] | None:
    """The trial that did best for a setting, where need be on the one it takes its choice from; None before all its
    trials are there."""
    own = {"setting": ALL[setting].chosen_on or setting, "method": method, "features": features, "selection": True}
    wanted = {key(c | {"seed": 0, "selection": True}) for c in trials(own["setting"], method, features, count)}
    found = [r for r in records if own.items() <= r.items() and key(r) in wanted]
    if len(found) < count:
        return None
    chosen = max(found, key=score)
    return {name: chosen[name] for name in NAMES} | {"setting": setting}


def worker(gpu: int, queue: Any, lock: Any, args: argparse.Namespace, deadline: float, kind: type[Run]) -> None:
    """Runs from the queue, one after the other; none begins after the deadline."""
    device = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.set_num_threads(1)
    images = {}
    while time.time() < deadline:
        try:
            config = queue.get(timeout=0.5)
        except Empty:
            return
        setting = ALL[config["setting"]]
        stored = setting.data, setting.stored
        if stored not in images:
            images[stored] = load_images(
                args.data[setting.data], setting.stored, args.cache, getattr(args, "centre", False)
            )
        run = kind(config, images[stored], args.weights, device)
        while run.advance():
            pass
        record = run.finish() | {
            "data_hash": images[stored].data_hash,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        }
        with lock, args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")


def run_all(configs: list[dict[str, Any]], args: argparse.Namespace, deadline: float, kind: type[Run] = Run) -> None:
    """All configurations that the output lacks, over all GPUs, in their order; each is a run of this kind."""
    done = {key(r) for r in read(args.output)}
    configs = [c for c in configs if key(c) not in done]
    print(f"{len(configs)} runs to do, {len(done)} done", flush=True)
    if time.time() >= deadline:
        return
    context = multiprocessing.get_context("spawn")
    queue, lock = context.Queue(), context.Lock()
    for config in configs:
        queue.put(config)
    gpus = max(1, torch.cuda.device_count())
    count = min(len(configs), args.processes * gpus)
    shared = queue, lock, args, deadline, kind
    workers = [context.Process(target=worker, args=(i % gpus, *shared)) for i in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()


def read(path: Path) -> list[dict[str, Any]]:
    """The records so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--settings", nargs="+", choices=list(ALL), help="default: all of the study that are given")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(STUDIED))
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="on each GPU")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "moments.jsonl")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    args.data, args.weights = named_folders(args.data), named_folders(args.weights)
    given = [s for s, each in SETTINGS.items() if each.data in args.data]
    settings = args.settings or [s for s in given if not SETTINGS[s].pretrained or SETTINGS[s].backbone in args.weights]
    for data, size in {(ALL[s].data, ALL[s].stored) for s in settings}:
        load_images(args.data[data], size, args.cache)
    arms = [(m, f) for m in args.methods for f in args.features if f != "covariance" or m == "linear"]
    choosing = dict.fromkeys(ALL[s].chosen_on or s for s in settings)
    run_all(
        [
            c | {"seed": 0, "selection": True}
            for s in choosing
            for method, features in arms
            for c in trials(s, method, features, args.trials)
        ],
        args,
        deadline,
    )
    records = read(args.output)
    chosen = [best(records, s, method, features, args.trials) for s in settings for method, features in arms]
    finals = [c | {"seed": seed, "selection": False} for seed in range(args.seeds) for c in chosen if c]
    run_all(finals, args, deadline)


if __name__ == "__main__":
    main()
