"""Markdown tables of the JSON lines of ``frozen.py`` and of ``results/finetune.jsonl``: means, and FAIM against its
peers in paired differences. Those of ``study.py`` since: ``study_tables.py``.

    python benchmarks/accuracy/tables.py results/frozen.jsonl [--output results/frozen.md] [--command "…"]

A pair is one (setting, seed): a data set, a number of shots and a support. The 95 % intervals are Student's t over the
pairs; pairs of one setting share validation images, so that the intervals are about these data sets, not about new
ones. A second interval over the means of settings is wider and nearer to the latter.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

Setting = tuple[str, str, str]  # data set, shots, support
Runs = dict[str, dict[tuple[Setting, int], dict]]  # method -> (setting, seed) -> row

CONTROLS = ("whitened_linear", "whitened_arcface")  # get FAIM's Σ: they show what is left beside whitening
PAIRS = {
    "closed form": [
        ("faim_indicatrix_0.3", "faim_indicatrix_eye"),
        ("faim_indicatrix_cv", "faim_indicatrix_eye"),
        ("faim_indicatrix_0.3", "lda_0.3"),
        ("faim_indicatrix_cv", "lda_cv"),
        ("faim_indicatrix_cv_beta", "faim_indicatrix_cv"),
    ],
    "trained": [
        ("faim_indicatrix", "faim_indicatrix_eye"),
        ("faim_indicatrix_beta", "faim_indicatrix"),
        ("faim_indicatrix", "whitened_arcface"),
        ("faim_indicatrix", "whitened_linear"),
        ("faim_sphere", "cosface"),
    ],
    "full fine-tuning": [
        ("faim_indicatrix + refit", "faim_indicatrix + refit, Σ = I"),
        ("faim_indicatrix + refit, β", "faim_indicatrix + refit"),
        ("faim_indicatrix + refit", "faim_indicatrix"),
        ("faim_indicatrix", "faim_indicatrix_eye"),
        ("faim_indicatrix_beta", "faim_indicatrix"),
        ("faim_indicatrix + refit", "faim_indicatrix_eye"),
        ("faim_indicatrix + refit", "faim_sphere"),
        ("linear + refit", "linear"),
        ("arcface + refit", "arcface"),
        ("isomax_plus + refit", "isomax_plus"),
        ("faim_indicatrix + refit", "isomax_plus + refit"),
    ],
}
REFITS = {"": "", " + refit": "refit_", " + refit, β": "refit_beta_", " + refit, Σ = I": "refit_identity_"}


def read(path: Path) -> dict[str, Runs]:
    """Regime -> runs."""
    regimes: dict[str, Runs] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "setting" in row:
            add_fine_tuning(regimes["full fine-tuning"], row)
            continue
        config = row["config"]
        setting = (config["data"], str(config["shots"]), config["support"])
        regimes[config["regime"]][config["method"]][setting, row["seed"]] = row
    return regimes


def add_fine_tuning(runs: Runs, row: dict) -> None:
    """A line of ``results/finetune.jsonl``: the head as trained, and its backbone under refits, as methods apart."""
    data, _, shots = row["setting"].partition("-")
    for name, prefix in () if row["selection"] else REFITS.items():
        values = {value: row[prefix + value] / 100.0 for value in ("top1", "ece")}
        runs[row["method"] + name][(data, shots or "all", "views"), row["seed"]] = values


def setting_means(runs: dict[tuple[Setting, int], dict], value: str) -> dict[Setting, float]:
    """Mean over seeds of a value in each setting that has it, in %."""
    values = defaultdict(list)
    for (setting, _), row in runs.items():
        if row[value] is not None:
            values[setting].append(100.0 * row[value])
    return {setting: mean(v) for setting, v in values.items()}


def table(runs: Runs, value: str, settings: list[Setting]) -> list[str]:
    """One row a method, best mean first; the mean only where a method ran in all settings that any other did."""
    head = ["method", *(f"{data} {shots}" for data, shots, _ in settings), "mean"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    means = {method: setting_means(each, value) for method, each in runs.items()}
    wanted = {s for got in means.values() for s in got} & set(settings)
    rows = []
    for method, got in means.items():
        overall = mean(got[s] for s in wanted) if wanted and wanted <= got.keys() else None
        cells = [f"{got[s]:.1f}" if s in got else "" for s in settings]
        cells.append("" if overall is None else f"{overall:.2f}")
        rows.append((overall, f"| {method} | " + " | ".join(cells) + " |"))
    sign = -1.0 if value == "top1" else 1.0
    rows.sort(key=lambda row: float("inf") if row[0] is None else sign * row[0])
    return lines + [row for _, row in rows]


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval."""
    if len(values) < 2:
        return f"{mean(values):+.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{mean(values):+.2f} ± {half:.2f}"


