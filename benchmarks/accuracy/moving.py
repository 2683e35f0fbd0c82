"""Σ and centre as moving averages of the features in training, and FAIM plus a cosine classifier, in full fine-tuning.

    python benchmarks/accuracy/moving.py --weights tf_efficientnet_lite0=FILE --data leaf99=DIR grocery81=DIR
        [--features mean] [--processes N] [--budget SECONDS]

Every run trains as FAIM's best trial of ``study.py`` did (results/moments.jsonl), nothing is searched, in one of these
arms: Σ and centre fixed from the closed-form start; both refreshed from moving averages with a decay a step, every 10
steps or every epoch; logits_faim + logits_cos, one loss on the sum. Measured are the head as it ends, with FAIM's part
refitted by a pass over whole images and three views, and with it set from the moving sums, without a pass.

Runs come seed by seed. After --budget no run begins any more, and those in progress end; the same command goes on from
there. The tables count the (setting, seed) pairs that all arms have.
"""

import argparse
import copy
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from features import CACHE, named_folders
from finetune import BATCH, Run
from images import Images, load_images
from measures import measures
from running import CosineSum, RunningStatistics, WatchedHead, refresh_
from settings import SETTINGS
from study import NAMES, read, run_all
from tables import Runs, difference, show, table, whence
from torch import Tensor

from timm_faim import fit_
from timm_faim.head.closed_form import fit_from_statistics_

RESULTS = Path(__file__).parent / "results"
FIXED, ENSEMBLE = "Σ fixed", "FAIM + cosine"
CHOSEN = ("leaf99-5", "grocery81-5", "leaf99", "grocery81")
# label -> "track": decays of the sums that are kept, "decay" and "every" of those that are followed, "cosine"
Arms = dict[str, dict[str, Any]]


def moving(decay: float, every: int) -> Arms:
    """The arm with this decay a step, refreshed every so many steps (0: every epoch)."""
    label = f"Σ moving, {decay} a step, every {f'{every} steps' if every else 'epoch'}"
    return {label: {"track": [decay], "decay": decay, "every": every}}


MOVING = moving(0.9, 10) | moving(0.99, 10) | moving(0.9, 0) | moving(0.99, 0)
SUMMED: Arms = {ENSEMBLE: {"track": [], "cosine": True}}
# Σ of the moments takes an eigendecomposition every few steps, so there are fewer arms on them
ARMS: dict[str, Arms] = {
    "mean": {FIXED: {"track": [0.9, 0.99]}} | MOVING | SUMMED,
    "moments": {FIXED: {"track": [0.99]}} | moving(0.99, 0) | SUMMED,
}


