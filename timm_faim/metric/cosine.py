"""Distances between points of the unit sphere in Σ's frame: all that a head without 1-form computes.

    -γ d(z, y) = -γ sqrt(2 - 2 z·y / (|z| |y|) + ε)

Both sides enter by their norms only: no normalised copy is made. In eager training one autograd node keeps a single
[B, C] tensor, the logits themselves; the compiler, TorchScript, the transforms of torch.func and double backward take
the plain form.

Shapes: B features z, C prototypes y, D features' width. With r = 1/|z|, s = 1/|y|, a = -2γ² r z, P = a y',
q = γ² (2 + ε) + P s, L = -sqrt(q) and the incoming G,

    dL/dq = 1 / 2L,   dP = G s / 2L,   dz = -2γ² r dP y - radial part,   dy = dP' a - radial part,

where the radial parts are sums of G / 2L · P s = (G L - γ² (2 + ε) G / L) / 2 over rows and columns.
"""

import torch
from torch import Tensor

from .functional import LARGEST_INVERSE, inverse_norms
from .precision import backward_without_autocast, needs_plain_ops

_LEAST_SQUARE = 1e-24  # γ² must not vanish


def cosine_logits(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """-γ d(z, y) [B, C] for features z and prototypes y of any length (zero: at right angles to all) and γ [1]."""
    if not torch.jit.is_scripting():  # noqa: SIM102  what follows is not compiled
        if not needs_plain_ops(z_BD, y_CD, gamma):
            return _fused(z_BD, y_CD, gamma, eps)
    return plain_cosine_logits(z_BD, y_CD, gamma, eps)


def plain_cosine_logits(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """:func:`cosine_logits` in differentiable operations."""
    a_BD = z_BD * (-2.0 * inverse_norms(z_BD)).unsqueeze(1)
    q_BC = (2.0 + eps) + (a_BD @ y_CD.t()) * inverse_norms(y_CD)
    q_BC = q_BC + (q_BC.detach().clamp_min(eps) - q_BC.detach())  # rounding alone goes below ε: no gradient is cut
    return q_BC.sqrt() * -gamma


def _fused(z_BD: Tensor, y_CD: Tensor, gamma: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return FusedCosine.apply(z_BD, y_CD, gamma, eps)
    square = gamma.square().clamp_min(_LEAST_SQUARE)
    a_BD = z_BD * (-2.0 * square * inverse_norms(z_BD)).unsqueeze(1)
    return _logits(a_BD, y_CD, inverse_norms(y_CD), square, eps)


def _logits(a_BD: Tensor, y_CD: Tensor, s_C: Tensor, square: Tensor, eps: float) -> Tensor:
    """The logits [B, C], in place of one product."""
    q_BC = a_BD @ y_CD.t()
    torch.addcmul(square * (2.0 + eps), q_BC, s_C, out=q_BC)
    return q_BC.clamp_(min=square * eps).sqrt_().neg_()


class FusedCosine(torch.autograd.Function):
    """:func:`cosine_logits` as one node."""

    @staticmethod
    def forward(ctx, z_BD, y_CD, gamma, eps):
        r_B, s_C, square = inverse_norms(z_BD), inverse_norms(y_CD), gamma.square().clamp_min(_LEAST_SQUARE)
        a_BD = z_BD * (-2.0 * square * r_B).unsqueeze(1)
        logits_BC = _logits(a_BD, y_CD, s_C, square, eps)
        ctx.save_for_backward(z_BD, y_CD, gamma, r_B, s_C, square, a_BD, logits_BC)
        ctx.eps = eps
        return logits_BC

    @staticmethod
    @backward_without_autocast
    def backward(ctx, G_BC):
        z_BD, y_CD, gamma, r_B, s_C, square, a_BD, logits_BC = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradient(ctx, z_BD, y_CD, gamma, G_BC)
        wants_z, wants_y, wants_gamma, _ = ctx.needs_input_grad
        GL_BC = G_BC * logits_BC
        along_B, along_C = GL_BC.sum(1), GL_BC.sum(0)
        dgamma = (along_C.sum() * square.rsqrt()).reshape(gamma.shape) if wants_gamma else None
        g_BC = torch.div(G_BC, logits_BC, out=GL_BC)
        two = square * (2.0 + ctx.eps)
        along_B, along_C = along_B - g_BC.sum(1) * two, along_C - g_BC.sum(0) * two
        g_BC.mul_(0.5 * s_C)
        dz_BD = dy_CD = None
        if wants_z:
            dz_BD = (g_BC @ y_CD).mul_((-2.0 * square * r_B).unsqueeze(1))
            dz_BD.addcmul_(z_BD, _radial(along_B, r_B), value=-1.0)
        if wants_y:
            dy_CD = (g_BC.t() @ a_BD).addcmul_(y_CD, _radial(along_C, s_C), value=-1.0)
        return dz_BD, dy_CD, dgamma, None


def _radial(along: Tensor, inverse: Tensor) -> Tensor:
    """What moves along each vector, as a factor of it [..., 1]; nothing where its length is below the bound."""
    return (0.5 * along * inverse.square() * (inverse < LARGEST_INVERSE)).unsqueeze(1)


def _differentiable_gradient(ctx, z_BD: Tensor, y_CD: Tensor, gamma: Tensor, G_BC: Tensor) -> tuple:
    """The gradient as a graph (``create_graph=True``), of the plain form."""
    inputs = [z_BD, y_CD, gamma]
    out = plain_cosine_logits(z_BD, y_CD, gamma, ctx.eps)
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    gradients = iter(torch.autograd.grad(out, [inputs[i] for i in wanted], G_BC, create_graph=True))
    return *(next(gradients) if i in wanted else None for i in range(3)), None
