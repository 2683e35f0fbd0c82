"""Images of unknown classes: which score of a head in closed form tells them from known ones.

    python benchmarks/accuracy/unknown.py --weights NAME=FILE ... --data NAME=DIR ... [--far NAME=DIR]

A third of the classes, drawn by the seed, is unknown. The head is fitted in closed form to all training images of the
others, on the mean of the last map ("mean") or on mean and second moments ("moments"). Scores of the validation images
of known classes are set against those of unknown classes, and of another data set ("far"): area under the ROC curve,
and the share of unknown images that is accepted where 95 % of the known ones are ("FPR95"). T and all parameters are
those that do best on known training images, with a third of the known classes taken as unknown in turn; no validation
image and no unknown class chooses anything. Beside that heads of few known classes are measured, all others unknown.
Whole images squashed to 160 px; lines that the output has are not computed again.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch
from features import CACHE, named_folders
from frozen import VERSIONS, Log
from maps import Frozen, Recipe, fitted_moments, second_moments
from settings import STAGES
from sklearn.metrics import roc_auc_score
from tables import show
from torch import Tensor
from unknown_scores import Known, Parts, all_scores, by_name, chosen_parameters, temperature
from unknown_tables import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

KINDS = {"mean": ("mean",), "moments": ("mean", "moments")}


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


def run(frozen: Frozen, far: Frozen | None, recipe: Recipe, seed: int, few: int = 0) -> dict[str, dict]:
    """Kind of features -> results. With ``few`` known classes only of scores that have nothing to choose."""
    C = int(frozen.train_N.max()) + 1
    drawn = torch.randperm(C, generator=torch.Generator().manual_seed(seed))
    own = drawn[-few if few else C // 3 :].sort().values
    kept = torch.isin(frozen.train_N, own).nonzero().flatten()
    y = torch.searchsorted(own, frozen.train_N[kept])
    seen, test, others = features(frozen, None if few else far, kept, recipe)
    is_known = torch.isin(frozen.val_N, own)
    found = {}
    for kind, names in KINDS.items():
        T = temperature(seen, names, y, len(own))
        parameters = {} if few else chosen_parameters(seen, names, y, len(own), T, seed, auroc)
        known = Known(seen, names, y, len(own), T)
        whole = {name: torch.cat([x, others[name]]) if others else x for name, x in test.items()}
        scores, logits = all_scores(known, whole, features=not few, gaussians=not few)
        chosen, n = by_name(scores, parameters), len(is_known)
        found[kind] = {
            "T": T,
            "parameters": parameters,
            "top1": 100.0 * (own[logits[:n].argmax(1)] == frozen.val_N)[is_known].double().mean().item(),
            "near": {name: measured(s[:n][is_known], s[:n][~is_known]) for name, s in chosen.items()},
        }
        if others:
            found[kind]["far"] = {name: measured(s[:n][is_known], s[n:]) for name, s in chosen.items()}
    return found


def measured(known: Tensor, unknown: Tensor) -> list[float]:
    """AUROC and FPR95."""
    return [auroc(known, unknown), fpr95(known, unknown)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--far", nargs=1, default=[], metavar="NAME=DIR", help="data that are unknown to all others")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--few", nargs="*", type=int, default=[3, 5, 10, 20], help="numbers of known classes, beside")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for maps")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "unknown.jsonl")
    args = parser.parse_args()
    log, far_name = Log(args.output), next(iter(named_folders(args.far)), "NAME")
    for backbone, weights in named_folders(args.weights).items():
        others = [Frozen(folder, weights, backbone, args.cache) for folder in named_folders(args.far).values()]
        far = others[0] if others else None
        for data, folder in named_folders(args.data).items():
            frozen, recipe = Frozen(folder, weights, backbone, args.cache), Recipe(stage=STAGES[backbone])
            for few, seed in product((0, *args.few), range(args.splits)):
                fixed = {"backbone": backbone, "data": data} | ({"known": few} if few else {})
                configs = {kind: fixed | {"features": kind} for kind in KINDS}
                if all(log.find(config, seed) for config in configs.values()):
                    continue
                began = time.time()
                for kind, got in run(frozen, far, recipe, seed, few).items():
                    log.add(configs[kind], seed, **got, data_hash=frozen.data_hash)
                print(
                    f"{backbone}, {data}, {few or 'most'} classes, split {seed}: {time.time() - began:.1f} s",
                    flush=True,
                )
    command = f"python benchmarks/accuracy/unknown.py --weights NAME=FILE … --data NAME=DIR … --far {far_name}=DIR"
    show(["# Unknown classes", "", headline(command, cuda=False), f"scikit-learn {VERSIONS['scikit-learn']}", "",
          *report(list(log.done.values()))], args.output.with_suffix(".md"))  # fmt: skip


if __name__ == "__main__":
    main()
