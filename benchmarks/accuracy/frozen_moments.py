"""Mean and second moments of frozen features under classifiers in closed form; no training.

    python benchmarks/accuracy/frozen_moments.py --weights NAME=FILE ... --data NAME=DIR ... [--flip] [--ablation]

Cuts of 1, 3, 5 images a class and all images. Each classifier is fitted to the mean and to the moments; scores are
blended with weight w of the moments, fixed or chosen by 3-fold cross-validation on the training images, as is RanPAC's
ridge (one image a class: what the first cut of 3 chose). Whole images squashed to 160 px; with --flip mirrored images
count as further training images, and scores of an image and its mirror are added. --ablation changes one thing at a
time instead. Lines that the output has are not computed again; nothing is chosen on validation images.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from closed_form import folds
from features import CACHE, cut, named_folders
from frozen import VERSIONS
from maps import Frozen, Recipe, View, parts_of
from refits import DEFAULT_WEIGHT, KINDS, RANK, WEIGHTS, PartFit
from settings import STAGES
from torch import Tensor

RANPAC = "RanPAC"
LIFT, RIDGES = 10_000, tuple(10.0**k for k in range(-4, 3))  # ridges in units of the lifted features' mean square
DEFAULT_RIDGE = 0.1
Parts = dict[str, Tensor]


class RanPAC:
    """Ridge regression on relu(x W), W random (McDonnell et al. 2023, arXiv:2307.02251); one ridge after another.

    Solved in the space of the images, of which there are fewer than random features.
    """

    def __init__(self, x: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.W = torch.randn(x.shape[1], LIFT, generator=generator)
        self.seen = (x @ self.W).relu_()
        self.unit = self.seen.square().mean().sqrt()
        self.seen /= self.unit * LIFT**0.5

    def lift(self, x: Tensor) -> Tensor:
        return (x @ self.W).relu_() / (self.unit * LIFT**0.5)

    def scores(self, seen: Tensor, y: Tensor, classes: int, test: list[Tensor]) -> dict[float, list[Tensor]]:
        """Of lifted features, by ridge."""
        e, V = torch.linalg.eigh((seen @ seen.t()).double())
        one_hot = torch.nn.functional.one_hot(y, classes).double()
        kernels = [(each @ seen.t()).double() @ V for each in test]
        return {r: [(k @ ((V.t() @ one_hot) / (e + r)[:, None])).float() for k in kernels] for r in RIDGES}


def closed_forms(seen: Parts, y: Tensor, classes: int, tests: list[Parts]) -> dict[str, dict[str, Tensor]]:
    """kind -> part -> scores of the test images, added over views."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for part, x in seen.items():
        fit = PartFit(x, y, classes)
        for kind in KINDS:
            found[kind][part] = torch.stack([fit.scores(kind, test[part]) for test in tests]).sum(0)
    return found


def accuracy(scores: Tensor, y: Tensor) -> float:
    return 100.0 * (scores.argmax(1) == y).double().mean().item()


def blend(parts: dict[str, Tensor], w: float) -> Tensor:
    return (1.0 - w) * parts["mean"] + w * parts["moments"]


def best_weight(parts: dict[str, Tensor], y: Tensor) -> float:
    return max(WEIGHTS, key=lambda w: (accuracy(blend(parts, w), y), -abs(w - DEFAULT_WEIGHT)))


def run(frozen: Frozen, kept: Tensor, recipe: Recipe, seed: int, before: dict | None) -> dict:
    """Top-1 by name, and the choices; ``before`` has those to take where nothing can be chosen."""
    seen, tests = parts_of(frozen, kept, recipe)
    y, views, classes = frozen.train_N[kept], len(recipe.views), int(frozen.train_N.max()) + 1
    lifts = {part: RanPAC(x) for part, x in seen.items()}
    held: dict[str, dict[str, list[Tensor]]] = {}
    ridged: dict[tuple[str, float], list[Tensor]] = {}
    held_y = []
    for train, test in folds(y, seed):
        rows = torch.cat([train + v * len(y) for v in range(views)])
        found = closed_forms({p: x[rows] for p, x in seen.items()}, y[train].repeat(views), classes,
                             [{p: x[test] for p, x in seen.items()}])  # fmt: skip
        for kind, parts in found.items():
            for part, scores in parts.items():
                held.setdefault(kind, {}).setdefault(part, []).append(scores)
        for part, lift in lifts.items():
            found_ridges = lift.scores(lift.seen[rows], y[train].repeat(views), classes, [lift.seen[test]])
            for ridge, (scores,) in found_ridges.items():
                ridged.setdefault((part, ridge), []).append(scores)
        held_y.append(y[test])
    if held_y:
        y_held = torch.cat(held_y)
        joined = {kind: {part: torch.cat(each) for part, each in parts.items()} for kind, parts in held.items()}
        ridges = {part: max(RIDGES, key=lambda r: accuracy(torch.cat(ridged[part, r]), y_held)) for part in seen}
        joined[RANPAC] = {part: torch.cat(ridged[part, ridges[part]]) for part in seen}
        weights = {kind: best_weight(parts, y_held) for kind, parts in joined.items()}
    elif before:
        ridges, weights = before["ridges"], before["weights"]
    else:
        ridges, weights = dict.fromkeys(seen, DEFAULT_RIDGE), dict.fromkeys((*KINDS, RANPAC), DEFAULT_WEIGHT)
    final = closed_forms(seen, y.repeat(views), classes, tests)
    final[RANPAC] = {}
    for part, lift in lifts.items():
        lifted = [lift.lift(test[part]) for test in tests]
        got = lift.scores(lift.seen, y.repeat(views), classes, lifted)[ridges[part]]
        final[RANPAC][part] = torch.stack(got).sum(0)
    top1 = {}
    for kind, parts in final.items():
        top1 |= {f"{kind} {part}": accuracy(scores, frozen.val_N) for part, scores in parts.items()}
        top1 |= {f"{kind} {w}": accuracy(blend(parts, w), frozen.val_N) for w in WEIGHTS}
        top1[f"{kind} cv"] = accuracy(blend(parts, weights[kind]), frozen.val_N)
    return {"top1": top1, "weights": weights, "ridges": ridges}


