"""The distances that are compared: that of a FAIM head, Euclidean and cosine, all in float64.

Shapes: B queries, N gallery images, D features.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from timm_faim import FAIMHead

from .search import Between


@dataclass(frozen=True)
class Distance:
    """A distance of features: ``between`` (points [B, D], points [N, D]) -> [B, N], of points ``embed`` (features).

    ``project`` brings a mean of points back among them; of a point it is the point itself (up to rounding).
    """

    name: str
    embed: Callable[[Tensor], Tensor]
    between: Between
    project: Callable[[Tensor], Tensor]


def distances_of(head: FAIMHead, device: torch.device) -> list[Distance]:
    """FAIM, Euclidean and cosine distance of a head's input features [.., D] in float64 on ``device``.

    FAIM is ``head.metric`` on ``head.embed(x)``, with the query as the first point: d_F(query, gallery) =
    F(query - gallery), a direction that matters for a Randers metric.
    """
    exact = copy.deepcopy(head).to(device, torch.float64).requires_grad_(False)
    unit = partial(normalize, dim=-1)
    return [
        Distance("FAIM", exact.embed, exact.metric, exact.project),
        Distance("Euclidean", lambda x: x, euclidean, lambda x: x),
        Distance("cosine", unit, cosine, unit),
    ]


def euclidean(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """|x - y| [B, N]; exactly 0 where the two differ by no more than the rounding of the product."""
    xx_B1, yy_N = x_BD.square().sum(-1, keepdim=True), y_ND.square().sum(-1)
    scale_BN = xx_B1 + yy_N
    q_BN = torch.addmm(scale_BN, x_BD, y_ND.t(), alpha=-2.0)
    return torch.where(q_BN > 64 * torch.finfo(q_BN.dtype).eps * scale_BN, q_BN, 0.0).sqrt()


def cosine(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    """1 - x·y [B, N] of unit vectors, in float32 after the product, so that a vector is at 0 from its copies."""
    return 1.0 - (x_BD @ y_ND.t()).float()