def difference(runs: Runs, a: str, b: str, settings: list[Setting]) -> str:
    """A row on a - b of top-1, in points."""
    gaps = defaultdict(list)
    for key in runs[a].keys() & runs[b].keys():
        if key[0] in settings:
            gaps[key[0]].append(100.0 * (runs[a][key]["top1"] - runs[b][key]["top1"]))
    pairs = [gap for each in gaps.values() for gap in each]
    if not pairs:
        return f"| {a} - {b} | | | |"
    by_setting = [mean(each) for each in gaps.values()]
    wins = sum(gap > 0 for gap in by_setting)
    return f"| {a} - {b} | {interval(pairs)} ({len(pairs)}) | {interval(by_setting)} | {wins} of {len(by_setting)} |"


def best(runs: Runs, settings: list[Setting], faim: bool) -> str:
    """The FAIM method or peer with the best mean of top-1 among those that ran in all settings."""
    means = {}
    for method, each in runs.items():
        got = setting_means(each, "top1")
        is_peer = method.startswith("faim") == faim and method not in CONTROLS and " + " not in method
        if is_peer and set(settings) <= got.keys():
            means[method] = mean(got[s] for s in settings)
    return max(means, key=lambda method: means[method])


def report(regimes: dict[str, Runs]) -> list[str]:
    lines = []
    for regime, runs in regimes.items():
        every = sorted({setting for each in runs.values() for setting, _ in each})
        for support in sorted({support for _, _, support in every}):
            settings = [s for s in every if s[2] == support]
            lines += ["", f"## {regime}, training images: {support}", "", "Top-1 in %, mean over seeds:", ""]
            lines += table(runs, "top1", settings)
            lines += ["", "ECE in %, 15 bins:", ""] + table(runs, "ece", settings)
            lines += ["", "Paired differences of top-1 in points, mean ± half of the 95 % t-interval:", ""]
            lines += ["| difference | (setting, seed) pairs | means of settings | settings won |"]
            lines += ["|---|---:|---:|---:|"]
            peer = best(runs, settings, faim=False)
            pairs = [(method, peer) for method in runs if method.startswith("faim") and "β" not in method]
            pairs += PAIRS[regime]
            lines += [difference(runs, a, b, settings) for a, b in dict.fromkeys(pairs)]
            lines += ["", f"Best peer by mean, chosen after the fact in its favour: {peer}."]
    return lines


def whence(record: dict, command: str) -> str:
    """Machine, versions and command of the lines that a record is one of; without a device they are this machine's."""
    if "device" not in record:
        return headline(command, cuda=False)
    versions = f"Python {record['python']}, torch {record['torch']}, timm {record['timm']}"
    return f"{record['device']}; {versions}; command: `{command}`"


def show(lines: list[str], output: Path | None) -> None:
    """Print a page, and write it where a file is named."""
    page = "\n".join(lines) + "\n"
    print(page)
    if output:
        output.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--command", default="python benchmarks/accuracy/frozen.py --weights FILE --data NAME=DIR …")
    args = parser.parse_args()
    first = json.loads(args.lines.read_text().partition("\n")[0])
    title = "# Full fine-tuning" if "setting" in first else "# Frozen features"
    show([title, "", whence(first, args.command), *report(read(args.lines))], args.output)


if __name__ == "__main__":
    main()
