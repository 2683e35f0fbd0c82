"""Distances between points on the unit sphere of Σ's frame: all that a head without 1-form computes.

    -γ d(z, y) = -γ sqrt(2 - 2 z·y / |y| + ε),   |z| = 1

The prototypes y enter by their norms only: no normalised copy of size C·D is made. In eager training one autograd node
keeps a single [B, C] tensor, the logits themselves; the compiler, TorchScript, the transforms of torch.func and double
backward take the plain form.

Shapes: B points z, C prototypes y, D features. With q = γ² (2 + ε - 2 z·y/|y|), L = -sqrt(q) and the incoming G,

    dL/dq = 1 / 2L,   dP = G / 2L ∘ 1/|y|  for P = -2γ² z y',   dz = -2γ² dP y,   dy = dP' (-2γ² z) - radial part.
"""

import torch
from torch import Tensor

from .functional import has_direction, inverse_norms
from .precision import backward_without_autocast, needs_plain_ops

_LEAST_GAMMA = 1e-12  # γ² must not vanish


def cosine_logits(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """-γ d(z, y) [B, C] for unit vectors z, prototypes y of any length (zero: at right angles to all) and γ [1]."""
    if not torch.jit.is_scripting():  # noqa: SIM102  what follows is not compiled
        if not needs_plain_ops():
            return _fused(z_BD, y_CD, gamma, eps)
    return plain_cosine_logits(z_BD, y_CD, gamma, eps)


def plain_cosine_logits(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """:func:`cosine_logits` in differentiable operations."""
    two = torch.full([1], 2.0 + eps, dtype=z_BD.dtype, device=z_BD.device)
    q_BC = torch.addcmul(two, (-2.0 * z_BD) @ y_CD.t(), inverse_norms(y_CD))
    q_BC = q_BC + (q_BC.detach().clamp_min(eps) - q_BC.detach())  # rounding alone goes below ε: no gradient is cut
    return q_BC.sqrt() * -gamma


def _fused(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return FusedCosine.apply(z_BD, y_CD, gamma, eps)
    return _forward(z_BD, y_CD, inverse_norms(y_CD), gamma.clamp_min(_LEAST_GAMMA), eps)[0]


def _forward(z_BD: Tensor, y_CD: Tensor, scale_C: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The logits, computed in place of one product, and -2γ² z."""
    square = gamma * gamma
    a_BD = z_BD * (-2.0 * square)
    q_BC = a_BD @ y_CD.t()
    torch.addcmul(square * (2.0 + eps), q_BC, scale_C, out=q_BC)
    return q_BC.clamp_(min=square * eps).sqrt_().neg_(), a_BD


class FusedCosine(torch.autograd.Function):
    """:func:`cosine_logits` as one node."""

    @staticmethod
    def forward(ctx, z_BD, y_CD, gamma, eps):
        scale_C, bounded = inverse_norms(y_CD), gamma.clamp_min(_LEAST_GAMMA)
        logits_BC, _ = _forward(z_BD, y_CD, scale_C, bounded, eps)
        ctx.save_for_backward(z_BD, y_CD, gamma, scale_C, bounded, logits_BC)
        ctx.eps = eps
        return logits_BC

    @staticmethod
    @backward_without_autocast
    def backward(ctx, G_BC):
        z_BD, y_CD, gamma, scale_C, bounded, logits_BC = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, z_BD, y_CD, gamma, G_BC)
        wants_z, wants_y, wants_gamma, _ = ctx.needs_input_grad
        square = bounded * bounded
        GL_BC = G_BC * logits_BC
        along_C = GL_BC.sum(0)
        dgamma = (along_C.sum() / bounded).reshape(gamma.shape) if wants_gamma else None
        g_BC = torch.div(G_BC, logits_BC, out=GL_BC)
        along_C -= g_BC.sum(0) * (square * (2.0 + ctx.eps))  # 2 Σ_b dL/dq q' for q' = -2γ² z·y / |y|
        g_BC.mul_(0.5 * scale_C)
        a_BD = z_BD * (-2.0 * square)
        dz_BD = (g_BC @ y_CD).mul_(-2.0 * square) if wants_z else None
        dy_CD = None
        if wants_y:
            radial_C1 = (0.5 * along_C * scale_C * scale_C * has_direction(y_CD)).unsqueeze(1)
            dy_CD = (g_BC.t() @ a_BD).addcmul_(y_CD, radial_C1, value=-1.0)
        return dz_BD, dy_CD, dgamma, None


def _differentiable_gradient(ctx, z_BD: Tensor, y_CD: Tensor, gamma: Tensor, G_BC: Tensor) -> tuple:
    """The gradient as a graph (``create_graph=True``), of the plain form."""
    inputs = [z_BD, y_CD, gamma]
    out = plain_cosine_logits(z_BD, y_CD, gamma, ctx.eps)
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    gradients = iter(torch.autograd.grad(out, [inputs[i] for i in wanted], G_BC, create_graph=True))
    return *(next(gradients) if i in wanted else None for i in range(3)), None
