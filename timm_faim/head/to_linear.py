"""The linear layer that a FAIM head without 1-form is, to first order; in float64 on the CPU.

Shapes: N features, C classes, D features' width.
"""

import copy
import math

import torch
from torch import Tensor, nn

from .convert import checked_features
from .head import FAIMHead


@torch.no_grad()
def to_linear(head: FAIMHead, features: Tensor | None = None) -> nn.Linear:
    """The linear layer that classifies as a FAIM head without 1-form does, for deployment.

    A head without a prior keeps its argmax, and the whole order of the classes, exactly. The softmax, and with a prior
    the argmax, hold to first order around equal distances, for a feature of mean length; measure it with
    :func:`agreement`, and see :class:`FoldedHead` for exact logits. The layer's logits have mean zero over the
    classes at the origin.

    Args:
        head: a FAIM head with λ = 0.
        features: inputs [N, D] of the head, from which the distances are measured, in O(N·C) memory. Without, features
            are taken to have mean zero and unit variance per coordinate (in the head's frame, where it has one).

    Returns:
        ``nn.Linear(D, C)`` on the head's device, in its dtype.

    Raises:
        ValueError: λ ≠ 0; a head of several parts; features that are not finite or of another width.
    """
    if len(head.parts) > 1:
        raise ValueError(f"a head of {len(head.parts)} parts divides each by its own length, which no linear layer "
                         "does; use FoldedHead, which has the exact logits")  # fmt: skip
    lmbda = head.metric.lmbda.abs().item()
    if lmbda != 0.0:
        raise ValueError(
            f"a head with λ = {lmbda:g} has a 1-form, which no linear layer expresses; train with lambda_init=0 and "
            "lmbda frozen, or set head.metric.lmbda to 0 and measure what that costs"
        )
    exact = copy.deepcopy(head).cpu().double()
    x_ND = None if features is None else checked_features(features, head.in_features)
    weight_CD, bias_C = _flat_layer(exact, x_ND) if head.is_flat else _sphere_layer(exact, x_ND)
    weight_CD, bias_C = weight_CD - weight_CD.mean(0), bias_C - bias_C.mean()
    if head.center is not None:
        bias_C = bias_C - weight_CD @ exact.center
    linear = nn.Linear(head.in_features, head.num_classes, device=head.mu.device, dtype=head.mu.dtype)
    linear.weight.copy_(weight_CD)
    linear.bias.copy_(bias_C)
    return linear.train(head.training)


def _sphere_layer(head: FAIMHead, x_ND: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and biases of features x - c: d_k² = 2 - 2 z·m_k / |z| + ε, its root expanded at one common distance."""
    z_ND = None if x_ND is None else head._framed(x_ND)
    length = math.sqrt(head.in_features) if z_ND is None else z_ND.norm(dim=1).mean()
    m_CD = head.project(head.mu)
    radius = math.sqrt(2.0) if x_ND is None else _deciding_distance(head, x_ND)
    weight_CD = head.gamma() / (radius * length) * m_CD
    bias_C = torch.zeros(len(m_CD), dtype=torch.float64) if head.prior is None else head.prior
    if head.whiten is not None:
        weight_CD = weight_CD @ head.whiten.t() if head.full_sigma else weight_CD * head.whiten
    return weight_CD, bias_C


def _deciding_distance(head: FAIMHead, x_ND: Tensor) -> Tensor:
    """The distance of the classes between which the softmax decides."""
    gamma = head.gamma()
    distance_NC = -head.eval()._scaled_distances(x_ND) / gamma
    return ((-gamma * distance_NC).softmax(-1) * distance_NC).sum(1).mean()


def _flat_layer(head: FAIMHead, x_ND: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and biases: d_k² = |x - o|² - 2 (x - o)'Σ(μ_k - o) + |μ_k - o|²; o only decides where the root is
    expanded."""
    sigma_DD = head.metric.sigma()
    o_D = torch.zeros(head.in_features, dtype=torch.float64) if x_ND is None else x_ND.mean(0)
    y_CD = head.mu - o_D
    pulled_CD = y_CD @ sigma_DD
    squares_C = (pulled_CD * y_CD).sum(1)
    if x_ND is None:
        own = sigma_DD.diagonal().sum()
        radius = (own + squares_C.mean()).sqrt()
    else:
        own = ((x_ND - o_D) @ sigma_DD * (x_ND - o_D)).sum(1).mean()
        radius = _deciding_distance(head, x_ND)
    gamma = head.gamma()
    if head.prior is None:  # a common slope keeps the argmax
        weight_CD, bias_C = gamma / radius * pulled_CD, -0.5 * gamma / radius * squares_C
    else:
        distance_C = (own + squares_C).sqrt()
        weight_CD = (gamma / distance_C)[:, None] * pulled_CD
        bias_C = head.prior - gamma * distance_C
    return weight_CD, bias_C - weight_CD @ o_D
