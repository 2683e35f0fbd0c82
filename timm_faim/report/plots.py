"""Pictures of a run and of its evaluation, with matplotlib where it is installed.

Every `draw_*` writes one PNG file and returns whether it did: False without matplotlib, or with nothing to show.
"""

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_faim.report.names import short_name
from timm_faim.run.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from timm_faim.report.evaluation import Evaluation

BLUE, ORANGE, GREEN, RED, GREY = "#3465a4", "#e07b00", "#2e8b57", "#c0392b", "#888888"
MATRIX_CLASSES = 300  # a matrix of more classes than this has no readable cells
SHOWN_CLASSES = 50
# Fonts with East Asian characters, as systems bring them along.
WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
)
_RATE = re.compile(r"(?:train_)?lr(?:[_/.](.+))?$")


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """A figure of that size in inches; without pyplot: no window system, nothing to close."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: "Figure", path: Path, dpi: int = 100) -> None:
    """Write the PNG file, whole or not at all."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        if not text.get_text().isascii():
            text.set_fontfamily(_font_families())
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # scripts that no font has become boxes
        figure.savefig(temporary, format="png", dpi=dpi)


@cache
def _font_families() -> list[str]:
    """matplotlib's own font, and what is installed for the scripts that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]


def column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One number per row [E], NaN where it is missing or no number."""
    values = []
    for row in rows:
        try:
            values.append(float(row.get(key)))
        except (TypeError, ValueError):
            values.append(math.nan)
    return np.array(values)


