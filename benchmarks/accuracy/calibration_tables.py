"""Tables of ``calibration.py``."""

from collections import defaultdict
from collections.abc import Callable
from statistics import mean

ALL = 10**6  # images a class, where they are not cut
Groups = dict[tuple[str, str, int], list[dict]]  # data, features, images a class -> lines of the cuts
SOURCES = "5 random folds / 5 folds of look-alikes / the other half of the validation images"


def report(lines: list[dict]) -> list[str]:
    """Means over cuts."""
    groups: Groups = defaultdict(list)
    for line in lines:
        c = line["config"]
        groups[c["data"], c["features"], ALL if c["shots"] == "all" else c["shots"]].append(line)
    page = ["Mean over cuts. Top-1, ECE (15 bins), rates and coverages in %."]
    for value, title in (("ece", "ECE"), ("nll", "Cross entropy"), ("T", "T")):
        page += ["", f"## {title}, by where T is from", "", *by_source(groups, value)]
    page += ["", "## Known validation images rejected, by where the threshold is from", "", f"{SOURCES}:", ""]
    page += pairs_table(groups, "rejected", lambda v: " / ".join(f"{rate:.1f}" for rate in v))
    page += ["", "## Sets of classes, coverage and mean size, by where q is from", "", f"{SOURCES}:", ""]
    page += pairs_table(groups, "sets", lambda v: " / ".join(f"{share:.1f} {size:.2f}" for share, size in v))
    return page


def by_source(groups: Groups, value: str) -> list[str]:
    """One row a setting, one column a source of T."""
    names = [name for name in next(iter(groups.values()))[0]["temperatures"] if name != "all validation images"]
    digits = 1 if value == "ece" else 3
    head = ["data", "features", "images a class", "top-1", "held-out top-1: random, look-alikes", *names]
    page = [f"| {' | '.join(head)} |", "|---|---|---" + "|---:" * (len(head) - 3) + "|"]
    totals = defaultdict(list)
    for (data, kind, shots), each in sorted(groups.items()):
        values = [mean(line["temperatures"][name][value] for line in each) for name in names]
        for name, number in zip(names, values, strict=True):
            totals[name].append(number)
        held = ", ".join(f"{v:.1f}" for v in averaged([line["held_out_top1"] for line in each]))
        top1 = f"{mean(line['top1'] for line in each):.1f}"
        cells = [data, kind, "all" if shots == ALL else str(shots), top1, held, *(f"{v:.{digits}f}" for v in values)]
        page.append(f"| {' | '.join(cells)} |")
    return [*page, "| mean | | | | | " + " | ".join(f"{mean(totals[name]):.{digits}f}" for name in names) + " |"]


def averaged(values: list) -> list:
    """Mean of lists of numbers or of lists, place by place."""
    return [averaged(list(v)) if isinstance(v[0], list) else mean(v) for v in zip(*values, strict=True)]


def pairs_table(groups: Groups, key: str, cell: Callable[[list], str]) -> list[str]:
    """One row a score or kind with its rate, one column a setting with all images."""
    whole = {(data, kind): each for (data, kind, shots), each in sorted(groups.items()) if shots == ALL}
    lines = ["| | " + " | ".join(f"{d}, {k}" for d, k in whole) + " |", "|---" + "|---:" * len(whole) + "|"]
    for name in next(iter(whole.values()))[0][key]:
        cells = [cell(averaged([line[key][name] for line in each])) for each in whole.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
