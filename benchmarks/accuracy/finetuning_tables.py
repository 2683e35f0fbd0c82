"""Markdown tables of the JSON lines of ``finetuning.py``: what each way of fine-tuning earns for each head, and FAIM's
best against its peers' best.

    python benchmarks/accuracy/finetuning_tables.py results/finetuning.jsonl [--output results/finetuning.md]

A pair is one (setting, seed). Intervals are 95 % t-intervals, over the pairs and over the means of settings; they are
about these data sets, not new ones. What is "chosen" was chosen on a held-out quarter of the training images.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from finetuning import CHOSEN, FAIM, PARTS, PLAIN, TOGETHER, VARIANTS, How, Search
from refits import default_refit
from settings import SETTINGS
from study import read
from study_tables import DIFFERENCES, ON, overall, rows
from tables import Runs, Setting, difference, show, table, whence

AGAIN = "wise 0.5, batch norms again"
Way = tuple[str, str]  # variant, point of the weights


class Section:
    """The runs on one kind of features, as ``runs`` by "head: variant, point, measure".

    Only (setting, seed) pairs count that every head has in every variant.
    """

    def __init__(self, records: list[dict[str, Any]], features: str) -> None:
        own = [r for r in records if r["features"] == features]
        self.features, self.refit = features, default_refit("FAIM", PARTS[features])
        searches = {m: Search(own, m, features) for m in dict.fromkeys(r["method"] for r in own)}
        self.searches = {m: search for m, search in searches.items() if search.settings}
        finals = {
            (r["method"], str(r["options"]["how"]), cell_of(r)): r for r in own if not r["selection"]
        }  # fmt: skip
        self.hows: dict[str, dict[str, How]] = {
            m: {v: search.chosen(v) for v in (PLAIN, *VARIANTS, TOGETHER)} for m, search in self.searches.items()
        }
        wanted = [(m, str(how)) for m, each in self.hows.items() for how in each.values()]
        self.cells = sorted({k[2] for k in finals if all((m, how, k[2]) in finals for m, how in wanted)})
        self.settings: list[Setting] = sorted({setting for setting, _ in self.cells})
        self.runs: Runs = defaultdict(dict)
        self.ways: dict[str, dict[Way, list[str]]] = {m: {} for m in self.hows}
        for m, each in self.hows.items():
            for variant, how in each.items():
                for cell in self.cells:
                    self._add(m, variant, cell, finals[m, str(how), cell])

    def _add(self, method: str, variant: str, cell: tuple[Setting, int], record: dict[str, Any]) -> None:
        for point, top1 in record["top1"].items():
            self.ways[method][variant, point] = list(top1)
            for measure, value in top1.items():
                ece = record["ece"][point].get(measure)
                row = {"top1": value / 100, "ece": None if ece is None else ece / 100}
                self.runs[name(method, (variant, point), measure)][cell] = row

    def held_out(self, method: str, way: Way, measure: str, setting: str | None = None) -> float:
        """Top-1 on the held-out quarter of a setting, or the mean over those of the search; -inf for what has not been
        run there."""
        search, how = self.searches[method], str(self.hows[method][way[0]])
        settings = [setting] if setting else search.settings
        found = [search.found[s, how]["top1"].get(way[1]) for s in settings if (s, how) in search.found]
        complete = len(found) == len(settings) and all(found)
        return mean(top1[measure] for top1 in found) if complete else float("-inf")

    def share(self, method: str, variant: str = PLAIN) -> Way:
        """A variant at WiSE-FT's share for a head, or at its end, chosen on the held-out quarter by the score."""
        points = [p for v, p in self.ways[method] if v == variant and p.startswith(("end", "wise")) and p != AGAIN]
        return variant, max(points, key=lambda p: sum(self.held_out(method, (variant, p), m)
                                                      for m in ("trained", self.refit)))  # fmt: skip

    def chosen(self, method: str, setting: str | None = None) -> tuple[Way, str]:
        """Variant, point and measure that did best on the held-out quarter of a setting, or on average."""
        every = [(way, measure) for way, measures in self.ways[method].items() for measure in measures
                 if way[1] not in ("start", AGAIN)]  # fmt: skip
        return max(every, key=lambda each: self.held_out(method, *each, setting))

    def add_own_choice(self, method: str) -> str:
        """Name of a head with what did best on each setting's own held-out quarter, which is added to the runs."""
        title = f"{method}: chosen by each setting"
        for s in self.searches[method].settings:
            of = name(method, *self.chosen(method, s))
            setting = setting_of(s)
            self.runs[title] |= {cell: row for cell, row in self.runs[of].items() if cell[0] == setting}
        return title

    def top(self, method: str) -> str:
        """The name of what was best on the validation images, picked after the fact."""
        names = [name(method, way, measure) for way, measures in self.ways[method].items() for measure in measures]
        return max(names, key=lambda each: overall(self.runs, each, self.settings))

    def report(self) -> list[str]:
        lines = ["", f"## Features: {ON[self.features]}"]
        if not self.cells:
            return [*lines, "", "No (setting, seed) pair has all heads and variants."]
        lines += ["", "Strengths chosen on the held-out quarter, for each head over all settings:", ""]
        lines += ["| head | " + " | ".join([*VARIANTS, TOGETHER]) + " | WiSE-FT's share |"]
        lines += ["|---" * (len(VARIANTS) + 3) + "|"]
        for m, hows in self.hows.items():
            texts = [text(hows[v]) for v in (*VARIANTS, TOGETHER)]
            lines += [f"| {m} | {' | '.join(texts)} | {self.share(m)[1].removeprefix('wise ')} |"]
        return lines + self._levels() + self._earned() + self._against_peers()

    def _levels(self) -> list[str]:
        lines = []
        for title, measure in (("as trained", "trained"), (f"after the fixed refit ({self.refit})", self.refit)):
            lines += ["", f"### Top-1 in % {title}, mean over seeds", ""]
            shown = {
                f"{m}: {label}": self.runs[name(m, way, measure)]
                for m in self.hows
                for label, way in self._rows(m).items()
            }
            lines += table(shown, "top1", self.settings)
        both = {name(m, (PLAIN, "end"), k): self.runs[name(m, (PLAIN, "end"), k)]
                for m in self.hows for k in ("trained", self.refit)}  # fmt: skip
        return [*lines, "", "### ECE in %, 15 bins, of the plain runs", "", *table(both, "ece", self.settings)]

    def _rows(self, method: str) -> dict[str, Way]:
        """What is shown of a head, by label: each variant at its end, and averages of weights of three of them."""
        ways = {variant: (variant, "end") for variant in self.hows[method]}
        ways |= {"start, no training": (PLAIN, "start"), "EMA": (PLAIN, "ema"), "WiSE-FT": self.share(method)}
        ways |= {"LP-FT + WiSE-FT, the same share": ("LP-FT", self.share(method)[1])}
        ways |= {
            "frozen norms + WiSE-FT": self.share(method, "frozen norms"),
            "frozen norms + EMA": ("frozen norms", "ema"),
        }
        return ways | {f"{TOGETHER} + EMA": (TOGETHER, "ema"), f"{TOGETHER}, wise 0.75": (TOGETHER, "wise 0.75")}

    def _earned(self) -> list[str]:
        lines = []
        for title, measure in (("as trained", "trained"), ("after the fixed refit", self.refit)):
            pairs = [
                (name(m, way, measure), name(m, (PLAIN, "end"), measure))
                for m in self.hows
                for way in self._rows(m).values()
                if way != (PLAIN, "end")
            ]
            lines += ["", f"### What each way earns over the plain run, {title}", ""]
            lines += rows(self.runs, list(dict.fromkeys(pairs)), self.settings)
        pairs = [
            (name(m, (PLAIN, AGAIN), measure), name(m, (PLAIN, "wise 0.5"), measure))
            for m in self.hows
            for measure in ("trained", self.refit)
        ]
        lines += ["", "### Statistics of batch norms taken again after averaging, against averaged ones", ""]
        return lines + rows(self.runs, pairs, self.settings)

    def _against_peers(self) -> list[str]:
        peers = [m for m in self.hows if m != FAIM]
        if FAIM not in self.hows or not peers:
            return []
        chosen = {m: name(m, *self.chosen(m)) for m in self.hows}
        top = {m: self.top(m) for m in self.hows}
        own = {m: self.add_own_choice(m) for m in self.hows}
        lines = ["", "### FAIM against its peers", ""]
        lines += ["Each head with the way and the measure that did best for it on the held-out quarter:", ""]
        lines += table({each: self.runs[each] for each in chosen.values()}, "top1", self.settings)
        lines += ["", *rows(self.runs, [(chosen[FAIM], chosen[m]) for m in peers], self.settings)]
        lines += ["", "Each with what did best on the held-out quarter of each setting by itself:", ""]
        lines += table({each: self.runs[each] for each in own.values()}, "top1", self.settings)
        lines += ["", *rows(self.runs, [(own[FAIM], own[m]) for m in peers], self.settings)]
        lines += ["", "Each with the way and the measure that were best afterwards, on the validation images:", ""]
        lines += table({each: self.runs[each] for each in top.values()}, "top1", self.settings)
        lines += ["", *rows(self.runs, [(top[FAIM], top[m]) for m in peers], self.settings)]
        best = max((top[m] for m in peers), key=lambda each: overall(self.runs, each, self.settings))
        plain = name(FAIM, (PLAIN, "end"), self.refit)
        lines += ["", "Against the best of all peers, picked afterwards in its favour:", "", *DIFFERENCES]
        return lines + [
            difference(self.runs, each, best, self.settings) for each in (plain, chosen[FAIM], own[FAIM], top[FAIM])
        ]


def name(method: str, way: Way, measure: str) -> str:
    return f"{method}: {way[0]}, {way[1]}, {measure}"


def text(how: How) -> str:
    return ", ".join(f"{k} {v}" if not isinstance(v, bool) else k for k, v in how.items()) or "as plain"


def setting_of(key: str) -> Setting:
    return SETTINGS[key].data, str(SETTINGS[key].shots or "all"), ""


def cell_of(record: dict[str, Any]) -> tuple[Setting, int]:
    return setting_of(record["setting"]), record["seed"]


def write(records: list[dict[str, Any]], command: str, output: Path | None) -> None:
    """The page of some records."""
    lines = ["# Fine-tuning that keeps what the backbone knows", "", whence(records[0], command), ""]
    lines += [f"Settings: {', '.join(s for s in CHOSEN if any(r['setting'] == s for r in records))}. "
              "Every head trains with the rate, decay, start and options that `study.py` found for it."]  # fmt: skip
    for features in PARTS:
        if any(r["features"] == features for r in records):
            lines += Section(records, features).report()
    show(lines, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--command", default="python benchmarks/accuracy/finetuning.py --weights … --data …")
    args = parser.parse_args()
    write(read(args.lines), args.command, args.output)


if __name__ == "__main__":
    main()