def epochs_of(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Epochs done [E], 0 for the start: the column `epoch`, or the rows' places from 1."""
    given = column(rows, "epoch")
    return given if np.isfinite(given).all() else np.arange(1.0, len(rows) + 1)


def draw_learning_curve(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Loss, top-1 accuracy and learning rates over the epochs.

    Args:
        path: PNG file.
        rows: one mapping an epoch, as in summary.csv (values may be strings), of which these are used where present:
            epoch, train_loss, eval_loss, train_top1, eval_top1, eval_top5, and lr, lr_<part>,
            train_lr_<part> for the learning rates. Without top-1 the other eval_ columns take its place.
    """
    if not has_matplotlib() or not rows:
        return False
    parts = {match.group(1) or "all parameters": key for key in _keys(rows) if (match := _RATE.match(key))}
    rates = {part: values for part, key in parts.items() if np.isfinite(values := column(rows, key)).any()}
    if len(rates) > 1:
        rates.pop("all parameters", None)  # the mean over parts says nothing beside them
    figure = new_figure(12.6 if rates else 8.8, 3.6)
    axes = figure.subplots(1, 3 if rates else 2)
    epochs = epochs_of(rows)
    for ax, key, label in zip(axes, ("loss", "top1"), ("loss", "top-1 accuracy in %"), strict=False):
        _line(ax, epochs, column(rows, f"train_{key}"), "training (augmented)", BLUE)
        _line(ax, epochs, column(rows, f"eval_{key}"), "validation", ORANGE)
        ax.set_ylabel(label)
    _line(axes[1], epochs, column(rows, "eval_top5"), "validation, top-5", ORANGE, alpha=0.45, linestyle="--")
    top1 = column(rows, "eval_top1")
    if np.isfinite(top1).any():
        best = int(np.nanargmax(top1))
        axes[1].plot(
            epochs[best],
            top1[best],
            "o",
            color=RED,
            markersize=7,
            fillstyle="none",
            markeredgewidth=1.6,
            label=f"best: {top1[best]:.2f} % (epoch {epochs[best]:.0f})",
        )
    elif not np.isfinite(column(rows, "train_top1")).any():  # several labels an image: other metrics
        axes[1].set_ylabel("validation metrics in %")
        names = [key for key in _keys(rows) if key.startswith("eval_") and key not in ("eval_loss", "eval_samples")]
        for number, key in enumerate(names):
            _line(axes[1], epochs, column(rows, key), key.removeprefix("eval_"), f"C{number}")
    if rates:
        _draw_rates(axes[2], epochs, rates)
    for ax in axes:
        finish_epoch_axes(ax, epochs)
    save_figure(figure, path)
    return True


def _draw_rates(ax: "Axes", epochs: np.ndarray, rates: Mapping[str, np.ndarray]) -> None:
    """A line per part of the model; on a log axis where their peaks lie far apart."""
    peaks = [peak for values in rates.values() if (peak := np.nanmax(values)) > 0]
    log = len(peaks) > 1 and max(peaks) > 20 * min(peaks)
    for number, (part, values) in enumerate(rates.items()):
        _line(
            ax, epochs, np.where(values > 0, values, math.nan) if log else values, short_name([part], 0), f"C{number}"
        )
    ax.set_yscale("log" if log else "linear")
    ax.set_ylabel("learning rate" if len(rates) > 1 else "learning rate (mean over parameters)")


def finish_epoch_axes(ax: "Axes", epochs: np.ndarray) -> None:
    """Whole epochs on the x axis, a grid, and a legend where there are lines."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlim(epochs.min() - 0.5, epochs.max() + 0.5)
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)
    if len(ax.get_lines()) > 1:
        ax.legend(fontsize=8)


def draw_confusion(path: Path, evaluation: "Evaluation", label_names: Sequence[str] | None = None) -> bool:
    """The confusion matrix, rows in per cent of the class's images; of more than 300 classes the 50 most confused."""
    if not has_matplotlib() or not len(evaluation.index):
        return False
    from matplotlib.colors import PowerNorm

    classes = shown_classes(evaluation)
    counts = evaluation.confusion(classes)
    percent = 100 * counts / evaluation.samples_per_class[classes].clip(1)[:, None]
    K = len(classes)
    size = min(9.0, max(5.0, 3.2 + 0.16 * K))
    figure = new_figure(size + 0.8, size)
    ax = figure.subplots()
    # the root makes single confusions visible beside a full diagonal
    image = ax.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest", aspect="equal")
    figure.colorbar(image, ax=ax, shrink=0.8, label="% of the images of the true class")
    if K <= SHOWN_CLASSES:
        names = [short_name(label_names, k, 18) for k in classes]
        ax.set_xticks(range(K), names, rotation=90, fontsize=8 if K <= 30 else 6.5)
        ax.set_yticks(range(K), names, fontsize=8 if K <= 30 else 6.5)
    if K <= 15:
        for i, j in np.argwhere(counts):
            ax.text(
                j,
                i,
                counts[i, j],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if percent[i, j] > 40 else "black",
            )
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    C = evaluation.num_classes
    title = f"confusion of {K} classes" if K == C else f"the {K} most confused of {C} classes"
    ax.set_title(f"{title}, {len(evaluation.index)} images", fontsize=10)
    save_figure(figure, path)
    return True


def shown_classes(evaluation: "Evaluation") -> list[int]:
    """All classes where a matrix of them can be read; otherwise those of the most confused pairs, pairs together."""
    if evaluation.num_classes <= MATRIX_CLASSES:
        return list(range(evaluation.num_classes))
    classes: dict[int, None] = {}
    for pair in evaluation.most_confused(SHOWN_CLASSES):
        classes.update(dict.fromkeys((pair.a, pair.b)))
    return (list(classes) or np.flatnonzero(evaluation.samples_per_class).tolist())[:SHOWN_CLASSES]


def draw_calibration(path: Path, evaluation: "Evaluation", _label_names: Sequence[str] | None = None) -> bool:
    """Reliability diagram: accuracy against confidence in equal bins, and how many images each bin holds."""
    if not has_matplotlib() or not len(evaluation.index):
        return False
    counts, confidence, accuracy = evaluation.calibration()
    bins, filled = len(counts), counts > 0
    edges = np.arange(bins) / bins
    figure = new_figure(5.6, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(
        edges[filled],
        np.minimum(accuracy, confidence)[filled],
        width=1 / bins,
        align="edge",
        color=BLUE,
        edgecolor="white",
        alpha=0.75,
    )
    gap = accuracy - confidence
    for chosen, bottom, color, label in (
        (filled & (gap > 0), confidence, GREEN, "more often right than sure"),
        (filled & (gap < 0), accuracy, RED, "more sure than right"),
    ):
        if chosen.any():
            above.bar(
                edges[chosen],
                abs(gap[chosen]),
                bottom=bottom[chosen],
                width=1 / bins,
                align="edge",
                color=color,
                alpha=0.35,
                edgecolor=color,
                hatch="//",
                label=label,
            )
    above.hlines(
        accuracy[filled], edges[filled], edges[filled] + 1 / bins, color="black", linewidth=2, label="accuracy"
    )
    above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1.02)
    above.set_title(
        f"expected calibration error {evaluation.ece():.2f} %\nmean confidence "
        f"{100 * float(evaluation.confidence.mean()):.1f} %, accuracy "
        f"{100 * float(evaluation.correct.mean()):.1f} %",
        fontsize=10,
    )
    below.bar(edges, counts, width=1 / bins, align="edge", color=GREY, edgecolor="white")
    below.set_xlim(0, 1)
    below.set_xlabel("confidence (largest softmax probability)")
    below.set_ylabel("images")
    for ax in (above, below):
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)
    return True


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row if isinstance(key, str)))


def _line(ax: "Axes", x: np.ndarray, y: np.ndarray, label: str, color: str, **style: Any) -> None:
    known = np.isfinite(y)  # not every epoch need have a validation
    if known.any():
        ax.plot(x[known], y[known], marker="." if known.sum() <= 60 else None, label=label, color=color, **style)


def say(ax: "Axes", text: str) -> None:
    """A text in the middle of axes without a plot."""
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, fontsize=9, color=GREY)
