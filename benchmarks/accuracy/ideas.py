"""Ideas for Σ and for the Finsler part, each alone, in closed form on frozen features.

    python benchmarks/accuracy/ideas.py --weights FILE --data NAME=DIR ... [--output FILE]

Everything is compared with the indicatrix head of the default recipe (Σ = within-class precision, shrinkage 0.3, λ = 0)
on the same cuts and views; nothing is chosen, every value tried stands in the table. One-forms act on differences of
points projected onto the indicatrix of Σ; their directions are orthonormal in its frame.

Shapes: B images, C classes, D features, K one-forms.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from closed_form import Support
from features import cut, data_arguments, frozen_features, named_folders
from frozen import images_with_views
from sklearn.covariance import ledoit_wolf_shrinkage
from tables import interval
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from machine import headline

Points = tuple[Tensor, Tensor]  # images [B, D] and class means [C, D] in the frame, not yet projected


def frame(support: Support, x: Tensor, root_D: Tensor) -> Points:
    """Σ^½ (x - c) and Σ^½ (m - c) in the eigenbasis of the within-class covariance."""
    return ((x - support.centre_D) @ support.V_DD) * root_D, support.rotated_means_CD * root_D


def spherical(points: Points) -> Tensor:
    """d_F with λ = 0 [B, C]."""
    return torch.cdist(*(F.normalize(p, dim=1) for p in points))


def ledoit_wolf(support: Support, x: Tensor) -> Tensor:
    """Shrinkage of Ledoit & Wolf (2004) of the within-class residuals."""
    shrinkage = float(ledoit_wolf_shrinkage(support.residuals.numpy(), assume_centered=True))
    return spherical(frame(support, x, support.root(shrinkage)))


def diagonal(support: Support, x: Tensor) -> Tensor:
    """Diagonal Σ: the inverse shrunk within-class variance of each feature."""
    variance_D = support.residuals.square().mean(0)
    root_D = (0.7 * variance_D + 0.3 * variance_D.mean()).rsqrt()
    return spherical(((x - support.centre_D) * root_D, (support.means_CD - support.centre_D) * root_D))


def low_rank(support: Support, x: Tensor, rank: int) -> Tensor:
    """Σ = multiple of the identity but for the ``rank`` directions of the most within-class variance."""
    root_D = support.root(0.3).clone()
    root_D[: len(root_D) - rank] = support.root(1.0)[0] * (1.0 / 0.3) ** 0.5  # ascending; unshrunk variance 0
    return spherical(frame(support, x, root_D))


def images_only(support: Support, x: Tensor) -> Tensor:
    """Images are projected onto the indicatrix, prototypes keep their length relative to the mean one."""
    z_BD, m_CD = frame(support, x, support.root(0.3))
    return torch.cdist(F.normalize(z_BD, dim=1), m_CD / m_CD.norm(dim=1).mean())


def one_forms(support: Support, x: Tensor, weight: float, count: int, kind: str) -> Tensor:
    """|v| + λ/√K Σ_k |b_k'v|, b_k the leading between-class directions, random ones, or Randers: λ b'v."""
    points = frame(support, x, support.root(0.3))
    z_BD, m_CD = (F.normalize(p, dim=1) for p in points)
    if kind == "random":
        b_DK = torch.linalg.qr(torch.randn(z_BD.shape[1], count, generator=torch.Generator().manual_seed(0)))[0]
    else:
        b_DK = torch.linalg.svd(points[1] * support.root_share_C1, full_matrices=False).Vh[:count].t()
    if kind == "randers":
        extra_BC = (z_BD @ b_DK)[:, None, 0] - (m_CD @ b_DK)[:, 0]
    else:
        extra_BC = torch.cdist(z_BD @ b_DK, m_CD @ b_DK, p=1.0) / count**0.5
    return torch.cdist(z_BD, m_CD) + weight * extra_BC


def polyhedral(support: Support, x: Tensor, weight: float) -> Tensor:
    """|v|₂ + λ |v|₁ / √D in the eigenbasis: as many one-forms as features."""
    points = [F.normalize(p, dim=1) for p in frame(support, x, support.root(0.3))]
    return torch.cdist(*points) + weight * torch.cdist(*points, p=1.0) / points[0].shape[1] ** 0.5


def own_direction(support: Support, x: Tensor, weight: float) -> Tensor:
    """|v| + λ |m̂_k'v|: the one-form of each class along its own prototype."""
    z_BD, m_CD = (F.normalize(p, dim=1) for p in frame(support, x, support.root(0.3)))
    return torch.cdist(z_BD, m_CD) + weight * (z_BD @ m_CD.t() - 1.0).abs()


