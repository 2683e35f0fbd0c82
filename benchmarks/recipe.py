"""Time to choose a head in closed form on cached features: folds, all candidates, and the fit of the chosen one.

    python benchmarks/recipe.py [--images 10000] [--classes 200] [--output FILE]

Random features of the widths that tf_efficientnet_lite0 gives: the mean of the last map alone, and with the second
moments of three stages. Median of three.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from machine import headline

from timm_faim import FAIMHead, fit_
from timm_faim.recipe import HeldOut, choose

WIDTHS = {"mean (1,280)": [1280], "mean and moments of 3 stages (11,903)": [1280, 6441, 861, 3321]}


def once(parts: list[torch.Tensor], y: torch.Tensor, classes: int) -> tuple[float, float]:
    """Seconds to choose and to fit."""
    began = time.perf_counter()
    usual = (0, 1) if len(parts) > 1 else (0,)
    plan = choose(HeldOut(parts, y, classes, 256).fold(usual=usual)).plan
    chosen = time.perf_counter()
    x = torch.cat([parts[i] for i in plan.parts], 1)
    several = {"parts": [parts[i].shape[1] for i in plan.parts], "part_weights": plan.part_weights}
    head = FAIMHead(x.shape[1], classes, **several if len(plan.parts) > 1 else {}).to(x.device)
    fit_(head, list(zip(x.split(4096), y.split(4096), strict=True)), plan.shrinkage, share=plan.share)
    if x.is_cuda:
        torch.cuda.synchronize()
    return chosen - began, time.perf_counter() - chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["# Choosing a head in closed form", "", headline("python benchmarks/recipe.py", device.type == "cuda"), "",
             f"{args.images:,} images of {args.classes} classes; seconds, median of {args.repeats}.", "",
             "| features | choose | fit | together |", "|---|---:|---:|---:|"]  # fmt: skip
    for name, widths in WIDTHS.items():
        generator = torch.Generator().manual_seed(0)
        y = (torch.arange(args.images) % args.classes).to(device)
        parts = []
        for width in widths:
            means = torch.randn(args.classes, width, generator=generator)
            x = means[y.cpu()] + 3.0 * torch.randn(args.images, width, generator=generator)
            parts.append((x * torch.linspace(0.1, 3.0, width)).to(device))
        times = [once(parts, y, args.classes) for _ in range(args.repeats)]
        choose_s, fit_s = (statistics.median(column) for column in zip(*times, strict=True))
        lines.append(f"| {name} | {choose_s:.1f} | {fit_s:.1f} | {statistics.median(map(sum, times)):.1f} |")
    page = "\n".join(lines) + "\n"
    print(page)
    if args.output:
        args.output.write_text(page)


if __name__ == "__main__":
    main()
