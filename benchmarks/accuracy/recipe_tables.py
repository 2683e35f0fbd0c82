"""Tables of the lines of ``recipe.py``: top-1, paired differences, what each choice earns, what was chosen.

    python benchmarks/accuracy/recipe_tables.py results/recipe.jsonl [--output results/recipe.md]

A pair is one (setting, cut). Intervals are 95 % Student's t: over pairs, which share validation images in a setting,
and over the means of settings, which is nearer to what another data set would show.
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from tables import interval, show

Setting = tuple[str, str]
COMMAND = "python benchmarks/accuracy/recipe.py --weights FILE --data leaf99=DIR grocery81=DIR omniglot242=DIR"
PARTS = ("mean", "blocks.4", "blocks.2", "blocks.3")
EARNS = {
    "everything: auto − FAIM": ("auto", "FAIM"),
    "second moments at all: FAIM − FAIM on the mean": ("FAIM", "FAIM on the mean"),
    "stages, alone": ("auto, stages alone", "FAIM"),
    "weight, alone": ("auto, weight alone", "FAIM"),
    "sharing, alone": ("auto, sharing alone", "FAIM"),
    "stages, last": ("auto", "auto, one stage"),
    "weight, last": ("auto", "auto, weight 0.75"),
    "sharing, last": ("auto", "auto without sharing"),
    "shrinkage chosen, too: auto and shrinkage − auto": ("auto and shrinkage", "auto"),
}


def table(found: dict[str, dict[Setting, float]], settings: list[Setting]) -> list[str]:
    """One row a method, best mean first."""
    head = ["method", *(f"{data} {shots}" for data, shots in settings), "mean"]
    rows = []
    for name, values in found.items():
        cells = [f"{values[s]:.1f}" if not math.isnan(values[s]) else "" for s in settings]
        known = [values[s] for s in settings if not math.isnan(values[s])]
        whole = len(known) == len(settings)
        rows.append((mean(known) if whole else -1.0, [name, *cells, f"{mean(known):.2f}" if whole else ""]))
    rows.sort(key=lambda row: -row[0])
    return [
        "| " + " | ".join(each) + " |" for each in (head, ["---", *["---:"] * (len(head) - 1)], *(r for _, r in rows))
    ]


def differences(pairs: dict[str, list[tuple[Setting, float]]]) -> list[str]:
    """One row a difference."""
    lines = ["| difference of top-1 in points | (setting, cut) pairs | means of settings | settings better, worse |"]
    lines.append("|---|---:|---:|---:|")
    for name, gaps in pairs.items():
        by_setting = defaultdict(list)
        for setting, gap in gaps:
            by_setting[setting].append(gap)
        means = [mean(each) for each in by_setting.values()]
        better, worse = sum(m > 0 for m in means), sum(m < 0 for m in means)
        values = [gap for _, gap in gaps]
        lines.append(f"| {name} | {interval(values)} ({len(values)}) | {interval(means)} | {better}, {worse} |")
    return lines


def top(name: str) -> Callable[[dict[str, Any]], float]:
    """The top-1 of a method in a line."""
    return lambda line: line["top1"][name] if name in line["top1"] else line["peers"][name]["top1"]


def report(lines: list[dict[str, Any]]) -> list[str]:
    runs = defaultdict(list)
    for line in lines:
        runs[line["config"]["data"], str(line["config"]["shots"])].append(line)
    settings = sorted(runs, key=lambda s: (s[0], math.inf if s[1] == "all" else int(s[1])))
    peers = list(lines[0]["peers"])

    def means(value) -> dict[Setting, float]:
        return {s: mean(value(line) for line in runs[s]) for s in settings}

    def gaps(a, b) -> list[tuple[Setting, float]]:
        return [(s, a(line) - b(line)) for s in settings for line in runs[s]]

    def perfect(line) -> float:
        return math.nan if line["perfect"] is None else line["perfect"]

    found = {name: means(top(name)) for name in ("auto", "FAIM", "FAIM on the mean", *peers)}
    found["auto, perfect choice"] = means(perfect)
    found |= {f"{name}, perfect choice": means(lambda line, n=name: line["peers"][n]["perfect"]) for name in peers}
    overall = {name: mean(found[name][s] for s in settings) for name in peers}
    best = max(overall, key=overall.__getitem__)
    cuts = {data: max(len(runs[s]) for s in settings if s[0] == data) for data, _ in settings}
    counted = ", ".join(f"{data} {count}" for data, count in cuts.items())
    page = ["", f"Top-1 in %, mean over cuts ({counted}; of all images one); what is called perfect was "
            "chosen on the validation images:", ""]  # fmt: skip
    page += table(found, settings)
    page += ["", f"Best peer by mean, picked after the fact in its favour: {best}. The best of all is picked so for "
             "each setting and cut.", ""]  # fmt: skip
    page += differences(
        {f"auto − {name}": gaps(top("auto"), top(name)) for name in peers}
        | {"auto − the best of all": gaps(top("auto"), lambda line: max(top(n)(line) for n in peers))}
    )
    behind = {s: mean(top("auto")(line) for line in runs[s]) - max(found[name][s] for name in peers) for s in settings}
    worst = min(behind, key=behind.__getitem__)
    page += ["", f"Furthest behind the best peer of a setting: {behind[worst]:+.1f} points ({' '.join(worst)}).", ""]
    return [*page, *choices(lines, gaps)]


def choices(lines: list[dict[str, Any]], gaps: Callable) -> list[str]:
    """What each choice earns, and what was chosen."""
    page = ["## What each choice earns", ""]
    page += differences({name: gaps(top(a), top(b)) for name, (a, b) in EARNS.items()})
    chosen = [line for line in lines if line["score"] is not None]
    parts = {name: mean(top("auto")(line) - top(name)(line) for line in lines)
             for name in lines[0]["top1"] if name != "auto"}  # fmt: skip
    least = min(parts, key=parts.__getitem__)
    page += [
        "",
        f"On the mean of all, auto is at least {parts[least]:+.2f} points above each of its own parts ({least}).",
        "",
    ]
    page += [
        "## What was chosen",
        "",
        f"Of {len(chosen)} (setting, cut) pairs in which there is something to choose by:",
        "",
    ]
    counts = {
        "parts": Counter(" + ".join(PARTS[i] for i in line["plan"]["parts"]) for line in chosen),
        "weight of the moments": Counter(line["plan"]["weight"] for line in chosen if len(line["plan"]["parts"]) > 1),
        "sharing": Counter(line["plan"]["share"] for line in chosen),
    }
    page += ["| choice | times |", "|---|---|"]
    page += [f"| {name} | {', '.join(f'{v}: {n}' for v, n in sorted(each.items()))} |" for name, each in counts.items()]
    lost = [line["perfect"] - top("auto")(line) for line in chosen]
    page += ["", f"A perfect choice among the same candidates would give {interval(lost)} points more."]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.lines.read_text().splitlines()]
    where = sorted({f"{line['device']}, torch {line['torch']}" for line in lines})
    head = [
        "# Heads in closed form, chosen by the data",
        "",
        f"{'; '.join(where)}; command: `{COMMAND}`",
        "",
        "Frozen tf_efficientnet_lite0, whole images squashed to 160 px: the mean of the last map and second "
        "moments of blocks.4 (the usual stage), blocks.2 and blocks.3, for every method. FAIM: the fixed recipe.",
    ]
    show([*head, *report(lines)], args.output)


if __name__ == "__main__":
    main()
