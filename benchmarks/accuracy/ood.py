"""Images of classes never trained on: AUROC of a score on frozen features, half of the classes known.

    python benchmarks/accuracy/ood.py --weights FILE --data NAME=DIR ... [--output FILE]

A seed draws the known half. Heads are fitted or trained on the training images of those (centre crop and augmented
views), settings chosen as in ``frozen.py`` on a quarter of them, for seed 0's half; accuracy chooses, no unknown class
is seen. The score of each validation image then has to tell known from unknown: maximal softmax (Hendrycks & Gimpel
2017, arXiv:1610.02136), energy (Liu et al. 2020, arXiv:2010.03759), distance to the nearest prototype (for Mahalanobis
distances Lee et al. 2018, arXiv:1807.03888; for IsoMax+ Macêdo et al. 2021), distance to the 5th nearest training image
of the same features normalised (Sun et al. 2022, arXiv:2204.06507).
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
import trained
from features import FrozenFeatures, data_arguments, frozen_features, named_folders
from frozen import VERSIONS, Log, choose, images_with_views, selection_split
from sklearn.metrics import roc_auc_score
from tables import interval
from torch import Tensor
from torch.nn import functional as F

from timm_faim import PRESETS, FAIMHead

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

TRAINED = ("logistic", "linear", "cosine", "arcface", "isomax_plus", "faim_indicatrix", "faim_indicatrix_eye")
PEERS = (
    "logistic, softmax",
    "logistic, energy",
    "linear, softmax",
    "linear, energy",
    "cosine, softmax",
    "cosine, nearest",
    "arcface, softmax",
    "arcface, nearest",
    "isomax_plus, softmax",
    "isomax_plus, nearest",
    "k nearest images",
)


def scores(name: str, logits: Tensor) -> dict[str, Tensor]:
    """Scores [N] by name, larger for known classes."""
    found = {f"{name}, softmax": logits.softmax(1).amax(1)}
    if name in ("logistic", "linear"):
        found[f"{name}, energy"] = logits.logsumexp(1)
    else:
        found[f"{name}, nearest"] = logits.amax(1)  # monotone in the distance or angle to the nearest prototype
    return found


def run(name: str, data: FrozenFeatures, seed: int, settings: dict[str, dict], args: argparse.Namespace) -> dict:
    """Score name -> (AUROC, top-1 on known classes), both as fractions."""
    classes = int(data.train_N.max()) + 1
    known = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))[: classes // 2].sort().values
    index = torch.isin(data.train_N, known).nonzero().flatten()
    labels = torch.searchsorted(known, data.train_N[index])
    features = images_with_views(data, True)[:, index]
    if not settings:
        kept, held = selection_split(labels, seed)
        part = trained.TrainingSet.of(features[:, kept], labels[kept], len(known))
        for method in TRAINED:
            splits = part, data.train_ND[index[held]], labels[held]
            settings[method] = choose(method, splits, args.trials, args.steps)[0]
    whole = trained.TrainingSet.of(features, labels, len(known))
    is_known = torch.isin(data.val_N, known)
    target = torch.searchsorted(known, data.val_N[is_known])
    results = {}

    def add(head_name: str, logits: Tensor) -> None:
        top1 = (logits[is_known].argmax(1) == target).double().mean().item()
        for score, value in scores(head_name, logits).items():
            results[score] = roc_auc_score(is_known.numpy(), value.numpy()), top1

    with torch.no_grad():
        x = whole.transform("linear", data.val_ND)
        for head_name, head in (("faim closed form", whole.full), ("faim closed form, Σ = I", whole.eye)):
            add(head_name, head.eval()(x))
        plain = FAIMHead(x.shape[1], len(known), **PRESETS["flat"] | {"lambda_init": 0.0, "full_sigma": True})
        plain.metric.L.copy_(whole.full.whiten)
        plain.mu.copy_(torch.zeros_like(plain.mu).index_add_(0, whole.y, whole.x) / whole.y.bincount()[:, None])
        add("faim closed form, not normalised", plain.eval()(x))
        similarity = F.normalize(x, dim=1) @ F.normalize(whole.x, dim=1).t()
        top = similarity.topk(5, dim=1)
        nearest = (whole.y[top.indices[:, 0]][is_known] == target).double().mean().item()
        results["k nearest images"] = roc_auc_score(is_known.numpy(), top.values[:, -1].numpy()), nearest
    for method in TRAINED:
        head = trained.train(method, whole, settings[method], seed, args.steps)
        with torch.no_grad():
            add(method, head(whole.transform(method, data.val_ND)))
    return results


def report(rows: list[dict]) -> list[str]:
    """Means over seeds, and FAIM against the best peer."""
    values: dict[str, dict] = defaultdict(dict)
    top1: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        values[row["config"]["score"]][row["config"]["data"], row["seed"]] = 100.0 * row["auroc"]
        top1[row["config"]["score"]].append(100.0 * row["top1"])
    sets = sorted({data for each in values.values() for data, _ in each})
    means = {score: statistics.mean(each.values()) for score, each in values.items()}
    lines = [
        "| score | " + " | ".join(sets) + " | mean AUROC | top-1 on known classes |",
        "|---" + "|---:" * (len(sets) + 2) + "|",
    ]
    for score in sorted(means, key=lambda score: -means[score]):
        cells = [f"{statistics.mean(v for (d, _), v in values[score].items() if d == data):.1f}" for data in sets]
        lines.append(f"| {score} | {' | '.join(cells)} | {means[score]:.2f} | {statistics.mean(top1[score]):.1f} |")
    best = max(PEERS, key=lambda score: means[score])
    lines += ["", f"Best peer after the fact: {best}. Differences in points of AUROC, 95 % t-interval over pairs:", ""]
    for score in (s for s in means if s.startswith("faim") and s.endswith("nearest")):
        lines.append(f"- {score}: {interval([values[score][key] - values[best][key] for key in values[score]])}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ood.jsonl")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    log = Log(args.output)
    for name, folder in named_folders(args.data).items():
        data = frozen_features(name, folder, args.weights, args.cache, args.views)
        settings: dict[str, dict] = {}
        for seed in range(args.seeds):
            if log.find({"data": name, "score": "k nearest images"}, seed):
                continue
            if seed and not settings:  # chosen on seed 0's half, also where the run goes on here
                run(name, data, 0, settings, args)
            for score, (auroc, top1) in run(name, data, seed, settings, args).items():
                log.add({"data": name, "score": score}, seed, auroc=auroc, top1=top1, data_hash=data.data_hash)
            print(f"{name}, seed {seed} done", flush=True)
    rows = [json.loads(line) for line in args.output.read_text().splitlines()]
    command = "python benchmarks/accuracy/ood.py --weights FILE --data NAME=DIR …"
    page = "\n".join(
        [
            "# Classes never trained on",
            "",
            headline(command, cuda=False),
            f"timm_faim {VERSIONS['timm_faim']}, scikit-learn {VERSIONS['scikit-learn']}",
            "",
            *report(rows),
        ]
    )
    print(page)
    args.output.with_suffix(".md").write_text(page + "\n")


if __name__ == "__main__":
    main()
