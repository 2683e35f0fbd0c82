"""What probabilities of heads in closed form are worth, and how to set them without a validation set.

    python benchmarks/accuracy/calibration.py --weights FILE --data NAME=DIR ...

Heads are fitted in closed form to 2, 5 and all images of each class. T comes from training images, each under a head
that is fitted without its fold: of random images, or of a class's look-alikes together; from leaving each image out of
its prototype alone; from 2 and 5 random folds extrapolated to no image left out (log T linear in 1/K); and, to
compare, from the validation images themselves, T of one half for the other. "doubt 1" adds an image of doubt.
Thresholds and sets of classes come from the same held-out training images, or from a half of the validation images for
the other half. All is measured on validation images. Frozen tf_efficientnet_lite0, whole images squashed to 160 px;
lines that the output has are not computed again.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from calibration_tables import report
from features import CACHE, cut, named_folders
from frozen import Log
from maps import Frozen, Recipe, parts_of
from measures import measures
from settings import LITE0
from tables import show
from torch import Tensor
from torch.nn.functional import cross_entropy
from unknown_scores import Parts, cross_folds, fitted_head, held_out_logits, joined

from timm_faim import FAIMHead
from timm_faim.calibration import (
    COVERAGES,
    RATES,
    cross_fitted_logits,
    fit_temperature,
    known_score,
    lookalike_folds,
    prediction_sets,
    set_threshold,
    threshold,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

KINDS = {"mean": ("mean",), "moments": ("mean", "moments")}
SHOTS = (2, 5, None)
FOLDS, LOOKALIKES = (2, 5, 10), (5, 10)
PLAIN, CHOSEN = "5 random folds", "5 folds of look-alikes"
RAPS_WEIGHT, RAPS_FREE = 0.1, 2  # λ and k_reg (Angelopoulos et al. 2021, arXiv:2009.14193)


@torch.no_grad()
def leave_one_out(head: FAIMHead, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of training images whose own prototype is fitted without them; centre and Σ are those of all."""
    counts = torch.bincount(y, minlength=head.num_classes)
    sums = torch.zeros(head.num_classes, x.shape[1], dtype=torch.float64).index_add_(0, y, x.double())
    rows = (counts[y] > 1).nonzero().flatten()
    x, y = x[rows], y[rows]
    points = head.project(head.embed(((sums[y] - x.double()) / (counts[y] - 1)[:, None]).to(x)))
    cosine = (head.embed(x) * points).sum(1)
    logits = head(x)
    logits[torch.arange(len(y)), y] = -head.gamma() * (2.0 - 2.0 * cosine + head.metric.eps).clamp_min(0.0).sqrt()
    return logits, y


