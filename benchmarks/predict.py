"""Images a second of `timm-faim predict` against the backbone alone, over the same files and over batches in memory.

    python benchmarks/predict.py [--model faim_resnet50] [--device cuda] [--size 224] [--images 512]

Files are JPEGs of noise, written to a temporary folder; weights are random. Both sides take timm's loader, and the
backbone has no classifier. Rounds alternate.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from accelerate import PartialState
from machine import headline
from PIL import Image
from timm.data import resolve_data_config

from timm_faim.calibration import calibrate
from timm_faim.classifier.classifier import Classifier
from timm_faim.classifier.predict import rows_of
from timm_faim.images.files import images_of
from timm_faim.images.loaders import clean_loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="faim_resnet50")
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--amp", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.classes).eval().to(device)
    backbone = timm.create_model(args.model, num_classes=0).eval().to(device)
    config = resolve_data_config({"input_size": (3, args.size, args.size)}, model=model)
    record = {"calibration": calibrate(torch.randn(500, args.classes), torch.arange(500) % args.classes,
                                       "validation").to_json()}  # fmt: skip
    classifier = Classifier(model, [str(k) for k in range(args.classes)], config, record, device, args.amp)
    judge, state = classifier.judge(), PartialState(cpu=device.type == "cpu")

    def run(forward: Callable, batches: list) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            for batch in batches:
                forward(batch[0] if isinstance(batch, (tuple, list)) else batch)

    memory = [torch.randn(args.batch_size, 3, args.size, args.size, device=device) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        paths = _write_images(Path(folder), args.images)
        read = clean_loader(images_of(paths, "RGB"), config, device, args.batch_size, args.workers)
        sides = {
            "files": (
                lambda: run(backbone, read),
                lambda: [None for _ in rows_of(paths, classifier, judge, None, args.batch_size, args.workers, state)],
                len(paths),
            ),
            "batches in memory": (
                lambda: run(backbone, memory),
                lambda: run(lambda batch: judge(classifier.logits(batch)), memory),
                4 * args.batch_size,
            ),
        }
        command = f"python benchmarks/predict.py --model {args.model} --device {args.device} --size {args.size} "
        command += (
            f"--images {args.images} --batch-size {args.batch_size} --workers {args.workers}{' --amp' * args.amp}"
        )
        print(f"{headline(command, device.type == 'cuda')}\n")
        print(f"{args.model}, {args.classes} classes; medians of {args.rounds} rounds.\n")
        print("| images from | backbone, images/s | predict, images/s | ratio |\n|---|---:|---:|---:|")
        for name, (bare, predict, count) in sides.items():
            times: tuple[list[float], list[float]] = ([], [])
            for each in range(args.rounds + 1):
                for kept, side in zip(times, (bare, predict), strict=True):
                    started = time.perf_counter()
                    side()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if each:  # the first round warms up
                        kept.append(time.perf_counter() - started)
            a, b = (count / statistics.median(kept) for kept in times)
            print(f"| {name} | {a:.1f} | {b:.1f} | {b / a:.3f} |", flush=True)


def _write_images(folder: Path, count: int) -> list[str]:
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        pixels = random.integers(0, 255, (30, 40, 3), np.uint8)
        paths.append(str(folder / f"{i:05d}.jpg"))
        Image.fromarray(pixels).resize((400, 300)).save(paths[-1], quality=85)
    return paths


if __name__ == "__main__":
    main()
