"""Features of several parts side by side: their widths and weights, and what each part says of a class.

Shapes: N images, C classes, D features, P parts.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from timm_faim.metric import checked_count, checked_number, unit_vectors

if TYPE_CHECKING:
    from .head import FAIMHead


def checked_parts(in_features: int, parts: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """Widths of the parts, [in_features] where none are given, and their weights, of sum 1.

    Raises:
        TypeError, ValueError: widths whose sum is not ``in_features``, or weights that do not go with them.
    """
    widths = [checked_count("a width in parts", width) for width in parts] or [in_features]
    if sum(widths) != in_features:
        raise ValueError(f"parts={widths} have {sum(widths)} features together, and in_features is {in_features}")
    values = [checked_number("a weight in part_weights", weight) for weight in weights] or [1.0] * len(widths)
    if len(values) != len(widths) or not 0 < math.fsum(values) < math.inf:
        raise ValueError(f"part_weights must be one number >= 0 for each of the {len(widths)} parts and not all 0, got "
                         f"{values}")  # fmt: skip
    return widths, [value / math.fsum(values) for value in values]


@torch.no_grad()
def part_cosines(head: "FAIMHead", x_ND: Tensor) -> Tensor:
    """The cosine of each part's point with each prototype's [P, N, C]; Σ w_i cos_i is that of the whole where the
    prototypes' parts are as long as the weights say."""
    z, mu = (unit.split(head.parts, -1) for unit in (head.embed(x_ND), head.mu))
    return torch.stack([unit_vectors(a) @ unit_vectors(b).to(a).t() for a, b in zip(z, mu, strict=True)])