def halves(y: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Two stratified halves of validation images, each once to choose on and once to measure on."""
    return list(cross_folds(y, 2, seed))


def judged(logits: Tensor, y: Tensor) -> dict[str, float]:
    """ECE in % and cross entropy."""
    return {"ece": 100.0 * measures(logits, y)["ece"], "nll": cross_entropy(logits, y).item()}


def cumulated(p: Tensor, weight: float) -> Tensor:
    """[N, C] of APS (Romano et al. 2020, arXiv:2006.02544), not randomised: the probability of all classes down to
    each; with a weight RAPS."""
    order = p.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(1, p.shape[1] + 1).expand_as(order)
    values = p.gather(1, order).cumsum(1) + weight * (place - RAPS_FREE).clamp_min(0)
    return torch.empty_like(values).scatter_(1, order, values)


def sets_by(kind: str, p: Tensor, y: Tensor, test: Tensor, coverage: float) -> Tensor:
    """Sets [B, C] of test images, calibrated on probabilities p [N, C] of classes y."""
    if kind == "LAC":
        return prediction_sets(test, set_threshold(p, y, coverage))
    weight = RAPS_WEIGHT if kind == "RAPS" else 0.0
    values = cumulated(p.double(), weight).gather(1, y[:, None])[:, 0].sort().values
    k = math.ceil((len(y) + 1) * coverage - 1e-9)
    sets = cumulated(test.double(), weight) <= (values[k - 1] if k <= len(y) else math.inf)
    return sets.scatter_(1, test.argmax(1, keepdim=True), True)


def covered(sets: Tensor, y: Tensor) -> list[float]:
    """Coverage in % and mean size."""
    return [100.0 * sets.gather(1, y[:, None]).double().mean().item(), sets.sum(1).double().mean().item()]


def rejected_share(held: Tensor, test: Tensor, rate: float) -> float:
    """Images rejected in %, of test logits by the threshold of held-out ones."""
    return 100.0 * (known_score(test) < threshold(known_score(held), rate)).double().mean().item()


@torch.no_grad()
def run(seen: Parts, test: Parts, names: tuple[str, ...], y: Tensor, val_y: Tensor, seed: int) -> dict:
    """All measures of one head."""
    C, widths = int(y.max()) + 1, [seen[name].shape[1] for name in names]
    x = joined(seen, names)
    head = fitted_head(x, widths, y, C)
    val = head(joined(test, names))
    points = head.embed(x)
    held = {f"{K} random folds": held_out_logits(x, widths, y, C, K, seed) for K in FOLDS}
    for K in LOOKALIKES:
        held[f"{K} folds of look-alikes"] = cross_fitted_logits(head, x, y, lookalike_folds(points, y, K))
    T = {name: fit_temperature(*each) for name, each in held.items()}
    T[f"{PLAIN}, doubt 1"] = fit_temperature(*held[PLAIN], doubt=1.0)
    T[f"{CHOSEN}, doubt 1"] = fit_temperature(*held[CHOSEN], doubt=1.0)
    T["left out of its prototype"] = fit_temperature(*leave_one_out(head, x, y))
    two, five = (math.log(T[f"{K} random folds"]) for K in (2, 5))
    T["2 and 5 random folds, extrapolated"] = math.exp(five + (five - two) * 0.2 / 0.3)
    found = {"T = 1": {"T": 1.0, **judged(val, val_y)}}
    found |= {name: {"T": each, **judged(val / each, val_y)} for name, each in T.items()}
    parts = halves(val_y, seed)
    oracle = [fit_temperature(val[a], val_y[a]) for a, _ in parts]
    rest = torch.cat([val[b] / each for (_, b), each in zip(parts, oracle, strict=True)])
    found["half of the validation images"] = {
        "T": mean(oracle),
        **judged(rest, torch.cat([val_y[b] for _, b in parts])),
    }
    found["all validation images"] = {"T": fit_temperature(val, val_y)}
    sources = {name: (held[name][0] / T[name], held[name][1], val / T[name]) for name in (PLAIN, CHOSEN)}
    pairs = list(zip(parts, oracle, strict=True))
    rejected, sets = {}, {}
    for rate in RATES:
        here = [rejected_share(own, test, rate) for own, _, test in sources.values()]
        rejected[f"{rate:g}"] = [*here, mean(rejected_share(val[a] / t, val[b] / t, rate) for (a, b), t in pairs)]
    for kind in ("LAC", "APS", "RAPS"):
        for coverage in COVERAGES:
            here = [
                covered(sets_by(kind, own.softmax(1), own_y, test.softmax(1), coverage), val_y)
                for own, own_y, test in sources.values()
            ]
            there = [
                covered(sets_by(kind, (val[a] / t).softmax(1), val_y[a], (val[b] / t).softmax(1), coverage), val_y[b])
                for (a, b), t in pairs
            ]
            sets[f"{kind} {coverage:g}"] = [*here, [mean(v) for v in zip(*there, strict=True)]]
    return {
        "top1": 100.0 * measures(val, val_y)["top1"],
        "held_out_top1": [100.0 * measures(*held[name])["top1"] for name in (PLAIN, CHOSEN)],
        "temperatures": found,
        "rejected": rejected,
        "sets": sets,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cuts", type=int, default=2, help="of images, folds and halves")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "calibration.jsonl")
    args = parser.parse_args()
    log = Log(args.output)
    for data, folder in named_folders(args.data).items():
        frozen = Frozen(folder, args.weights, LITE0, args.cache)
        for shots in SHOTS:
            for seed in range(args.cuts if shots else 1):
                configs = {kind: {"data": data, "features": kind, "shots": shots or "all"} for kind in KINDS}
                if all(log.find(config, seed) for config in configs.values()):
                    continue
                began, kept = time.time(), cut(frozen.train_N, shots, seed)
                seen, (test,) = parts_of(frozen, kept, Recipe())
                for kind, names in KINDS.items():
                    got = run(seen, test, names, frozen.train_N[kept], frozen.val_N, seed)
                    log.add(configs[kind], seed, **got, data_hash=frozen.data_hash)
                print(f"{data}, {shots or 'all'} images, cut {seed}: {time.time() - began:.1f} s", flush=True)
    command = "python benchmarks/accuracy/calibration.py --weights FILE --data leaf99=DIR grocery81=DIR omniglot242=DIR"
    show(["# Calibration of heads in closed form", "", headline(command, cuda=False), "",
          *report(list(log.done.values()))], args.output.with_suffix(".md"))  # fmt: skip


if __name__ == "__main__":
    main()