def ablations(backbone: str) -> Iterator[tuple[str, str, Recipe, int | None]]:
    """Factor, its value, the recipe and the rank of Σ of the moments (None: of all images); one at a time."""
    base = Recipe(stage=STAGES[backbone])
    plain, mirrored, larger = View(), View(flip=True), View(side=224)
    for stage in ("blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6"):
        yield "stage", stage, base.but(stage=stage), RANK
    for d in (32, 64, 112):
        yield "components d", str(d), base.but(components=d), RANK
    for steps in (0, 3, 5, 6, 10):
        yield "steps of the root", str(steps) if steps else "no root", base.but(steps=steps), RANK
    for rank in (0, 64, 128, RANK, None):
        yield "rank of Σ", "all" if rank is None else str(rank) if rank else "Σ = I", base, rank
    for name, views in {
        "clean": (plain,),
        "and mirrored": (plain, mirrored),
        "and 1.4 times the side": (plain, larger),
        "1.4 times the side alone": (larger,),
        "and both": (plain, mirrored, larger),
    }.items():
        yield "views", name, base.but(views=views), RANK


def ablate(frozen: Frozen, kept: Tensor, recipe: Recipe, rank: int | None) -> dict[str, float]:
    """Top-1 of FAIM on the moments alone and with the mean."""
    seen, tests = parts_of(frozen, kept, recipe)
    y, classes = frozen.train_N[kept].repeat(len(recipe.views)), int(frozen.train_N.max()) + 1
    found = {}
    for part, x in seen.items():
        wanted = RANK if part == "mean" or rank is None else rank
        fit = PartFit(x, y, classes, None if part == "mean" else min(len(x), x.shape[1]) if rank is None else rank or 1)
        kind = "FAIM" if wanted else "Σ = I"
        found[part] = torch.stack([fit.scores(kind, test[part]) for test in tests]).sum(0)
    y = frozen.val_N
    return {
        "moments": accuracy(found["moments"], y),
        f"blend {DEFAULT_WEIGHT}": accuracy(blend(found, DEFAULT_WEIGHT), y),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--flip", action="store_true", help="mirrored images too")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "frozen_moments.jsonl")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {json.dumps(line["config"], sort_keys=True): line for line in lines}

    def log(config: dict, compute) -> dict:
        name = json.dumps(config, sort_keys=True)
        if name not in done:
            began = time.time()
            done[name] = {"config": config, **compute(), "versions": VERSIONS}
            with args.output.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(f"{name}: {time.time() - began:.1f} s", flush=True)
        return done[name]

    for backbone, weights in named_folders(args.weights).items():
        for data, folder in named_folders(args.data).items():
            steps = list(ablations(backbone)) if args.ablation else []
            frozen = Frozen(folder, weights, backbone, args.cache)
            stages = Frozen(folder, weights, backbone, args.cache, tuple({r.stage: 0 for _, _, r, _ in steps}))
            recipe = Recipe((View(), View(flip=True)) if args.flip else (View(),), STAGES[backbone])
            for shots in (3, 5, None, 1):
                for seed in range(args.cuts if shots else 1):
                    kept = cut(frozen.train_N, shots, seed)
                    common = {"backbone": backbone, "data": data, "shots": shots or "all", "seed": seed}
                    if not args.ablation:
                        config = common | {"views": "mirrored" if args.flip else "clean"}
                        before = done.get(json.dumps(config | {"shots": 3, "seed": 0}, sort_keys=True))
                        log(config, lambda k=kept, s=seed, b=before: run(frozen, k, recipe, s, b))  # noqa: B023
                        continue
                    if shots not in (3, None) or seed:
                        continue
                    for factor, value, changed, rank in steps:
                        source = stages if factor == "stage" else frozen
                        log(
                            common | {"factor": factor, "value": value},
                            lambda f=source, k=kept, c=changed, r=rank: {"top1": ablate(f, k, c, r)},
                        )


if __name__ == "__main__":
    main()
