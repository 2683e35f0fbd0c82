"""Pictures of validation images beside typical images of the classes that a head took them for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from timm_faim.images.pictures import Pictures
from timm_faim.report import plots
from timm_faim.report.distances import HeadDistances
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.names import short_name
from timm_faim.report.plots import BLUE, GREEN, GREY, ORANGE, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = 8
TYPICAL = 3  # training images shown for a prototype
CELL = 1.08  # width of an image and the gap beside it
POOL_LIMIT = 2000  # training images embedded at most
POOL_PER_CLASS = 64


@dataclass(frozen=True)
class Neighbours:
    """Training images of one class, nearest to its prototype first: data-set indices and distances."""

    indices: np.ndarray
    distances: np.ndarray


def choose_examples(evaluation: Evaluation, count: int = EXAMPLES) -> np.ndarray:
    """Positions in the evaluation of images worth a look, always the same ones.

    Three eighths the surest right, two eighths the least sure right, three eighths the surest wrong predictions; where
    one kind runs out the others fill up. Of each kind first one image per class.
    """
    order = np.lexsort((evaluation.index, -evaluation.confidence))
    right, wrong = order[evaluation.correct[order]], order[~evaluation.correct[order]]
    wrong = _one_per_class_first(wrong, evaluation.target)
    wanted_wrong = min(len(wrong), max(3 * count // 8, count - len(right)))
    surest = _one_per_class_first(right, evaluation.target)[: min(len(right), 3 * count // 8)]
    rest = right[~np.isin(right, surest)][::-1]
    unsure = _one_per_class_first(rest, evaluation.target)[: max(0, count - wanted_wrong - len(surest))]
    return np.concatenate([surest, unsure, wrong[:wanted_wrong]]).astype(np.int64)[:count]


def _one_per_class_first(positions: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The same positions, the first of each class before all others."""
    _, first = np.unique(target[positions], return_index=True)
    later = np.ones(len(positions), dtype=bool)
    later[first] = False
    return np.concatenate([positions[np.sort(first)], positions[later]])


