"""Images of unknown classes: which score of a head in closed form tells them from known ones.

    python benchmarks/accuracy/unknown.py --weights NAME=FILE ... --data NAME=DIR ... [--far NAME=DIR]

A third of the classes, drawn by the seed, is unknown. The head is fitted in closed form to all training images of the
others, on the mean of the last map ("mean") or on mean and second moments ("moments"). Scores of the validation images
of known classes are set against those of unknown classes, and of another data set ("far"): area under the ROC curve,
and the share of unknown images that is accepted where 95 % of the known ones are ("FPR95"). T and all parameters are
those that do best on known training images, with a third of the known classes taken as unknown in turn; no validation
image and no unknown class chooses anything. Whole images squashed to 160 px; lines that the output has are not computed
again.
"""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import torch
from features import CACHE, named_folders
from frozen import VERSIONS, Log
from maps import Frozen, Recipe, fitted_moments, second_moments
from settings import STAGES
from sklearn.metrics import roc_auc_score
from tables import interval, show
from torch import Tensor
from unknown_scores import Known, Parts, all_scores, by_name, chosen_parameters, temperature

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

KINDS = {"mean": ("mean",), "moments": ("mean", "moments")}
CHOSEN = "nearest prototype = max logit"


def auroc(known: Tensor, unknown: Tensor) -> float:
    """In %."""
    truth = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))])
    return 100.0 * float(roc_auc_score(truth.numpy(), torch.cat([known, unknown]).double().numpy()))


def fpr95(known: Tensor, unknown: Tensor) -> float:
    """Unknown images accepted where 95 % of the known ones are, in %."""
    threshold = known.double().sort().values[int(0.05 * len(known))]
    return 100.0 * (unknown.double() >= threshold).double().mean().item()


@torch.no_grad()
def features(frozen: Frozen, far: Frozen | None, kept: Tensor, recipe: Recipe) -> tuple[Parts, Parts, Parts]:
    """Of the kept training images, of all validation images, and of those of the other data set."""
    (view,), stage = recipe.views, recipe.stage
    maps, mean = frozen.of(view, stage), frozen.of(view, "mean")
    moments = fitted_moments([maps[0][kept]], recipe)
    seen = {"mean": mean[0][kept], "moments": second_moments(moments, maps[0][kept])}
    test = {"mean": mean[1], "moments": second_moments(moments, maps[1])}
    if far is None:
        return seen, test, {}
    return seen, test, {"mean": far.of(view, "mean")[1], "moments": second_moments(moments, far.of(view, stage)[1])}


