"""Tables of ``unknown.py``."""

from collections import defaultdict
from statistics import mean, stdev

from tables import interval
from unknown_scores import CHOSEN, NEAREST


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def report(lines: list[dict]) -> list[str]:
    """A table of each kind of unknown images, and the chosen score against the others in pairs."""
    values: dict[str, dict[str, dict[tuple, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    about = defaultdict(list)
    few: dict[int, dict[str, dict[tuple, list]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        config = line["config"]
        place = config["backbone"], config["data"], config["features"]
        if "known" in config:
            for name, pair in line["near"].items():
                few[config["known"]][name][place].append(pair)
            continue
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
    for other in (CHOSEN, NEAREST):
        page += ["", f'## AUROC of a score less that of "{other}", unknown classes of the same data', ""]
        page += [
            "Points, 95 % t-interval over splits, backbones and features.",
            "",
            *differences(values["near"], other),
        ]
    if few:
        page += [
            "",
            "## Few known classes: AUROC in %, mean over splits, backbones, data and features",
            "",
            *by_count(few),
        ]
    return page


def by_count(few: dict[int, dict[str, dict[tuple, list]]]) -> list[str]:
    """One row a score, one column a data set and number of known classes."""
    columns = sorted({(place[1], count) for count, each in few.items() for v in each.values() for place in v})
    rows = {
        name: [mean(a for p, v in few[count][name].items() if p[1] == data for a, _ in v) for data, count in columns]
        for name in next(iter(few.values()))
    }
    lines = ["| score | " + " | ".join(f"{data}, {count}" for data, count in columns) + " | mean |"]
    lines.append("|---" + "|---:" * (len(columns) + 1) + "|")
    for name in sorted(rows, key=lambda name: (-mean(rows[name]), name)):
        lines.append(f"| {name} | {' | '.join(f'{v:.1f}' for v in rows[name])} | {mean(rows[name]):.2f} |")
    return lines


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


def differences(values: dict[str, dict[tuple, list]], other: str) -> list[str]:
    sets = sorted({place[1] for each in values.values() for place in each})
    lines = ["| score | " + " | ".join(sets) + " |", "|---" + "|---:" * len(sets) + "|"]
    for name, each in values.items():
        if name == other:
            continue
        cells = []
        for data in sets:
            pairs = [(mine[0], own[0]) for p in each if p[1] == data
                     for mine, own in zip(each[p], values[other][p], strict=True)]  # fmt: skip
            cells.append(interval([mine - own for mine, own in pairs]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
