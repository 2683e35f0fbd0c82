"""Fine-tuning that keeps what the backbone knows: LP-FT, L2-SP, layer decay, frozen norms, averages of weights.

    python benchmarks/accuracy/finetuning.py --weights tf_efficientnet_lite0=FILE --data leaf99=DIR grocery81=DIR
        [--processes N] [--minutes M]

Every head trains as its best trial of ``study.py`` did (results/moments.jsonl); nothing of that is searched again. Each
variant's strength is chosen for each head on a held-out quarter of the training images, by the mean of its top-1 as
trained and after the fixed refit, over all settings; then come seeds, measured on the validation images, of every
variant and of those together that did better than the plain run did ("together"). The plain run, LP-FT and "together"
are also measured with weights averaged over the last steps and with the start, see :mod:`tuned`.

Features after features, the search before the seeds. After --minutes no run begins any more, and those in progress end;
the same command goes on from there. ``finetuning_tables.py`` makes the tables.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from features import CACHE, named_folders
from images import load_images
from refits import default_refit
from settings import SETTINGS
from study import NAMES, key, read, run_all
from tuned import TunedRun

RESULTS = Path(__file__).parent / "results"
FAIM = "faim_indicatrix"
PARTS = {"mean": ["mean"], "moments": ["mean", "moments"]}
# small ones first, so that a search cut short has whole settings
CHOSEN = ("leaf99-3", "grocery81-5", "leaf99", "grocery81")
PLAIN, TOGETHER = "plain", "together"
How = dict[str, Any]
VARIANTS: dict[str, list[How]] = {
    "LP-FT": [{"probe": True, "rate": rate} for rate in (1.0, 0.3, 0.1)],
    "L2-SP": [{"pull": pull} for pull in (1e-3, 1e-2, 1e-1)],
    "layer decay": [{"layer_decay": decay} for decay in (0.65, 0.8, 0.9)],
    "frozen norms": [
        {"norms": "frozen", "rate": 1.0},
        {"norms": "frozen", "rate": 0.3},
        {"norms": "frozen", "layer_decay": 0.8},
        {"norms": "frozen", "pull": 0.01},
        {"probe": True, "norms": "frozen", "rate": 1.0},
    ],
}


def hows(method: str, variant: str) -> list[How]:
    """Strengths of a variant: FAIM's closed form is its probe, so that LP-FT at the full rate is its plain run."""
    if variant == PLAIN:
        return [{}]
    if method != FAIM:
        return VARIANTS[variant]
    without = [{k: v for k, v in how.items() if k != "probe"} for how in VARIANTS[variant]]
    return [{} if how == {"rate": 1.0} else how for how in without]


def score(record: dict[str, Any], point: str = "end") -> float:
    """The mean of a run's top-1 as trained and after the fixed refit, at a point of its weights."""
    top1 = record["top1"][point]
    return 0.5 * (top1["trained"] + top1[default_refit("FAIM", PARTS[record["features"]])])


class Search:
    """What the runs on a held-out quarter say of one head on some features.

    Means are over the settings that all runs of the search have; none before there is one.
    """

    def __init__(self, records: Sequence[dict[str, Any]], method: str, features: str) -> None:
        self.method, self.features = method, features
        own = {"method": method, "features": features, "selection": True}
        self.found = {
            (r["setting"], str(r["options"]["how"])): r
            for r in records
            if own.items() <= r.items()
        }  # fmt: skip
        every = [{}, *(how for variant in VARIANTS for how in hows(method, variant))]
        self.settings = [s for s in CHOSEN if all((s, str(how)) in self.found for how in every)]

    def score(self, how: How, point: str = "end") -> float:
        return mean(score(self.found[s, str(how)], point) for s in self.settings)

    def chosen(self, variant: str) -> How:
        """The strength that did best; of the plain run and of all together there is one."""
        if variant != TOGETHER:
            return max(hows(self.method, variant), key=self.score)
        plain, merged = self.score({}), {}
        for each in map(self.chosen, VARIANTS):
            if self.score(each) > plain:
                merged |= each
        return merged


def configurations(args: argparse.Namespace, features: str, seeds: Sequence[int] | None) -> list[dict[str, Any]]:
    """Of the search (no seeds), or of the runs on the validation images of what it chose."""
    studied = {
        (r["setting"], r["method"]): {name: r[name] for name in NAMES}
        for r in read(RESULTS / "moments.jsonl")
        if r["features"] == features and not r["selection"]
    }
    records = read(args.output)
    searches = {method: Search(records, method, features) for method in args.methods}
    configs = []
    for seed, setting, method in product([0] if seeds is None else [None, *seeds], args.settings, args.methods):
        averaged = (PLAIN, "LP-FT", "frozen norms", TOGETHER)
        if seeds is None:  # averages of those that choose a share
            search = (PLAIN, *VARIANTS)
            wanted = [(how, v in (PLAIN, "frozen norms")) for v in search for how in hows(method, v)]
        elif not searches[method].settings:
            continue
        elif seed is None:  # what the search chose, on the held-out quarter as well
            wanted = [(searches[method].chosen(TOGETHER), True)]
        else:
            wanted = [(searches[method].chosen(v), v in averaged) for v in (PLAIN, TOGETHER, *VARIANTS)]
        base = studied[setting, method]
        extra = {"seed": seed or 0, "selection": not seeds or seed is None}
        extra |= {"steps": args.steps} if args.steps else {}
        extra |= {"resolution": args.size} if args.size else {}
        configs += [
            base | {"options": base["options"] | {"how": how}, "averages": averages} | extra for how, averages in wanted
        ]
    by_key: dict[str, dict[str, Any]] = {}
    for config in configs:
        config["averages"] |= by_key.get(key(config), config)["averages"]
        by_key[key(config)] = config
    return list(by_key.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--methods", nargs="+", default=[FAIM, "isomax_plus", "linear", "arcface"])
    parser.add_argument("--features", nargs="+", choices=list(PARTS), default=["moments", "mean"])
    parser.add_argument("--settings", nargs="+", choices=CHOSEN, help="default: all whose data is given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="on each GPU")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no run begins")
    parser.add_argument("--keep-features", type=Path, metavar="DIR", help="of plain runs of FAIM and IsoMax+")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS / "finetuning.jsonl")
    small = parser.add_argument_group("to try the script out")
    small.add_argument("--steps", type=int, default=0, help="of each run (default: the study's)")
    small.add_argument("--size", type=int, default=0, help="of the network's inputs (default: the study's)")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    args.data, args.weights = named_folders(args.data), named_folders(args.weights)
    args.settings = args.settings or [s for s in CHOSEN if SETTINGS[s].data in args.data]
    for data, size in {(SETTINGS[s].data, SETTINGS[s].stored) for s in args.settings}:
        load_images(args.data[data], size, args.cache)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    kind = partial(TunedRun, keep=args.keep_features)
    for features in args.features:
        for seeds in (None, range(args.seeds)):
            run_all(configurations(args, features, seeds), args, deadline, kind)


if __name__ == "__main__":
    main()
