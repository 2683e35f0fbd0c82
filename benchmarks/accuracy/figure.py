"""The figure of docs/results.md: top-1 of every head in full fine-tuning, as trained and after FAIM's refit.

python benchmarks/accuracy/figure.py benchmarks/accuracy/results/finetune.jsonl docs/results.png
"""

import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tables import read, setting_means


def main() -> None:
    runs = read(Path(sys.argv[1]))["full fine-tuning"]
    means = {method: mean(setting_means(each, "top1").values()) for method, each in runs.items()}
    heads = sorted((method for method in means if " + " not in method), key=means.get)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for shift, suffix, label, colour in (
        (0.3, "", "as trained", "#8da0b6"),
        (0.0, " + refit, Σ = I", "refit, Σ = I", "#d9c27e"),
        (-0.3, " + refit", "refit, Σ of the features", "#b5482f"),
    ):
        values = [means[head + suffix] for head in heads]
        axes.barh([i + shift for i in range(len(heads))], values, 0.28, label=label, color=colour)
    axes.set_yticks(range(len(heads)), heads)
    axes.set_xlim(min(means.values()) - 1, max(means.values()) + 0.5)
    axes.set_xlabel("top-1 in %, mean of 5 settings and 5 seeds (the axis does not start at 0)")
    axes.legend(loc="lower right")
    figure.savefig(sys.argv[2], dpi=130)


if __name__ == "__main__":
    main()
