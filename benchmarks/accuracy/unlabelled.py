"""Unlabelled images: heads in closed form that follow them, and peers that are given the same images.

    python benchmarks/accuracy/unlabelled.py --weights FILE --data NAME=DIR ...

Heads are fitted to 1, 3, 5 and all images of each class, three cuts each (one of all). "Same images": all validation
images are given without labels, and are what is measured; or those of a fifth of the classes. "Other images": a half is
given, the rest measured. Temperature and threshold are from training images that are held out; where each class has
one image they are 1 and none, and for other images from a quarter of the validation images. The guard is that of
`timm-faim fit`, and decides by training images that are held out, or by a quarter of the validation images, which are
then neither given nor measured. Images of another data set stand for folders of something else. Frozen
tf_efficientnet_lite0, whole images squashed to 160 px; the mean, and the mean with second moments (of photographs,
without the peers that optimise). Lines that the output has are not computed again.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from features import CACHE, cut, named_folders
from frozen import Log
from maps import Frozen, Recipe, View, fitted_moments, second_moments
from settings import LITE0
from tables import show
from torch import Tensor
from unknown_scores import Parts, fitted_head, joined
from unlabelled_peers import PEERS, SLOW, cosines, hub_corrected
from unlabelled_tables import report

from timm_faim import FAIMHead
from timm_faim.adapt import Check, adapt_, evidence
from timm_faim.calibration import fit_temperature, known_score, lookalike_folds, threshold

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

KINDS = {"mean": ("mean",), "moments": ("mean", "moments")}
SHOTS = (1, 3, 5, None)
DRAWINGS = ("omniglot242",)
FOREIGN = 500  # images of another data set


class Case:
    """A fitted head, its temperature and threshold from held-out training images, and how to move it.

    ``pool`` [U, D] has all images that may be given, by their numbers.
    """

    def __init__(self, x: Tensor, y: Tensor, widths: list[int], classes: int, pool: Tensor) -> None:
        self.y, self.classes, self.pool = y, classes, pool
        self.head = fitted_head(x, widths, y, classes)
        self.z, self.points = embed(self.head, x), embed(self.head, pool)
        self.T, self.least, self.held = 1.0, -torch.inf, None
        fold, self.folds = lookalike_folds(self.z, y), []
        for k in fold[fold >= 0].unique():
            held = fold == k
            head = fitted_head(x[~held], widths, y[~held], classes)
            self.folds.append((head, embed(head, x[~held]), y[~held], x[held], embed(head, pool)))
        if self.folds:
            self.held = torch.cat([head(held) for head, _, _, held, _ in self.folds])
            self.targets = torch.cat([y[fold == k] for k in fold[fold >= 0].unique()])
            self.calibrate(self.held, self.targets)

    def calibrate(self, logits: Tensor, y: Tensor) -> None:
        """Temperature, and the least score of what is known, from held-out images."""
        self.T = fit_temperature(logits, y, doubt=1.0)
        self.least = threshold(known_score(logits / self.T), 0.05)

    def follow(self, given: Tensor, **options) -> tuple[FAIMHead, int]:
        """The head after unlabelled images of these numbers, and how many it used."""
        return self._follow(self.head, self.z, self.y, self.points[given], **options)

    def _follow(self, head: FAIMHead, z: Tensor, y: Tensor, points: Tensor, **options) -> tuple[FAIMHead, int]:
        head = copy.deepcopy(head)
        options = {"temperature": self.T, "least": self.least} | options
        return head, adapt_(head, evidence(head, z, y), points, **options)

    def check(self, given: Tensor) -> Check | None:
        """By training images that are held out; None where none can be."""
        if self.held is None:
            return None
        moved = [(self._follow(head, z, y, points[given])[0], held) for head, z, y, held, points in self.folds]
        return Check.of(self.held, torch.cat([head(held) for head, held in moved]), self.targets)


def embed(head: FAIMHead, x: Tensor) -> Tensor:
    return torch.cat([head.embed(each) for each in x.split(1024)])


def right(scores: Tensor, y: Tensor) -> float:
    """Top-1 in per cent."""
    return 100.0 * (scores.argmax(1) == y).double().mean().item()


def summary(check: Check | None) -> list[float] | None:
    return None if check is None else [check.before, check.after, check.error]


def same_images(case: Case, y: Tensor, slow: bool) -> dict[str, float]:
    """Top-1 on the images that are given, which are the first of the pool."""
    given = torch.arange(len(y))
    head, z = case.head, case.points[given]
    counts = torch.bincount(y, minlength=case.classes).float().clamp_min(0.5)
    trained = torch.bincount(case.y, minlength=case.classes).float()
    moved, _ = case.follow(given)
    found = {"without": cosines(head, z), "EM": cosines(moved, z)}
    found["EM of all, known or not"] = cosines(case.follow(given, least=-torch.inf)[0], z)
    found["hub"], found["EM and hub"] = hub_corrected(head, z), hub_corrected(moved, z)
    found["EM, training proportions"] = cosines(case.follow(given, proportions=trained)[0], z)
    found["EM, true proportions"] = cosines(case.follow(given, proportions=counts)[0], z)
    found |= {name: peer(case, z) for name, peer in (PEERS | (SLOW if slow else {})).items()}
    return {name: right(scores, y) for name, scores in found.items()}


def other_images(case: Case, y: Tensor, seed: int) -> dict[str, dict]:
    """By folder that is given: top-1 without and with it on images that are not given, and the checks."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    given, judge, test = order.split([len(y) // 2, len(y) // 4, len(y) - len(y) // 2 - len(y) // 4])
    few = torch.randperm(case.classes, generator=torch.Generator().manual_seed(seed))[: case.classes // 5]
    foreign = torch.arange(len(y), len(case.pool))
    folders = {
        "half": given,
        "a fifth of the classes": given[torch.isin(y[given], few)],
        "something else": foreign,
        "half and something else": torch.cat([given, foreign]),
    }
    found, of_judge = {}, case.head(case.pool[judge])
    if case.held is None:
        case.calibrate(of_judge, y[judge])
    for name, folder in folders.items():
        moved, used = case.follow(folder)
        blind, _ = case.follow(folder, least=-torch.inf)
        found[name] = {
            "without": right(cosines(case.head, case.points[test]), y[test]),
            "with": right(cosines(moved, case.points[test]), y[test]),
            "all": right(cosines(blind, case.points[test]), y[test]),
            "used": used / len(folder),
            "check": summary(case.check(folder)),
            "validation": summary(Check.of(of_judge, moved(case.pool[judge]), y[judge])),
        }
    return found


def few_classes(frozen: Frozen, kept: Tensor, seed: int) -> dict[str, float]:
    """Top-1 on given images of a fifth of the classes; the mean alone."""
    (train, val), y = frozen.of(View(), "mean"), frozen.train_N[kept]
    classes = int(y.max()) + 1
    few = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[: classes // 5]
    given = torch.isin(frozen.val_N, few)
    case = Case(train[kept], y, [train.shape[1]], classes, val[given])
    return same_images(case, frozen.val_N[given], slow=True)


def parts_of(frozen: Frozen, other: Frozen, kept: Tensor) -> tuple[Parts, Parts, Parts]:
    """Parts of the kept training images, the validation images, and of images of another data set."""
    maps, means = (
        (f.of(View(), Recipe().stage) for f in (frozen, other)),
        (f.of(View(), "mean") for f in (frozen, other)),
    )
    (train, val), (_, foreign) = maps
    (train_mean, val_mean), (_, foreign_mean) = means
    moments = fitted_moments([train[kept]], Recipe())
    pairs = ((train_mean[kept], train[kept]), (val_mean, val), (foreign_mean[:FOREIGN], foreign[:FOREIGN]))
    return tuple({"mean": mean, "moments": second_moments(moments, each)} for mean, each in pairs)


@torch.no_grad()
def run(log: Log, data: dict[str, Frozen], cuts: int) -> None:
    for number, (name, frozen) in enumerate(data.items()):
        other = list(data.values())[(number + 1) % len(data)]
        for shots in SHOTS:
            for seed in range(cuts if shots else 1):
                kept, began = cut(frozen.train_N, shots, seed), time.time()
                config = {"data": name, "shots": shots or "all", "features": "mean", "given": "a fifth of the classes"}
                if not log.find(config, seed):
                    log.add(config, seed, same=few_classes(frozen, kept, seed))
                kinds = KINDS if name not in DRAWINGS else ("mean",)
                configs = {kind: {"data": name, "shots": shots or "all", "features": kind} for kind in kinds}
                if all(log.find(config, seed) for config in configs.values()):
                    continue
                seen, val, foreign = parts_of(frozen, other, kept)
                y, y_val = frozen.train_N[kept], frozen.val_N
                for kind in kinds:
                    names = KINDS[kind]
                    if log.find(configs[kind], seed):
                        continue
                    pool = torch.cat([joined(val, names), joined(foreign, names)])
                    case = Case(joined(seen, names), y, [seen[n].shape[1] for n in names], int(y.max()) + 1, pool)
                    same, check = same_images(case, y_val, kind == "mean"), case.check(torch.arange(len(y_val)))
                    log.add(configs[kind], seed, same=same, other=other_images(case, y_val, seed), check=summary(check))
                    print(f"{configs[kind]} {seed}: {time.time() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for features")
    parser.add_argument("--cuts", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "unlabelled.jsonl")
    args = parser.parse_args()
    log = Log(args.output)
    run(log, {n: Frozen(f, args.weights, LITE0, args.cache) for n, f in named_folders(args.data).items()}, args.cuts)
    command = "python benchmarks/accuracy/unlabelled.py --weights FILE --data NAME=DIR ..."
    title, *lines = report(log.rows)
    show([title, "", headline(command, cuda=False), *lines], args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
