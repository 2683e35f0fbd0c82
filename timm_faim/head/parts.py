"""What each part of a head's features says of the classes.

Shapes: N images, C classes, D features, P parts.
"""

import torch
from torch import Tensor

from timm_faim.metric import unit_vectors

from .head import FAIMHead


@torch.no_grad()
def part_cosines(head: FAIMHead, x_ND: Tensor) -> Tensor:
    """The cosine of each part's point with each prototype's [P, N, C]; Σ w_i cos_i is that of the whole where the
    prototypes' parts are as long as the weights say."""
    return point_cosines(head, head.embed(x_ND))


@torch.no_grad()
def point_cosines(head: FAIMHead, z_ND: Tensor) -> Tensor:
    """:func:`part_cosines` [P, N, C] of features that are points already, as ``head.embed`` gives them."""
    z, mu = (unit.split(head.parts, -1) for unit in (z_ND, head.mu))
    return torch.stack([unit_vectors(a) @ unit_vectors(b).to(a).t() for a, b in zip(z, mu, strict=True)])
