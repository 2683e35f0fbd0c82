"""Heads in closed form chosen by the data, against peers that are chosen alike; frozen features, no training.

    python benchmarks/accuracy/recipe.py --weights FILE --data NAME=DIR ... [--cuts 3]

Features are the mean of the last map and the second moments of three stages of tf_efficientnet_lite0 on whole images
squashed to 160 px. Cuts of 1, 2, 3, 5 images a class and all images. Every method gets the same parts: which, their
weight and its own numbers are chosen by the same folds of the training images (look-alikes together, and at random), by
accuracy by class; with one image a class there are none, and each has its default. Nothing is chosen on validation
images but what is called perfect. Lines that the output has are not computed again; ``recipe_tables.py`` makes tables.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from features import CACHE, cut, named_folders
from maps import Frozen, View, fitted_moments, second_moments
from maps import Recipe as Features
from peers import PEERS, Part
from settings import LITE0
from torch import Tensor

from timm_faim import FAIMHead, fit_
from timm_faim.recipe import HeldOut, Plan, choose
from timm_faim.recipe.choose import SHARES, WEIGHTS
from timm_faim.recipe.plan import SINGLE_WEIGHT

STAGES = ("blocks.4", "blocks.2", "blocks.3")  # the usual one first
RANK = 256
Parts = list[Tensor]


@torch.no_grad()
def parts_of(frozen: Frozen, kept: Tensor, device: torch.device) -> tuple[Parts, Parts]:
    """Parts [N, D] of the kept training images and of the validation images."""
    seen, test = frozen.of(View(), "mean")
    parts = [seen[kept].float().to(device)], [test.float().to(device)]
    for stage in STAGES:
        seen, test = (each.to(device) for each in frozen.of(View(), stage))
        moments = fitted_moments([seen[kept.to(device)].cpu()], Features(stage=stage)).to(device)
        parts[0].append(second_moments(moments, seen[kept.to(device)]))
        parts[1].append(second_moments(moments, test))
    return parts


def accuracy(scores: Tensor, y: Tensor) -> float:
    return 100.0 * (scores.argmax(1) == y).double().mean().item()


def by_class(right: Tensor, y: Tensor) -> float:
    counts = torch.bincount(y)
    return (torch.bincount(y, right.double()) / counts.clamp_min(1))[counts > 0].mean().item()


@torch.no_grad()
def faim_scores(plan: Plan, seen: Parts, y: Tensor, test: Parts) -> Tensor:
    """Logits of a head that is fitted by a plan."""
    x, v = (torch.cat([each[i] for i in plan.parts], 1) for each in (seen, test))
    several = {"parts": [seen[i].shape[1] for i in plan.parts], "part_weights": plan.part_weights, "rank": RANK}
    head = FAIMHead(x.shape[1], int(y.max()) + 1, **several if len(plan.parts) > 1 else {}).to(x.device)
    return fit_(head, [(x, y)], plan.shrinkage, share=plan.share).eval()(v)


def faim(seen: Parts, y: Tensor, test: Parts, vy: Tensor) -> dict[str, Any]:
    """Top-1 of the fixed head, of the chosen one, and of what is chosen without one of the choices."""
    began = time.perf_counter()
    held = HeldOut(seen, y, int(y.max()) + 1, RANK).fold(usual=(0, 1))
    chosen = choose(held)
    seconds = time.perf_counter() - began
    plans = {
        "FAIM": Plan((0, 1)),
        "FAIM on the mean": Plan((0,)),
        "auto": chosen.plan,
        "auto without sharing": choose(held, share=0.0).plan,
        "auto, one stage": choose(held, [(0, 1)]).plan,
        "auto, weight 0.75": choose(held, weight=0.75).plan,
        "auto and shrinkage": with_shrinkage(held, chosen.plan),
        "auto, weight alone": choose(held, [(0, 1)], share=0.0).plan,
        "auto, sharing alone": choose(held, [(0, 1)], weight=0.75).plan,
        "auto, stages alone": choose(held, share=0.0, weight=0.75).plan,
    }
    done: dict[Plan, float] = {}
    for plan in plans.values():
        if plan not in done:
            done[plan] = accuracy(faim_scores(plan, seen, y, test), vy)
    return {
        "top1": {name: done[plan] for name, plan in plans.items()},
        "plan": chosen.plan.to_json(),
        "score": chosen.score,
        "seconds": round(seconds, 2),
        "perfect": perfect(seen, y, test, vy) if held else None,
    }


def with_shrinkage(held: HeldOut, plan: Plan) -> Plan:
    """The plan with the best of some shrinkages."""
    plans = [plan, *(replace(plan, shrinkage=other) for other in (0.1, 0.5))]
    return max(plans, key=lambda each: held.scores([each])[0]) if held else plan


def perfect(seen: Parts, y: Tensor, test: Parts, vy: Tensor) -> float:
    """The best top-1 on the validation images of all plans that auto chooses among."""
    n, classes = len(y), int(y.max()) + 1
    fold = torch.cat([torch.full((n,), -1, device=y.device), torch.zeros_like(vy)])  # what it holds out is not seen
    parts = [torch.cat(pair) for pair in zip(seen, test, strict=True)]
    both = HeldOut(parts, torch.cat([y, vy]), classes, RANK, [fold])
    subsets = [(0,), *((0, i) for i in (1, 2, 3)), (0, 1, 2), (0, 1, 3)]
    plans = [Plan(p, w, 0.3, s) for p in subsets for w in (WEIGHTS if len(p) > 1 else WEIGHTS[:1]) for s in SHARES]
    return 100.0 * max(both.scores(plans))


def peer(
    make: Callable[[Part, Any], Tensor], grid: list[Any], seen: Parts, y: Tensor, test: Parts, vy: Tensor, held: HeldOut
) -> dict[str, Any]:
    """A peer's top-1: its number, parts and weight chosen as FAIM's are, and the best of them after the fact."""
    classes, subsets = (
        int(y.max()) + 1,
        [(0,), *((0, *e) for k in (1, 2) for e in combinations(range(1, len(seen)), k))],
    )
    choices = [
        (value, parts, w) for value in grid for parts in subsets for w in (WEIGHTS if len(parts) > 1 else (0.0,))
    ]

    def all_scores(x: Parts, labels: Tensor, v: Parts) -> dict[Any, list[Tensor]]:
        fits = [Part(a, labels, b, classes) for a, b in zip(x, v, strict=True)]
        return {value: [make(fit, value) for fit in fits] for value in grid}

    def blend(scores: dict[Any, list[Tensor]], choice: tuple) -> Tensor:
        value, parts, w = choice
        others = sum(scores[value][i] for i in parts[1:]) if len(parts) > 1 else 0.0
        return (1.0 - w) * scores[value][0] + w / max(1, len(parts) - 1) * others

    right = torch.zeros(len(choices), len(held.kinds), len(y), dtype=torch.bool, device=y.device)
    for number, fold in enumerate(held.kinds):
        for k in fold[fold >= 0].unique().tolist():
            out = fold == k
            scores = all_scores([x[~out] for x in seen], y[~out], [x[out] for x in seen])
            for i, choice in enumerate(choices):
                right[i, number, out] = blend(scores, choice).argmax(1) == y[out]
    ever = held.kinds[0] >= 0
    final = all_scores(seen, y, test)
    if ever.any():
        values = [sum(by_class(each[ever], y[ever]) for each in kinds) for kinds in right]
        best = max(range(len(choices)), key=values.__getitem__)
    else:
        default = (grid[len(grid) // 2], (0, 1), SINGLE_WEIGHT)
        best = choices.index(default)
    tops = [accuracy(blend(final, choice), vy) for choice in choices]
    return {"top1": tops[best], "perfect": max(tops), "choice": list(choices[best])}


def peers(seen: Parts, y: Tensor, test: Parts, vy: Tensor) -> dict[str, Any]:
    held = HeldOut(seen[:2], y, int(y.max()) + 1, RANK).fold(usual=(0, 1))
    return {name: peer(make, grid, seen, y, test, vy, held) for name, (make, grid) in PEERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--faim-again", action="store_true", help="of lines that are there compute FAIM's part again")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "recipe.jsonl")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {json.dumps(line["config"], sort_keys=True): line for line in lines}
    if args.faim_again:
        args.output.unlink()
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": torch.__version__}
    for data, folder in named_folders(args.data).items():
        frozen = Frozen(folder, args.weights, LITE0, args.cache, STAGES)
        for shots in (1, 2, 3, 5, None):
            for seed in range(args.cuts if shots else 1):
                config = {"data": data, "shots": shots or "all", "seed": seed}
                before = done.get(json.dumps(config, sort_keys=True))
                if before and not args.faim_again:
                    continue
                began, kept = time.time(), cut(frozen.train_N, shots, seed)
                seen, test = parts_of(frozen, kept, device)
                y, vy = frozen.train_N[kept].to(device), frozen.val_N.to(device)
                with args.output.open("a") as file:
                    found = faim(seen, y, test, vy)
                    found["peers"] = before["peers"] if before else peers(seen, y, test, vy)
                    where = machine | ({"device": f"{machine['device']}, peers {before['device']}"} if before else {})
                    file.write(json.dumps({"config": config, **found, **where}) + "\n")
                print(f"{config}: {time.time() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
