"""Markdown tables of the JSON lines of ``study.py`` and ``frozen_moments.py``: what each method reaches on either
features, and what the features, Σ and the sphere earn, as paired differences.

    python benchmarks/accuracy/study_tables.py results/moments.jsonl [--output results/moments.md] [--command "…"]

A pair is one (setting, seed). The 95 % intervals are Student's t, over the pairs and over the means of settings; they
are about these data sets, not about new ones.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from closed_form import FOLDS
from refits import DEFAULT_WEIGHT, KINDS, default_refit
from settings import ABLATIONS, LITE0, SETTINGS
from tables import Runs, Setting, difference, setting_means, show, table, whence

DIFFERENCES = ["| difference of top-1 in points | (setting, seed) pairs | means of settings | settings won |"]
DIFFERENCES += ["|---|---:|---:|---:|"]
ON = {"mean": "mean", "moments": "mean + moments", "covariance": "iSQRT-COV"}
PARTS = {"mean": ["mean"], "moments": ["mean", "moments"], "covariance": ["covariance"]}
FAIM = "faim_indicatrix"
Arm = tuple[str, str]  # method, features


def fixed(features: str, kind: str = "FAIM") -> str:
    """The fixed refit of a kind on these features."""
    return default_refit(kind, PARTS[features])


def named(arm: Arm, measure: str) -> str:
    return f"{arm[0]} on {ON[arm[1]]}, {measure}"


def overall(runs: Runs, name: str, settings: list[Setting]) -> float:
    """Mean over the settings; nothing where some lack."""
    got = setting_means(runs[name], "top1")
    return mean(got[s] for s in settings) if set(settings) <= got.keys() else float("-inf")


def rows(runs: Runs, pairs: list[tuple[str, str]], settings: list[Setting]) -> list[str]:
    return [*DIFFERENCES, *(difference(runs, a, b, settings) for a, b in pairs)]


def fine_tuning(records: list[dict]) -> list[str]:
    """Sections by backbone."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if not record["selection"]:
            groups[record["setting"].partition("@")[2]].append(record)
    lines = []
    for group, each in groups.items():
        lines += ["", f"## {'Backbone lite2' if group == 'lite2' else group or 'Backbones lite0 and resnet10t'}"]
        lines += group_section(each)
    return lines


def group_section(records: list[dict]) -> list[str]:
    runs: Runs = defaultdict(dict)
    measures: dict[Arm, list[str]] = {}
    for record in records:
        arm, setting = (record["method"], record["features"]), (SETTINGS | ABLATIONS)[record["setting"]]
        measures[arm] = list(record["top1"])
        cell = (setting.data, str(setting.shots or "all"), setting.backbone), record["seed"]
        for measure, value in record["top1"].items():
            ece = record["ece"].get(measure)
            runs[named(arm, measure)][cell] = {"top1": value / 100.0, "ece": None if ece is None else ece / 100.0}
    settings = sorted({setting for each in runs.values() for setting, _ in each})
    top = {arm: max(names, key=lambda m: overall(runs, named(arm, m), settings)) for arm, names in measures.items()}
    lines = []
    for features in dict.fromkeys(f for _, f in measures):
        arms = [arm for arm in measures if arm[1] == features]
        refit = fixed(features)
        lines += ["", f"### Features: {ON[features]}", "", "Top-1 in %, mean over seeds, as trained:", ""]
        lines += table({arm[0]: runs[named(arm, "trained")] for arm in arms}, "top1", settings)
        lines += ["", f"After the refit that is fixed beforehand ({refit}):", ""]
        lines += table({arm[0]: runs[named(arm, refit)] for arm in arms}, "top1", settings)
        lines += ["", "The best of its refits and blends, picked after the fact in favour of each method:", ""]
        lines += table({named(arm, top[arm]): runs[named(arm, top[arm])] for arm in arms}, "top1", settings)
        lines += ["", f"ECE in %, 15 bins, as trained and after {refit}:", ""]
        both = {named(arm, m): runs[named(arm, m)] for arm in arms for m in ("trained", refit)}
        lines += table(both, "ece", settings)
    return lines + verdicts(runs, measures, top, settings)