IDEAS: dict[str, Callable[[Support, Tensor], Tensor]] = {
    "Σ = I": lambda s, x: spherical(frame(s, x, s.root(1.0))),
    "Σ diagonal": diagonal,
    **{f"Σ low rank ({r}) + multiple of I": partial(low_rank, rank=r) for r in (16, 64, 256)},
    **{f"Σ shrunk by {a}": (lambda s, x, a=a: spherical(frame(s, x, s.root(a)))) for a in (0.03, 0.1, 0.6)},
    "Σ shrunk by Ledoit-Wolf": ledoit_wolf,
    "prototypes not projected": images_only,
    **{
        f"one-forms: {k} leading, λ {w}": partial(one_forms, weight=w, count=k, kind="leading")
        for k in (1, 4, 16, 64)
        for w in (0.1, 0.3)
    },
    **{f"one-forms: 16 random, λ {w}": partial(one_forms, weight=w, count=16, kind="random") for w in (0.1, 0.3)},
    **{f"Randers, leading direction, λ {w}": partial(one_forms, weight=w, count=1, kind="randers") for w in (0.1, 0.3)},
    **{f"polyhedral, λ {w}": partial(polyhedral, weight=w) for w in (0.3, 1.0, 3.0)},
    **{f"one-form along each prototype, λ {w}": partial(own_direction, weight=w) for w in (0.1, 0.3)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ideas.md")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    gaps: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for name, folder in named_folders(args.data).items():
        data = frozen_features(name, folder, args.weights, args.cache, args.views)
        features = images_with_views(data, True)
        for shots in (1, 3, 5, None):
            for seed in range(1 if shots is None else args.seeds):
                index = cut(data.train_N, shots, seed)
                support = Support(features[:, index], data.train_N[index], int(data.train_N.max()) + 1)

                def top1(distance_BC: Tensor) -> float:
                    return 100.0 * (distance_BC.argmin(1) == data.val_N).double().mean().item()  # noqa: B023

                base = top1(spherical(frame(support, data.val_ND, support.root(0.3))))
                for idea, distance in IDEAS.items():
                    gaps[idea][name, shots].append(top1(distance(support, data.val_ND)) - base)
            print(f"{name} {shots or 'all'} done", flush=True)
    command = "python benchmarks/accuracy/ideas.py --weights FILE --data NAME=DIR …"
    lines = [
        "# Ideas, each alone, against Σ with shrinkage 0.3 and λ = 0",
        "",
        headline(command, cuda=False),
        "",
        f"Points of top-1 on frozen features, views as training images; {args.seeds} cuts of 1, 3, 5 images a "
        "class and all images; 95 % t-interval over data sets and shots.",
        "",
        "| idea | " + " | ".join(name for name in sorted({key[0] for key in gaps["Σ = I"]})) + " | mean |",
    ]
    names = sorted({key[0] for key in gaps["Σ = I"]})
    lines.append("|---" + "|---:" * (len(names) + 1) + "|")
    for idea, settings in gaps.items():
        means = {key: statistics.mean(values) for key, values in settings.items()}
        cells = [f"{statistics.mean(v for (n, _), v in means.items() if n == name):+.2f}" for name in names]
        lines.append(f"| {idea} | {' | '.join(cells)} | {interval(list(means.values()))} |")
    page = "\n".join(lines) + "\n"
    print(page)
    args.output.write_text(page)


if __name__ == "__main__":
    main()
