"""Tables of the JSON lines of ``unlabelled.py``."""

from collections import defaultdict
from collections.abc import Callable
from statistics import mean

from tables import interval

PLAIN, OWN = "without", "EM"
RULES: dict[str, Callable[[float, float], bool]] = {
    "always": lambda change, error: True,
    "better by 1 standard error": lambda change, error: change > error,
    "better": lambda change, error: change > 0.0,
    "no worse": lambda change, error: change >= 0.0,
    "no worse by 1 standard error": lambda change, error: change >= -error,
    "no worse by 2 (the guard)": lambda change, error: change >= -2.0 * error,
}
CHECKS = {"check": "held-out training images", "validation": "a quarter of the validation images"}


def report(rows: list[dict]) -> list[str]:
    """The page."""
    few, rows = [[row for row in rows if ("given" in row["config"]) == is_few] for is_few in (True, False)]
    lines = ["# Unlabelled images"]
    for kind in dict.fromkeys(row["config"]["features"] for row in rows):
        mine = [row for row in rows if row["config"]["features"] == kind]
        lines += ["", f"## Features: {kind}", "", *_same(mine), "", *_other(mine)]
    lines += ["", "## Images of a fifth of the classes alone, features: mean", "", *_same(few)]
    return lines + ["", "## The guard", "", *_guard(rows)]


def _setting(row: dict) -> str:
    return f"{row['config']['data']} {row['config']['shots']}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|---" + "|---:" * (len(cells) - 1) + "|"]


def _same(rows: list[dict]) -> list[str]:
    """Top-1 on the given images by setting, and the paired change."""
    settings = list(dict.fromkeys(map(_setting, rows)))
    lines = [
        "Top-1 in % on the images that are given, mean over cuts; the last columns are paired differences in "
        "points, with the 95 % interval over settings and cuts: from the head without them, and of EM from the row.",
        "",
    ]
    lines += _head(["method", *settings, "mean", "- without", "EM -"])
    for name in rows[0]["same"]:
        by_setting = defaultdict(list)
        for row in rows:
            by_setting[_setting(row)].append(row["same"][name])
        values = [mean(by_setting[s]) for s in settings]
        gain = interval([row["same"][name] - row["same"][PLAIN] for row in rows])
        back = interval([row["same"][OWN] - row["same"][name] for row in rows])
        lines.append(_line([name, *(f"{v:.1f}" for v in values), f"{mean(values):.2f}", gain, back]))
    return lines


def _other(rows: list[dict]) -> list[str]:
    """Change on images that are not given, by folder."""
    lines = ["Change of top-1 in points on images that are not given, by what is in the folder:", ""]
    lines += _head(["folder", "used", "EM", "worst", "EM of all, known or not", "worst"])
    for folder in rows[0]["other"]:
        found = [row["other"][folder] for row in rows]
        own = [each["with"] - each["without"] for each in found]
        blind = [each["all"] - each["without"] for each in found]
        used = f"{100 * mean(each['used'] for each in found):.0f} %"
        lines.append(_line([folder, used, interval(own), f"{min(own):+.1f}", interval(blind), f"{min(blind):+.1f}"]))
    return lines


def _guard(rows: list[dict]) -> list[str]:
    """What rules of keeping would give."""
    lines = [
        "Mean change of top-1 in points under rules of when to keep what the unlabelled images did, on images that are "
        "not given, by folder; in brackets how often it is kept. A perfect guard keeps what helps the measured images. "
        "Where each class has one image no training image can be held out, and nothing is kept. The last column: "
        "measured on the images that are given, the whole validation set.",
        "",
    ]
    folders = list(rows[0]["other"])
    lines += _head(["rule", "by", *folders, "same images"])
    for key, by in CHECKS.items():
        for name, rule in RULES.items():
            cells = [_outcome([_kept(row["other"][folder], key, rule) for row in rows]) for folder in folders]
            same = [(row["same"][OWN] - row["same"][PLAIN], _asked(row["check"], rule)) for row in rows]
            lines.append(_line([name, by, *cells, _outcome(same) if key == "check" else ""]))
    best = []
    for folder in folders:
        found = [row["other"][folder]["with"] - row["other"][folder]["without"] for row in rows]
        best.append(_outcome([(change, change > 0) for change in found]))
    same = [row["same"][OWN] - row["same"][PLAIN] for row in rows]
    return [*lines, _line(["perfect", "", *best, _outcome([(change, change > 0) for change in same])])]


def _asked(check: list[float] | None, rule: Callable[[float, float], bool]) -> bool:
    return check is not None and rule(check[1] - check[0], check[2])


def _kept(found: dict, key: str, rule: Callable[[float, float], bool]) -> tuple[float, bool]:
    return found["with"] - found["without"], _asked(found[key], rule)


def _outcome(cases: list[tuple[float, bool]]) -> str:
    share = 100 * mean(kept for _, kept in cases)
    return f"{mean(change if kept else 0.0 for change, kept in cases):+.2f} ({share:.0f} %)"
