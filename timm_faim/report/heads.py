"""Pictures of what a FAIM head has learned: γ, Σ and the 1-form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from timm_faim.report import plots
from timm_faim.report.distances import Geometry
from timm_faim.report.plots import BLUE, ORANGE, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_head(
    path: Path, geometry: Geometry, rows: Sequence[Mapping[str, Any]], suffix: str, shares: np.ndarray | None
) -> bool:
    """γ over the epochs and the spectrum of Σ; of a head with a 1-form also λ, |β| and its share in the distances.

    Args:
        path: PNG file.
        geometry: of `HeadDistances.geometry`.
        rows: epochs as in summary.csv; the columns train_lambda and train_gamma with `suffix` are used.
        suffix: what the columns of this head end in: empty for the only head of a model.
        shares: share of the 1-form in the distance to the predicted prototype [N], in per cent; None if unknown.
    """
    if not plots.has_matplotlib():
        return False
    figure = plots.new_figure(9.6, 6.4 if geometry.has_one_form else 3.2)
    (over_epochs, spectrum), *below = figure.subplots(2 if geometry.has_one_form else 1, 2, squeeze=False)
    _draw_scalars(over_epochs, geometry, rows, suffix)

    D = len(geometry.spectrum)
    places = np.arange(1, D + 1)
    spectrum.plot(places, geometry.spectrum.numpy(), color=BLUE, marker="." if D <= 60 else None)
    spectrum.set_yscale("log")
    spectrum.set_title(f"eigenvalues of Σ, sorted (largest / smallest {geometry.condition:.3g})", fontsize=10)
    spectrum.set_xlabel("direction")
    spectrum.grid(alpha=0.3)
    if below:
        _draw_one_form(*below[0], geometry, shares)
    plots.save_figure(figure, path)
    return True


def _draw_one_form(form: "Axes", share: "Axes", geometry: Geometry, shares: np.ndarray | None) -> None:
    D = len(geometry.spectrum)
    places = np.arange(1, D + 1)
    for values, label, color in (
        (geometry.beta, "|β| per coordinate", BLUE),
        (geometry.whitened, "|β| in units of Σ (|Σ$^{-1/2}$β|)", ORANGE),
    ):
        form.plot(places, values.numpy(), label=label, color=color, marker="." if D <= 60 else None)
    if geometry.beta.min() > 0:
        form.set_yscale("log")
    form.set_title(
        f"1-form, sorted;  sqrt(βᵀΣ⁻¹β) = {geometry.dual_norm:.3g},  λ sqrt(βᵀΣ⁻¹β) = {geometry.strongest:.3g}",
        fontsize=10,
    )
    form.set_xlabel("direction")
    form.legend(fontsize=8)
    form.grid(alpha=0.3)

    share.set_title("share of the 1-form in the distance", fontsize=10)
    if shares is None or not len(shares):
        plots.say(share, "no images to measure it on")
    else:
        low, high = min(0.0, float(shares.min())), max(1.0, float(shares.max()))
        share.hist(shares, bins=np.linspace(low, high, 31), color=BLUE, edgecolor="white")
        share.axvline(shares.mean(), color=RED, label=f"mean {shares.mean():.2f} %")
        share.set_xlabel("% of the distance to the predicted prototype")
        share.set_ylabel(f"validation images ({len(shares)})")
        share.legend(fontsize=8)
        share.grid(alpha=0.3)


def _draw_scalars(ax: "Axes", geometry: Geometry, rows: Sequence[Mapping[str, Any]], suffix: str) -> None:
    now = f"λ = {geometry.lmbda:.4g}, " * geometry.has_one_form + f"γ = {geometry.gamma:.4g}"
    ax.set_title(f"{'λ and ' * geometry.has_one_form}γ over the epochs (now {now})", fontsize=10)
    lmbda, gamma = (plots.column(rows, f"train_{name}{suffix}") for name in ("lambda", "gamma"))
    if not (np.isfinite(lmbda).any() and np.isfinite(gamma).any()):
        plots.say(ax, "no epochs recorded")
        return
    epochs = plots.epochs_of(rows)
    curves = [(ax, gamma, ORANGE, "γ (inverse temperature)")]
    if geometry.has_one_form:
        curves = [(ax, lmbda, BLUE, "λ (weight of the 1-form)"), (ax.twinx(), *curves[0][1:])]
    for axes, values, color, name in curves:
        known = np.isfinite(values)
        axes.plot(epochs[known], values[known], marker="." if known.sum() <= 60 else None, color=color)
        axes.set_ylabel(name, color=color)
        axes.tick_params(axis="y", labelcolor=color)
        axes.ticklabel_format(axis="y", useOffset=False)
    plots.finish_epoch_axes(ax, epochs)