def run(frozen: Frozen, far: Frozen | None, recipe: Recipe, seed: int) -> dict[str, dict]:
    """Kind of features -> results."""
    C = int(frozen.train_N.max()) + 1
    own = torch.randperm(C, generator=torch.Generator().manual_seed(seed))[C // 3 :].sort().values
    kept = torch.isin(frozen.train_N, own).nonzero().flatten()
    y = torch.searchsorted(own, frozen.train_N[kept])
    seen, test, others = features(frozen, far, kept, recipe)
    is_known = torch.isin(frozen.val_N, own)
    found = {}
    for kind, names in KINDS.items():
        T = temperature(seen, names, y, len(own))
        parameters = chosen_parameters(seen, names, y, len(own), T, seed, auroc)
        known = Known(seen, names, y, len(own), T)
        scores, logits = all_scores(known, test, gaussians=True)
        found[kind] = {
            "T": T,
            "parameters": parameters,
            "top1": 100.0 * (own[logits.argmax(1)] == frozen.val_N)[is_known].double().mean().item(),
            "near": measured(by_name(scores, parameters), is_known),
        }
        if others:
            both = {name: torch.cat([x[is_known], others[name]]) for name, x in test.items()}
            far_scores, _ = all_scores(known, both, gaussians=True)
            count = int(is_known.sum())
            found[kind]["far"] = measured(by_name(far_scores, parameters), torch.arange(len(both["mean"])) < count)
    return found


def measured(scores: dict[str, Tensor], is_known: Tensor) -> dict[str, list[float]]:
    """Score -> AUROC and FPR95."""
    return {name: [auroc(s[is_known], s[~is_known]), fpr95(s[is_known], s[~is_known])] for name, s in scores.items()}


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def report(lines: list[dict]) -> list[str]:
    """A table of each kind of unknown images, and the chosen score against the others in pairs."""
    values: dict[str, dict[str, dict[tuple, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    about = defaultdict(list)
    for line in lines:
        config = line["config"]
        place = config["backbone"], config["data"], config["features"]
        about[place].append((line["T"], line["top1"]))
        for how in ("near", "far"):
            for name, pair in line.get(how, {}).items():
                values[how][name][place].append(pair)
    page = ["Top-1 on known classes in %, and T:", "", "| backbone | data | features | top-1 | T |"]
    page.append("|---|---|---|---:|---:|")
    for (backbone, data, kind), each in sorted(about.items()):
        T, top1 = ([pair[i] for pair in each] for i in range(2))
        page.append(f"| {backbone} | {data} | {kind} | {spread(top1)} | {spread(T, 3)} |")
    for how, title in (("near", "Unknown classes of the same data"), ("far", "Another data set")):
        for backbone in sorted({place[0] for place in about}):
            page += ["", f"## {title}, {backbone}: AUROC / FPR95 in %, mean ± standard deviation over splits", ""]
            page += table({n: {p: v for p, v in each.items() if p[0] == backbone} for n, each in values[how].items()})
    for how in values:
        page += ["", f'## AUROC of a score less that of "{CHOSEN}", {how}: points, 95 % t-interval over splits', ""]
        page += differences(values[how])
    return page


def table(values: dict[str, dict[tuple, list]]) -> list[str]:
    places = sorted({place for each in values.values() for place in each})
    lines = ["| score | " + " | ".join(f"{data}, {kind}" for _, data, kind in places) + " | mean |",
             "|---" + "|---:" * (len(places) + 1) + "|"]  # fmt: skip
    means = {name: mean(mean(a for a, _ in each[p]) for p in places) for name, each in values.items()}
    for name in sorted(values, key=lambda name: (-means[name], name)):
        each = values[name]
        cells = [f"{spread([a for a, _ in each[p]])} / {spread([f for _, f in each[p]])}" for p in places]
        false = mean(mean(f for _, f in each[p]) for p in places)
        lines.append(f"| {name} | {' | '.join(cells)} | {means[name]:.2f} / {false:.1f} |")
    return lines


def differences(values: dict[str, dict[tuple, list]]) -> list[str]:
    sets = sorted({place[1] for each in values.values() for place in each})
    lines = ["| score | " + " | ".join(sets) + " |", "|---" + "|---:" * len(sets) + "|"]
    for name, each in values.items():
        if name == CHOSEN:
            continue
        cells = []
        for data in sets:
            pairs = [(mine[0], own[0]) for p in each if p[1] == data
                     for mine, own in zip(each[p], values[CHOSEN][p], strict=True)]  # fmt: skip
            cells.append(interval([mine - own for mine, own in pairs]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--far", nargs=1, default=[], metavar="NAME=DIR", help="data that are unknown to all others")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "unknown.jsonl")
    args = parser.parse_args()
    log, far_name = Log(args.output), next(iter(named_folders(args.far)), "NAME")
    for backbone, weights in named_folders(args.weights).items():
        others = [Frozen(folder, weights, backbone, args.cache) for folder in named_folders(args.far).values()]
        far = others[0] if others else None
        for data, folder in named_folders(args.data).items():
            frozen, recipe = Frozen(folder, weights, backbone, args.cache), Recipe(stage=STAGES[backbone])
            for seed in range(args.splits):
                configs = {kind: {"backbone": backbone, "data": data, "features": kind} for kind in KINDS}
                if all(log.find(config, seed) for config in configs.values()):
                    continue
                began = time.time()
                for kind, got in run(frozen, far, recipe, seed).items():
                    log.add(configs[kind], seed, **got, data_hash=frozen.data_hash)
                print(f"{backbone}, {data}, split {seed}: {time.time() - began:.1f} s", flush=True)
    command = f"python benchmarks/accuracy/unknown.py --weights NAME=FILE … --data NAME=DIR … --far {far_name}=DIR"
    show(["# Unknown classes", "", headline(command, cuda=False), f"scikit-learn {VERSIONS['scikit-learn']}", "",
          *report(list(log.done.values()))], args.output.with_suffix(".md"))  # fmt: skip


if __name__ == "__main__":
    main()