def verdicts(runs: Runs, measures: dict[Arm, list[str]], top: dict[Arm, str], settings: list[Setting]) -> list[str]:
    """Paired differences, and every refit and blend of FAIM."""
    lines = []
    for features in (f for f in ("mean", "moments") if (FAIM, f) in measures):
        ours = named((FAIM, features), fixed(features))
        peers = [arm for arm in measures if arm[0] != FAIM and arm[1] in (features, "covariance")]
        lines += ["", f"### FAIM with its fixed refit against peers on {ON[features]}", ""]
        pairs = [(ours, named(arm, m)) for m in ("trained", "refit") for arm in peers
                 for m in (m if m == "trained" else fixed(arm[1]),)]  # fmt: skip
        lines += rows(runs, pairs, settings)
        if peers:
            trained = max(peers, key=lambda arm: overall(runs, named(arm, "trained"), settings))
            any_way = max(peers, key=lambda arm: overall(runs, named(arm, top[arm]), settings))
            lines += ["", "Against the best peer, picked after the fact in its favour: as trained, after any refit or "
                      "blend, and FAIM's best likewise:", ""]  # fmt: skip
            best = named(any_way, top[any_way])
            faim = named((FAIM, features), top[FAIM, features])
            lines += rows(runs, [(ours, named(trained, "trained")), (ours, best), (faim, best)], settings)
    both = sorted({m for m, f in measures if f == "moments"} & {m for m, f in measures if f == "mean"})
    pairs = [(named((m, "moments"), a), named((m, "mean"), b)) for m in both
             for a, b in (("trained", "trained"), (fixed("moments"), fixed("mean")))]  # fmt: skip
    lines += ["", "### What the moments earn", "", *rows(runs, pairs, settings)]
    for title, kind in (("Σ earns (the same refit with Σ = I)", "Σ = I"), ("the sphere earns (against LDA)", "LDA")):
        pairs = [(named(arm, fixed(arm[1])), named(arm, fixed(arm[1], kind))) for arm in measures]
        if kind == "Σ = I":
            pairs += [(named(arm, "FAIM moments"), named(arm, "Σ = I moments")) for arm in measures
                      if arm[1] == "moments"]  # fmt: skip
        lines += ["", f"### What {title}", "", *rows(runs, pairs, settings)]
    pairs = [(named(arm, fixed(arm[1])), named(arm, "trained")) for arm in measures]
    lines += ["", "### What the refit earns", "", *rows(runs, pairs, settings)]
    for arm in ((FAIM, "mean"), (FAIM, "moments")):
        if arm in measures:
            lines += ["", f"### Every measure of FAIM trained on {ON[arm[1]]}", ""]
            lines += table({m: runs[named(arm, m)] for m in measures[arm]}, "top1", settings)
    return lines


def frozen(records: list[dict]) -> list[str]:
    """Sections by backbone and views."""
    groups: dict[tuple[str, str], Runs] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        c = record["config"]
        if "factor" not in c:
            cell = (c["data"], str(c["shots"]), c["backbone"]), c["seed"]
            for name, value in record["top1"].items():
                groups[c["backbone"], c["views"]][name][cell] = {"top1": value / 100.0}
    lines = []
    for (backbone, views), runs in groups.items():
        settings = sorted({setting for each in runs.values() for setting, _ in each})
        kinds = [*KINDS, "RanPAC"]
        lines += ["", f"## {backbone}, whole images squashed to 160 px, {views}", "", "Top-1 in %, mean over cuts:"]
        for title, what in {
            "mean of the last map": "mean",
            "moments": "moments",
            f"both, weight of the moments by {FOLDS}-fold cross-validation": "cv",
            f"both, weight {DEFAULT_WEIGHT}": str(DEFAULT_WEIGHT),
        }.items():
            lines += ["", f"On {title}:", "", *table({k: runs[f"{k} {what}"] for k in kinds}, "top1", settings)]
        peer = max(("LDA", "Σ = I", "RanPAC"), key=lambda k: overall(runs, f"{k} cv", settings))
        pairs = [(f"FAIM {what}", f"{kind} {what}") for kind in ("RanPAC", "LDA", "Σ = I")
                 for what in ("mean", "moments", "cv", DEFAULT_WEIGHT)]  # fmt: skip
        lines += ["", "FAIM against RanPAC, what the sphere earns (against LDA), what Σ earns (against Σ = I):", ""]
        lines += rows(runs, pairs, settings)
        lines += ["", "What the features earn:", ""]
        pairs = [(f"{k} {what}", f"{k} mean") for k in kinds for what in ("moments", "cv")]
        lines += rows(runs, pairs, settings)
        lines += ["", f"Best peer on both by mean, picked after the fact in its favour: {peer}."]
    return lines


def ablation(records: list[dict]) -> list[str]:
    """One table: FAIM on the moments, and with the mean, one thing changed at a time."""
    found: dict[tuple[str, str], dict] = defaultdict(dict)
    for record in records:
        c = record["config"]
        if "factor" in c:
            found[c["factor"], c["value"]][c["data"], str(c["shots"])] = list(record["top1"].values())
    if not found:
        return []
    cells = sorted({cell for each in found.values() for cell in each})
    lines = [
        "",
        f"## One thing changed at a time: {LITE0}, FAIM, moments alone / with the mean at {DEFAULT_WEIGHT}",
        "",
    ]
    lines += ["| what | value | " + " | ".join(" ".join(cell) for cell in cells) + " | mean |"]
    lines += ["|---|---" + "|---:" * (len(cells) + 1) + "|"]
    for (factor, value), each in found.items():
        got = [each[cell] for cell in cells if cell in each]
        texts = [" / ".join(f"{v:.1f}" for v in each[cell]) if cell in each else "" for cell in cells]
        complete = len(got) == len(cells)  # a mean of fewer would not compare
        average = " / ".join(f"{mean(v):.2f}" for v in zip(*got, strict=True)) if complete else ""
        lines.append(f"| {factor} | {value} | {' | '.join(texts)} | {average} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--command", default="python benchmarks/accuracy/frozen_moments.py --weights … --data …")
    args = parser.parse_args()
    records = [json.loads(line) for line in args.lines.read_text().splitlines()]
    where = whence(records[0], args.command)
    if "device" in records[0]:
        text = ["# Full fine-tuning on mean and second moments", "", where, ""]
        text += ["Every method sees whole images, squashed to a square.", *fine_tuning(records)]
    else:
        text = ["# Mean and second moments of frozen features, in closed form", "", where]
        text += frozen(records) + ablation(records)
    show(text, args.output)


if __name__ == "__main__":
    main()
