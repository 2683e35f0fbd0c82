"""What the chart of a FAIM block does in two dimensions, for a symmetric and a Randers metric.

    python benchmarks/draw_chart.py docs/chart.png

Columns: the unit ball of F; points around p; their coordinates log_p(x); the points after a rotation of these.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from timm_faim import FAIMMetric, exp_map, log_map

ANGLE = 40.0  # degrees, of the rotation W in the last column
RADII = (1.0, 2.0, 3.0)
HALF, STEP = 3.0, 0.75  # of the grid
BASE = torch.tensor([0.6, 0.4], dtype=torch.float64)
VERTICAL, HORIZONTAL = "#4c78a8", "#54a24b"  # lines x₁ = const, x₂ = const
CIRCLE, FORM, AFFINE = "#d1495b", "#7b4bb7", "#b5b5b5"
PATCH = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}  # behind text
Map = Callable[[Tensor], Tensor]


def make_metric(symmetric: bool) -> FAIMMetric:
    """Σ^½ of eigenvalues 0.8 and 1.4, turned by 25 degrees; β oblique to its axes; λ = 0.8, Randers 0.5."""
    metric = FAIMMetric(2, full_sigma=True, symmetric=symmetric, lambda_init=0.8 if symmetric else 0.5).double()
    axes = rotation(25.0)
    sigma = axes @ torch.diag(torch.tensor([0.8, 1.4], dtype=torch.float64).square()) @ axes.t()
    with torch.no_grad():
        metric.L.copy_(torch.linalg.cholesky(sigma))
        metric.beta.copy_(torch.tensor([0.78, -0.12]))
    return metric


def rotation(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def circle(radius: float = 1.0) -> Tensor:
    angle = torch.linspace(0.0, 2.0 * math.pi, 1441, dtype=torch.float64)
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


def grid() -> list[tuple[str, Tensor]]:
    """Lines of a regular grid around p, each with its colour."""
    along = torch.linspace(-HALF, HALF, 601, dtype=torch.float64)
    lines = []
    for at in torch.arange(-HALF, HALF + STEP / 2, STEP, dtype=torch.float64):
        lines.append((VERTICAL, BASE + torch.stack([at.expand_as(along), along], -1)))
        lines.append((HORIZONTAL, BASE + torch.stack([along, at.expand_as(along)], -1)))
    return lines


def line(ax: Axes, points: Tensor, **style: Any) -> None:
    ax.plot(*points.t().numpy(), **style)


def draw_grid(ax: Axes, through: Map) -> None:
    for colour, points in grid():
        line(ax, through(points), color=colour, lw=0.8, alpha=0.75)


def draw_circles(ax: Axes, through: Map) -> None:
    """Images of the circles |w| = 1, 2, 3 of the tangent space."""
    for radius in RADII:
        line(ax, through(circle(radius)), color=CIRCLE, lw=1.6)


def arrow(ax: Axes, tip: Tensor, colour: str) -> None:
    ax.annotate("", tip.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0})


def draw_indicatrix(ax: Axes, metric: FAIMMetric) -> None:
    """{F(v) = 1}, the ellipse {v'Σv = 1}, the 1-form β and its kernel."""
    directions = circle()
    unit = directions / metric.norm(directions).unsqueeze(-1)
    ellipse = directions / (directions @ metric.sigma() * directions).sum(-1, keepdim=True).sqrt()
    _, _, beta, _ = metric.tensors(torch.float64)
    kernel = torch.stack([-beta[1], beta[0]]) / beta.norm()
    line(ax, torch.stack([-3 * kernel, 3 * kernel]), color=FORM, lw=1.0, ls=(0, (4, 3)))
    line(ax, ellipse, color="#666666", lw=1.3, ls=(0, (1, 1.2)))
    ax.fill(*unit.t().numpy(), color=CIRCLE, alpha=0.10, lw=0)
    line(ax, unit, color=CIRCLE, lw=2.0)
    arrow(ax, beta, FORM)
    ax.text(beta[0] + 0.06, beta[1] + 0.04, r"$\beta$", color=FORM, fontsize=13)
    ax.plot(0, 0, "o", color="black", ms=3.5)


def draw_row(row: list[Axes], metric: FAIMMetric) -> None:
    turn = rotation(ANGLE)

    def log(x: Tensor) -> Tensor:
        return log_map(x, BASE, metric)

    def exp(w: Tensor) -> Tensor:
        return exp_map(w, BASE, metric)

    draw_indicatrix(row[0], metric)
    draw_grid(row[1], lambda x: x)
    draw_circles(row[1], exp)
    draw_grid(row[2], log)
    draw_circles(row[2], lambda w: w)
    for radius in RADII:
        row[2].text(0.0, -radius, f"{radius:.0f}", color=CIRCLE, fontsize=10, ha="center", va="center", bbox=PATCH)
    for _, points in grid():
        line(row[3], BASE + (points - BASE) @ turn.t(), color=AFFINE, lw=0.7)
    draw_grid(row[3], lambda x: exp(log(x) @ turn.t()))
    draw_circles(row[3], exp)
    for ax, centre in zip(row[1:], (BASE, torch.zeros(2), BASE), strict=True):
        ax.plot(*centre.tolist(), "o", color="black", ms=4)
        name = "$p$" if centre is BASE else "$0$"
        ax.annotate(name, centre.tolist(), (4, 4), textcoords="offset points", fontsize=12, bbox=PATCH)


def draw() -> plt.Figure:
    figure, axes = plt.subplots(2, 4, figsize=(14, 7.6), layout="constrained")
    titles = [
        r"indicatrix $\{F(v)=1\}$",
        r"circles $d_F(x,p)=1,2,3$, a grid",
        r"after $\log_p$: $|w|=d_F(x,p)$",
        rf"$\exp_p(W\,\log_p(x))$, $W$: turn by {ANGLE:.0f}°",
    ]
    names = [
        "symmetric\n" r"$F(v)=\sqrt{v^\top\Sigma v}+\lambda\,|\beta^\top v|$",
        "Randers\n" r"$F(v)=\sqrt{v^\top\Sigma v}+\lambda\,\beta^\top v$",
    ]
    with torch.no_grad():
        for row, name, symmetric in zip(axes, names, (True, False), strict=True):
            draw_row(list(row), make_metric(symmetric))
            row[0].set_ylabel(name, fontsize=13, labelpad=10)
    spaces = ("v", "x", "w", "x")
    limits = (1.75, 3.7, 5.9, 4.9)
    for row in axes:
        for ax, space, limit in zip(row, spaces, limits, strict=True):
            x, y = BASE.tolist() if space == "x" else (0.0, 0.0)
            ax.set(aspect="equal", xlim=(x - limit, x + limit), ylim=(y - limit, y + limit), xticks=[], yticks=[])
            ax.text(0.03, 0.97, f"${space}$-space", transform=ax.transAxes, fontsize=11, va="top",
                    bbox=PATCH)  # fmt: skip
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=13, pad=8)
    handles = [
        Line2D([], [], color=CIRCLE, lw=2, label="indicatrix, geodesic circles"),
        Line2D([], [], color="#666666", lw=1.3, ls=(0, (1, 1.2)), label=r"ellipse $v^\top\Sigma v=1$"),
        Line2D([], [], color=FORM, lw=1.2, ls=(0, (4, 3)), label=r"$\beta^\top v=0$"),
        Line2D([], [], color=VERTICAL, label="$x_1$ = const"),
        Line2D([], [], color=HORIZONTAL, label="$x_2$ = const"),
        Line2D([], [], color=AFFINE, lw=1.5, label=r"with $x-p$ and $p+v$ instead: affine"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=12)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="of the picture, for example docs/chart.png")
    draw().savefig(parser.parse_args().path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
