"""What the three views of the refits are worth when they are one: the table of results/finetune.md run again.

    python benchmarks/accuracy/views.py --weights tf_efficientnet_lite0=FILE
        --data leaf99=DIR grocery81=DIR omniglot242=DIR [--processes N] [--minutes M]

The refits of results/finetune.jsonl saw one augmented view of each training image three times, where three different
ones were meant. Every run here trains as its head did there, on centre crops, with the settings chosen there; its
refits are measured with three different views, with the first of them three times, and with whole images alone.

Resumable: what the output holds already is not run again. After --minutes no run begins any more.
"""

import argparse
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from features import CACHE, named_folders
from finetune import REFIT_VIEWS, Run
from images import load_images
from settings import SETTINGS
from study import NAMES, read, run_all
from study_tables import rows
from tables import Runs, show, table, whence

RESULTS = Path(__file__).parent / "results"
CHOSEN = ("leaf99-3", "grocery81-5", "leaf99", "grocery81", "omniglot242")
VIEWS = {"three views": range(REFIT_VIEWS), "one view three times": [0] * REFIT_VIEWS, "no view": ()}
REFIT = "FAIM mean"


class ViewsRun(Run):
    """A run whose refits are measured once with each set of views."""

    def measure(self) -> dict[str, Any]:
        """``top1`` and ``ece`` in per cent by set of views, each by name of the measure."""
        found = {name: super(ViewsRun, self).measure(views) for name, views in VIEWS.items()}
        first, other = (self.features(self.pixels[:8], view) for view in range(2))
        assert not first.equal(other), "views of different numbers are the same"
        return {value: {name: each[value] for name, each in found.items()} for value in ("top1", "ece")}


def configurations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seed after seed, as chosen for results/finetune.jsonl."""
    chosen = {
        (r["setting"], r["method"]): {name: r[name] for name in NAMES if name != "features"}
        for r in read(RESULTS / "finetune.jsonl")
        if not r["selection"]
    }
    extra = {"features": "mean", "selection": False} | ({"steps": args.steps} if args.steps else {})
    return [
        chosen[setting, method] | extra | {"seed": seed}
        for seed in range(args.seeds)
        for setting in args.settings
        for method in args.methods
    ]


def report(records: list[dict[str, Any]]) -> list[str]:
    runs: Runs = defaultdict(dict)
    methods = list(dict.fromkeys(r["method"] for r in records))
    for r in records:
        setting = SETTINGS[r["setting"]]
        cell = (setting.data, str(setting.shots or "all"), ""), r["seed"]
        trained = {"top1": r["top1"]["three views"]["trained"] / 100, "ece": r["ece"]["three views"]["trained"] / 100}
        runs[r["method"]][cell] = trained
        for views in VIEWS:
            values = {value: r[value][views][REFIT] / 100 for value in ("top1", "ece")}
            runs[f"{r['method']} + refit, {views}"][cell] = values
    settings = sorted({setting for each in runs.values() for setting, _ in each})
    pairs = [
        (f"{m} + refit, {a}", f"{m} + refit, {b}")
        for a, b in (("three views", "one view three times"), ("three views", "no view"))
        for m in methods
    ]
    ours = "faim_indicatrix + refit, three views"
    peers = [m for m in methods if not m.startswith("faim")]
    pairs += [(ours, f"{m} + refit, three views") for m in peers] + [(ours, m) for m in peers]
    lines = ["", "Top-1 in %, mean over seeds:", "", *table(runs, "top1", settings), ""]
    return [*lines, *rows(runs, pairs, settings), "", "ECE in %, 15 bins:", "", *table(runs, "ece", settings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--methods", nargs="+", default=["faim_indicatrix", "isomax_plus", "linear", "arcface"])
    parser.add_argument("--settings", nargs="+", choices=CHOSEN, help="default: all whose data is given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="on each GPU")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no run begins; 0: the tables alone")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS / "views.jsonl", help="tables go beside it, as .md")
    parser.add_argument("--steps", type=int, default=0, help="of each run, to try the script out")
    args = parser.parse_args()
    deadline = time.time() + 60 * args.minutes
    args.data, args.weights, args.centre = named_folders(args.data), named_folders(args.weights), True
    args.settings = args.settings or [s for s in CHOSEN if SETTINGS[s].data in args.data]
    if args.minutes:
        for data, size in {(SETTINGS[s].data, SETTINGS[s].stored) for s in args.settings}:
            load_images(args.data[data], size, args.cache, centre=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    run_all(configurations(args), args, deadline, ViewsRun)
    records = read(args.output)
    if records:
        command = "python benchmarks/accuracy/views.py --weights … --data …"
        command += f" --seeds {args.seeds} --processes {args.processes}"
        lines = ["# Three different views in the refits of the fine-tuning table", "", whence(records[0], command), ""]
        lines += ["A pair is one (setting, seed). Training, images and settings are those of finetune.md."]
        show(lines + report(records), args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
