"""Time of a fit beyond the backbone: features to head, and a whole second fit from the cache.

    python benchmarks/fit.py [--device cuda]

Features are random: class means plus noise. "Head" is what follows from them in closed form; "second fit" is head, γ,
thresholds, evaluation and the saved run, with 2,000 validation images, without the report and without starting Python.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import timm
import torch
from machine import headline
from safetensors.torch import save_file

from timm_faim import faim_heads
from timm_faim.calibration import apply_temperature_, calibrate
from timm_faim.classifier.neighbours import Gallery
from timm_faim.fitting.heads import fit_head, logits_of, points_of
from timm_faim.fitting.store import Features
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.tables import write_evaluation
from timm_faim.run.weights import save_config, save_weights

CASES = (("mean", "faim_resnet18", False), ("mean", "faim_tf_efficientnet_lite0", False),
         ("mean", "faim_resnet50", False), ("mean + moments", "faim_tf_efficientnet_lite0", True))  # fmt: skip


def write_store(folder: Path, images: dict[str, int], D: int, C: int) -> Path:
    """A store of random features, as `timm_faim.fitting.extract` writes them."""
    folder.mkdir()
    random, meta = np.random.default_rng(0), {}
    means = random.standard_normal((C, D), np.float32)
    for split, count in images.items():
        target = np.arange(count) % C
        rows = means[target] + 2.0 * random.standard_normal((count, D), np.float32)
        rows.tofile(folder / f"{split}-0.f32")
        np.stack([np.arange(count), target], 1).astype(np.int64).tofile(folder / f"{split}-0.i64")
        meta[split] = {"counts": [count], "width": D}
    (folder / "store.json").write_text(json.dumps(meta))
    save_file({}, folder / "state.safetensors")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"{headline(f'python benchmarks/fit.py --device {args.device}', device.type == 'cuda')}\n")
    print(f"{args.images} training images of {args.classes} classes; medians of {args.rounds} rounds.\n")
    print("| features | D | head, s | features/s | second fit, s |\n|---|---:|---:|---:|---:|")
    for name, arch, moments in CASES:
        model = timm.create_model(arch, num_classes=args.classes, faim_cfg={"moments": moments}).eval().to(device)
        (head,) = faim_heads(model).values()
        with tempfile.TemporaryDirectory() as folder:
            images = {"train": args.images, "val": 2000}
            store = write_store(Path(folder, "store"), images, head.in_features, args.classes)
            heads, whole = [], []
            for number in range(args.rounds + 1):
                started = time.perf_counter()
                features = {split: Features(store, split) for split in images}
                fit_head(head, features["train"], 0.3)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                heads.append(time.perf_counter() - started)
                _save(model, head, features, Path(folder, str(number)))
                whole.append(time.perf_counter() - started)
        head_s, fit_s = (statistics.median(times[1:]) for times in (heads, whole))
        print(f"| {name} | {head.in_features} | {head_s:.2f} | {args.images / head_s:,.0f} | {fit_s:.2f} |", flush=True)


def _save(model: torch.nn.Module, head: torch.nn.Module, features: dict[str, Features], folder: Path) -> None:
    """What `timm-faim fit` does after the head, without the report."""
    folder.mkdir()
    points = points_of(head, features["train"])
    logits, target = logits_of(head, features["val"]), torch.from_numpy(features["val"].target)
    calibration = calibrate(logits, target, "validation")
    apply_temperature_(model, calibration.temperature)
    evaluation = Evaluation.of(logits / calibration.temperature, target)
    names = [str(k) for k in range(head.num_classes)]
    config = timm.data.resolve_data_config({}, model=model)
    save_config(model, folder / "config.json", config, names, False, names, {"calibration": calibration.to_json()})
    save_weights(model.state_dict(), folder, is_best=True)
    Gallery(points, [str(i) for i in range(len(points))]).save(folder)
    with redirect_stdout(io.StringIO()):
        write_evaluation(folder / "eval", evaluation, names)


if __name__ == "__main__":
    main()
