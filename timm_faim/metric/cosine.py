"""Distances between points of the unit sphere in Σ's frame: all that a head without 1-form computes.

    -γ d(z, y) = -γ sqrt(2 - 2 z·y / (|z| |y|) + ε),   γ = |scale|

Both sides enter by their norms only: no normalised copy is made. In training one autograd node, eager or compiled,
keeps a single [B, C] tensor, the logits themselves. Export, TorchScript, the transforms of torch.func and double
backward take the plain form.

Shapes: B features z, C prototypes y, D features' width. With r = 1/|z|, s = 1/|y|, a = -γ² r z,
q = γ² (2 + ε) + 2 a y' s, L = -sqrt(q) and the incoming G,

    dL/dq = 1 / 2L,   g = G s / L,   dz = -γ² r g y,   dy = g' a,   both without what is along z and along y.

In eager mode on a GPU the number of operations is the time: each line counts.
"""

import torch
from torch import Tensor

from .precision import backward_without_autocast, needs_plain_ops

_LEAST_SQUARE = 1e-24  # γ² must not vanish


def inverse_norms(y_CD: Tensor) -> Tensor:
    """1 / sqrt(|y|² + 1e-9) [...] of vectors y [..., D], whose gradient has one form at all lengths."""
    return (torch.linalg.vector_norm(y_CD, dim=-1).square() + 1e-9).rsqrt()


def cosine_logits(z_BD: Tensor, y_CD: Tensor, scale: Tensor, eps: float) -> Tensor:
    """-γ d(z, y) [B, C] for features z and prototypes y of any length (zero: at right angles to all), scale [1]."""
    if not torch.jit.is_scripting():  # noqa: SIM102  what follows is not compiled
        if not needs_plain_ops(z_BD, y_CD, scale, compiled=False):
            return _fused(z_BD, y_CD, scale, eps)
    return plain_cosine_logits(z_BD, y_CD, scale, eps)


def plain_cosine_logits(z_BD: Tensor, y_CD: Tensor, scale: Tensor, eps: float) -> Tensor:
    """:func:`cosine_logits` in differentiable operations."""
    a_BD = z_BD * (-2.0 * inverse_norms(z_BD)).unsqueeze(1)
    q_BC = (2.0 + eps) + (a_BD @ y_CD.t()) * inverse_norms(y_CD)
    q_BC = q_BC + (q_BC.detach().clamp_min(eps) - q_BC.detach())  # rounding alone goes below ε: no gradient is cut
    return q_BC.sqrt() * -scale.abs()


def _fused(z_BD: Tensor, y_CD: Tensor, scale: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return FusedCosine.apply(z_BD, y_CD, scale, eps)
    return _forward(z_BD, y_CD, scale, eps)[0]


def _forward(z_BD: Tensor, y_CD: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
    """The logits [B, C], in place of one product, and what their gradient needs."""
    r_B, s_C, minus_square = inverse_norms(z_BD), inverse_norms(y_CD), -(scale * scale + _LEAST_SQUARE)
    f_B1 = (r_B * minus_square).unsqueeze(1)
    a_BD = z_BD * f_B1
    q_BC = a_BD @ y_CD.t()
    in_place = None if torch.compiler.is_compiling() else q_BC
    q_BC = torch.addcmul(minus_square * -(2.0 + eps), q_BC, s_C, value=2.0, out=in_place)
    return q_BC.clamp_(min=minus_square * -eps).sqrt_().neg_(), r_B, s_C, minus_square, f_B1, a_BD


class FusedCosine(torch.autograd.Function):
    """:func:`cosine_logits` as one node."""

    @staticmethod
    def forward(ctx, z_BD, y_CD, scale, eps):
        logits_BC, *kept = _forward(z_BD, y_CD, scale, eps)
        ctx.save_for_backward(z_BD, y_CD, scale, logits_BC, *kept)
        ctx.eps = eps
        return logits_BC

    @staticmethod
    @backward_without_autocast
    def backward(ctx, G_BC):
        z_BD, y_CD, scale, logits_BC, r_B, s_C, minus_square, f_B1, a_BD = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, z_BD, y_CD, scale, G_BC)
        wants_z, wants_y, wants_scale, _ = ctx.needs_input_grad
        dscale = (G_BC * logits_BC).sum() * scale / -minus_square if wants_scale else None
        g_BC = (G_BC * s_C).div_(logits_BC)
        dz_BD = _tangent((g_BC @ y_CD).mul_(f_B1), z_BD, r_B) if wants_z else None
        dy_CD = _tangent(g_BC.t() @ a_BD, y_CD, s_C) if wants_y else None
        return dz_BD, dy_CD, dscale, None


def _tangent(v: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Rows of v without what is along the rows of x, whose inverse norms are given; in place of v."""
    if torch.compiler.is_compiling():  # which fuses all of it
        return v - x * ((v * x).sum(1) * inverse * inverse).unsqueeze(1)
    return v.addcmul_(x, (torch.linalg.vecdot(v, x) * inverse * inverse).unsqueeze(1), value=-1.0)


def _differentiable_gradient(ctx, z_BD: Tensor, y_CD: Tensor, scale: Tensor, G_BC: Tensor) -> tuple:
    """The gradient as a graph (``create_graph=True``), of the plain form."""
    inputs = [z_BD, y_CD, scale]
    out = plain_cosine_logits(z_BD, y_CD, scale, ctx.eps)
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    gradients = iter(torch.autograd.grad(out, [inputs[i] for i in wanted], G_BC, create_graph=True))
    return *(next(gradients) if i in wanted else None for i in range(3)), None