def choose_pool(targets: np.ndarray | None, size: int, classes: Sequence[int]) -> np.ndarray:
    """Indices of the training images to embed: up to 64 of each class that is shown, 2,000 in all, evenly spread.

    Without known `targets` [N], 2,000 of all `size` images.
    """
    if targets is None:
        return np.unique(np.linspace(0, size - 1, min(size, POOL_LIMIT)).round().astype(np.int64))
    each = max(1, min(POOL_PER_CLASS, POOL_LIMIT // max(1, len(classes))))
    chosen = []
    for k in classes:
        own = np.flatnonzero(targets == k)
        if len(own):
            chosen.append(own[np.unique(np.linspace(0, len(own) - 1, min(len(own), each)).round().astype(np.int64))])
    return np.concatenate(chosen)[:POOL_LIMIT] if chosen else np.empty(0, dtype=np.int64)


def typical_images(
    distances: HeadDistances,
    features: torch.Tensor | None,
    pool: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[int],
) -> dict[int, Neighbours]:
    """Of each class its training images nearest to the prototype by d_F.

    Args:
        distances: of the head.
        features: of the pool's images [P, D]; None where it is empty.
        pool: their data-set indices [P].
        labels: their classes [P].
        classes: the classes wanted.
    """
    found = {}
    for k in classes:
        own = np.flatnonzero(labels == k)
        if not len(own):
            found[k] = Neighbours(own, np.empty(0))
            continue
        d = sum(distances.parts(features[own], torch.full((len(own),), k))).numpy()
        nearest = np.argsort(d, kind="stable")[:TYPICAL]
        found[k] = Neighbours(pool[own[nearest]], d[nearest])
    return found


@dataclass(frozen=True)
class Examples:
    """Validation images to be shown: positions in the evaluation [M], the head's features of them [M, D], and the
    class [M] to compare the prediction with: the true one where it is wrong, otherwise the head's second choice.
    """

    positions: np.ndarray
    features: torch.Tensor
    rivals: np.ndarray

    @classmethod
    def of(
        cls, positions: np.ndarray, features: torch.Tensor, distances: HeadDistances, evaluation: Evaluation
    ) -> "Examples":
        """Find the rivals; a single class is its own rival."""
        logits = distances.logits(features)
        predicted, target = evaluation.prediction[positions], evaluation.target[positions]
        if logits.shape[1] > 1:
            logits[torch.arange(len(logits)), torch.from_numpy(predicted)] = -torch.inf
        return cls(positions, features, np.where(predicted == target, logits.argmax(1).numpy(), target))


def draw_examples(
    path: Path,
    examples: Examples,
    evaluation: Evaluation,
    distances: HeadDistances,
    typical: Mapping[int, Neighbours],
    train: Pictures,
    val: Pictures,
    label_names: Sequence[str] | None,
) -> bool:
    """One row per validation image: the image, typical training images of the predicted class and of its rival, and
    the distances to both prototypes, of a head with a 1-form with their two parts.

    Args:
        path: PNG file.
        examples: the images.
        evaluation: predictions of the validation images.
        distances: of the head.
        typical: of `typical_images`, for the predicted classes and the rivals.
        train, val: where the pictures are.
        label_names: class names in the order of their indices.
    """
    if not plots.has_matplotlib() or not len(examples.positions):
        return False
    predicted, target = (classes[examples.positions] for classes in (evaluation.prediction, evaluation.target))
    parts = [distances.parts(examples.features, torch.from_numpy(classes)) for classes in (predicted, examples.rivals)]
    longest = max(float(torch.maximum(r, r + f).max()) for r, f in parts)

    columns = 1 + 2 * TYPICAL
    width, height = 1.25 * columns + 3.6, 1.6 * len(predicted) + 0.5
    figure = plots.new_figure(width, height, layout=None)
    grid = figure.add_gridspec(
        len(predicted),
        3,
        width_ratios=[columns, 0.45, 2.3],
        left=0.1 / width,
        right=1 - 0.1 / width,
        top=1 - 0.6 / height,
        bottom=0.25 / height,
        wspace=0,
        hspace=0.32,
    )
    for row, position in enumerate(examples.positions):
        k, y, rival = int(predicted[row]), int(target[row]), int(examples.rivals[row])
        right = k == y
        # one axes for a row of images, each one unit wide: many axes are slow
        ax = figure.add_subplot(grid[row, 0])
        _place(ax, val[evaluation.index[position]], 0, GREEN if right else RED)
        ax.text(0, 1.05, short_name(label_names, y, 17), fontsize=7.5)
        sides = [(k, "predicted", GREEN if right else RED)]
        if rival != k:
            sides.append((rival, "next" if right else "true", GREY if right else BLUE))
        for side, (c, word, color) in enumerate(sides):
            left = CELL * (1 + side * TYPICAL)
            ax.text(left, 1.05, f"{word}: {short_name(label_names, c, 32)}", fontsize=8, color=color)
            for n, (index, d) in enumerate(zip(typical[c].indices, typical[c].distances, strict=True)):
                _place(ax, train[index], left + CELL * n, GREY)
                ax.text(left + CELL * n + 0.5, -0.03, f"{d:#.3g}", fontsize=7, ha="center", va="top")
            if not len(typical[c].indices):
                ax.text(left, 0.5, "no training image", fontsize=8, color=GREY)
        ax.set(xlim=(-0.02, CELL * columns), ylim=(-0.02, 1.02), aspect="equal", anchor="W")
        ax.axis("off")
        bars = figure.add_subplot(grid[row, 2])
        _draw_bars(
            bars,
            [(word, float(r[row]), float(f[row])) for (_, word, _), (r, f) in zip(sides, parts, strict=False)],
            longest,
        )
        bars.set_title(
            f"{'right' if right else 'wrong'}, {100 * evaluation.confidence[position]:.1f} % sure",
            fontsize=8,
            loc="left",
        )
    if distances.geometry().has_one_form:
        handles = [_swatch(BLUE, "Riemannian part √(vᵀΣv + ε)"), _swatch(ORANGE, "1-form part")]
        figure.legend(handles=handles, loc="upper right", ncols=2, fontsize=8, frameon=False)
    plots.save_figure(figure, path)
    return True


def draw_pairs(
    path: Path, evaluation: Evaluation, val: Pictures, label_names: Sequence[str] | None, count: int = 8
) -> bool:
    """The most confused pairs of classes, an image of each side by side: one that was taken for the other class where
    there is one, otherwise the class's surest.
    """
    pairs = evaluation.most_confused(count)
    if not plots.has_matplotlib() or not pairs:
        return False
    across = min(2, len(pairs))
    down = -(-len(pairs) // across)
    width, height = 4.6 * across, 2.3 * down
    figure = plots.new_figure(width, height, layout=None)
    grid = figure.add_gridspec(
        down,
        3 * across,
        width_ratios=[1, 1, 0.15] * across,
        left=0.02,
        right=0.98,
        top=1 - 0.35 / height,
        bottom=0.3 / height,
        wspace=0.1,
        hspace=0.32,
    )  # every third column is the gap between pairs
    for number, pair in enumerate(pairs):
        for side, (a, b, times) in enumerate(((pair.a, pair.b, pair.a_as_b), (pair.b, pair.a, pair.b_as_a))):
            ax = figure.add_subplot(grid[number // across, 3 * (number % across) + side])
            own = np.flatnonzero(evaluation.target == a)
            ax.set_title(short_name(label_names, a, 24), fontsize=9)
            ax.set_xlabel(f"{times} of {len(own)} taken for the other", fontsize=8)
            if not len(own):
                ax.set_xticks([])
                ax.set_yticks([])
                plots.say(ax, "no validation image")
                continue
            mistaken = own[evaluation.prediction[own] == b]
            among = mistaken if len(mistaken) else own
            best = among[np.argmax(evaluation.confidence[among])]
            _show(ax, val[evaluation.index[best]], RED if len(mistaken) else GREY)
    plots.save_figure(figure, path)
    return True


def _show(ax: "Axes", image: np.ndarray, frame: str) -> None:
    ax.imshow(image, cmap="gray", vmin=0, vmax=255)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(color=frame, linewidth=1.5)


def _place(ax: "Axes", image: np.ndarray, left: float, frame: str) -> None:
    """The image at x = left, its longer side one unit."""
    from matplotlib.patches import Rectangle

    h, w = (side / max(image.shape[:2]) for side in image.shape[:2])
    ax.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(left, left + w, 0, h))
    ax.add_patch(Rectangle((left, 0), w, h, fill=False, edgecolor=frame, linewidth=1.5, clip_on=False))


def _draw_bars(ax: "Axes", bars: Sequence[tuple[str, float, float]], longest: float) -> None:
    """Stacked horizontal bars (name, Riemannian part, 1-form part); a negative 1-form eats into the first part."""
    for place, (_, riemannian, form) in enumerate(bars):
        total = riemannian + form
        ax.barh(place, min(riemannian, total), color=BLUE, height=0.6)
        ax.barh(
            place,
            abs(form),
            left=min(riemannian, total),
            height=0.6,
            color=ORANGE,
            **({"fill": False, "edgecolor": ORANGE, "hatch": "////"} if form < 0 else {}),
        )
        parts = f" = {riemannian:#.3g} {'-' if form < 0 else '+'} {abs(form):.2g}" if form else ""
        ax.text(max(total, riemannian) + 0.02 * longest, place, f"{total:#.3g}{parts}", va="center", fontsize=7)
    ax.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=8)
    ax.set_ylim(1.5, -0.5)
    ax.set_xlim(0, 1.75 * longest)
    ax.set_xticks([])
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)


def _swatch(color: str, label: str):
    from matplotlib.patches import Patch

    return Patch(color=color, label=label)