class MovingRun(Run):
    """A run of one arm; the ``options`` of its config are those of the arm, ``scale`` and ``margin``, and ``classes``
    keeps the first ones (0: all)."""

    def __init__(self, config: dict[str, Any], images: Images, weights: dict[str, Path], device: torch.device) -> None:
        super().__init__(config, first_classes(images, config["classes"]), weights, device)
        options = config["options"]
        self.follows = options.get("decay")
        self.every = options.get("every") or -(-len(self.labels) // BATCH)
        with torch.cuda.stream(self.stream):
            x = self.features(self.pixels)
            self.sums = {d: RunningStatistics(self.head.faim, x, self.labels, d) for d in options["track"]}

    def _build_head(self) -> WatchedHead:
        options = {name: self.config["options"].get(name, False) for name in ("scale", "margin", "cosine")}
        return WatchedHead(self.model.widths, self.classes, **options)

    def advance(self) -> bool:
        more = super().advance()
        with torch.cuda.stream(self.stream):
            for each in self.sums.values():
                each.step(self.head.seen_BD, self.head.seen_B)
            if self.follows and self.step % self.every == 0:
                refresh_(self.head.faim, self.sums[self.follows])
        return more

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Top-1 and ECE in per cent by name of the measure."""
        x, y = self.features(self.test[0]), self.test[1]
        found = {name: measures(logits, y) for name, logits in self._logits(x).items()}
        return {value: {name: 100 * each[value] for name, each in found.items()} for value in ("top1", "ece")}

    def _logits(self, x: Tensor) -> dict[str, Tensor]:
        """Logits [B, C] of features by measure."""
        faim, cosine = self.head.faim, self.head.cosine
        seen, labels = self.refit_features()
        refitted = fit_(copy.deepcopy(faim), [(seen, labels)])(x)
        found = {"trained": self.head(x), "refit": refitted}
        for decay, sums in self.sums.items():
            found[f"sums {decay}"] = fit_from_statistics_(copy.deepcopy(faim), sums)(x)
        if not self.follows:
            at_means = CosineSum(self.head.widths, self.classes, self.config["options"]["scale"]).to(x.device)
            if cosine is not None:
                at_means.load_state_dict(cosine.state_dict())  # for its learned scale
            at_means.start_(seen, labels)
            found["refit + cosine at class means"] = refitted + at_means(x)
        if cosine is not None:
            found |= {"FAIM's part": faim(x), "cosine's part": cosine(x), "refit + cosine": refitted + cosine(x)}
        return found


def first_classes(images: Images, count: int) -> Images:
    """The images of the first ``count`` classes (0: of all)."""
    if not count:
        return images
    train, val = ((x[y < count], y[y < count]) for x, y in (images.train, images.val))
    return Images(train, val, images.data_hash)


def configurations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all runs: features after features, seed after seed, setting after setting."""
    chosen = [r for r in read(RESULTS / "moments.jsonl") if r["method"] == "faim_indicatrix" and not r["selection"]]
    best = {(r["setting"], r["features"]): {name: r[name] for name in NAMES} for r in chosen}
    extra = {"selection": False, "classes": args.classes}
    extra |= {"steps": args.steps} if args.steps else {}
    extra |= {"resolution": args.size} if args.size else {}
    return [
        best[setting, features]
        | {"method": label, "options": best[setting, features]["options"] | arm, "seed": seed}
        | extra
        for features in args.features
        for seed in range(args.seeds)
        for setting in args.settings
        for label, arm in ARMS[features].items()
    ]


def pairs(features: str) -> dict[str, list[tuple[str, str]]]:
    """What the tables compare, by question."""
    moved = [label for label in ARMS[features] if label.startswith("Σ moving")]
    without_pass = [(f"{arm}: sums {d}", d) for arm in (FIXED, *moved) for d in ARMS[features][arm]["track"]]
    return {
        "Σ and centre moving in training, as trained and after the same refit": [
            (f"{arm}: {measure}", f"{FIXED}: {measure}") for measure in ("trained", "refit") for arm in moved
        ],
        "Head set from the moving sums at the end, against the refit by a pass, and against no refit": [
            (name, f"{FIXED}: {measure}") for measure in ("refit", "trained") for name, _ in without_pass
        ],
        "What the refit by a pass earns": [
            (f"{arm}: refit", f"{arm}: trained") for arm in (FIXED, *moved)
        ],
        "FAIM + cosine against FAIM alone": [
            (f"{ENSEMBLE}: trained", f"{FIXED}: trained"),
            (f"{ENSEMBLE}: FAIM's part", f"{FIXED}: trained"),
            (f"{ENSEMBLE}: refit + cosine", f"{FIXED}: refit"),
            (f"{ENSEMBLE}: refit + cosine at class means", f"{FIXED}: refit"),
            (f"{ENSEMBLE}: refit", f"{FIXED}: refit"),
            (f"{FIXED}: refit + cosine at class means", f"{FIXED}: refit"),
        ],
    }  # fmt: skip


def report(records: list[dict[str, Any]], features: str) -> list[str]:
    """The section of some features, on the cells that all arms have."""
    arms = list(ARMS[features])
    by_arm: dict[str, dict] = {arm: {} for arm in arms}
    for r in records:
        setting = SETTINGS[r["setting"]]
        cell = (setting.data, str(setting.shots or "all"), ""), r["seed"]
        by_arm[r["method"]][cell] = r
    complete = sorted(set.intersection(*(set(cells) for cells in by_arm.values())))
    lines = ["", f"## Features: {'mean' if features == 'mean' else 'mean + moments'}", ""]
    if not complete:
        return [*lines, "No (setting, seed) pair has all arms."]
    runs: Runs = defaultdict(dict)
    for arm in arms:
        for cell in complete:
            r = by_arm[arm][cell]
            for name in r["top1"]:
                runs[f"{arm}: {name}"][cell] = {value: r[value][name] / 100.0 for value in ("top1", "ece")}
    settings = sorted({setting for setting, _ in complete})
    lines += [f"{len(complete)} (setting, seed) pairs. Top-1 in %, mean over seeds:", ""]
    lines += table(runs, "top1", settings)
    for title, compared in pairs(features).items():
        lines += ["", f"### {title}", ""]
        lines += ["| difference of top-1 in points | (setting, seed) pairs | means of settings | settings won |"]
        lines += ["|---|---:|---:|---:|", *(difference(runs, a, b, settings) for a, b in compared)]
    return [*lines, "", "### ECE in %, 15 bins", "", *table(runs, "ece", settings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, metavar="NAME=FILE", help="backbones as safetensors")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR")
    parser.add_argument("--features", nargs="+", choices=list(ARMS), default=["mean"])
    parser.add_argument("--settings", nargs="+", choices=CHOSEN, help="default: all whose data is given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="on each GPU")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no run begins; 0: tables alone")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS / "moving.jsonl", help="tables go beside it, as .md")
    small = parser.add_argument_group("to try the script out")
    small.add_argument("--steps", type=int, default=0, help="of each run (default: the study's)")
    small.add_argument("--size", type=int, default=0, help="of the network's inputs (default: the study's)")
    small.add_argument("--classes", type=int, default=0, help="the first ones alone (default: all)")
    args = parser.parse_args()
    deadline = time.time() + args.budget
    args.data, args.weights = named_folders(args.data), named_folders(args.weights)
    args.settings = args.settings or [s for s in CHOSEN if SETTINGS[s].data in args.data]
    if args.budget:
        for data, size in {(SETTINGS[s].data, SETTINGS[s].stored) for s in args.settings}:
            load_images(args.data[data], size, args.cache)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    run_all(configurations(args), args, deadline, MovingRun)
    records = read(args.output)
    if not records:
        return
    given = [f for f in ARMS if any(r["features"] == f for r in records)]
    command = "python benchmarks/accuracy/moving.py --weights NAME=FILE --data NAME=DIR …"
    command += f" --features {' '.join(given)} --seeds {args.seeds} --processes {args.processes}"
    lines = ["# Moving averages of Σ, and FAIM + cosine, in full fine-tuning", "", whence(records[0], command), ""]
    lines += [
        "A pair is one (setting, seed); intervals are 95 % t-intervals, about these data sets, not new ones. "
        f"Decays are of a step of {BATCH} images."
    ]
    for features in given:
        lines += report([r for r in records if r["features"] == features], features)
    show(lines, args.output.with_suffix(".md"))


if __name__ == "__main__":
    main()
