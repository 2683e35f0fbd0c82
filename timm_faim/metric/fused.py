"""The GEMM form as one autograd node: what eager training runs.

Plain autograd of :func:`gemm_distance` keeps about ten [B, C] tensors alive; these nodes keep one and recompute the
rest (with a full Σ they also keep the triangular products, which are dear to repeat). TorchScript and torch.compile
use the plain form instead (the compiler fuses it itself), and so does double backward: with ``create_graph=True`` the
gradient is that of the plain form.

Shapes: B points x, C prototypes y, D features. With v = x - y, q = v'Σv, and G the incoming gradient,

    g = G s / (2 sqrt(q + ε)),  r = rows of g summed,  c = columns of g summed,
    dx = 2 Σ (r∘x - g y),  dy = 2 Σ (c∘y - g'x),  dΣ = x'(r∘x - g y) + y'(c∘y - g'x).

Tensors made here are overwritten in place once they are no longer needed: an allocation of size C·D costs the CPU
more than the arithmetic on it.
"""

import torch
from torch import Tensor

from .functional import gemm_distance
from .precision import backward_without_autocast
from .triangular import tri_matmul, tri_matmul_t, tri_outer


def fused_distance(
    x_BD: Tensor,
    y_CD: Tensor,
    sigma_D: Tensor | None,
    tril_DD: Tensor | None,
    beta_D: Tensor,
    lmbda: Tensor,
    scale: Tensor,
    eps: float,
    symmetric: bool,
) -> Tensor:
    """s · d_F(x, y) [B, C]; arguments as :func:`timm_faim.metric.functional.gemm_distance`, and the scale s [1]."""
    if tril_DD is None:
        return FusedDiagonal.apply(x_BD, y_CD, sigma_D, beta_D, lmbda, scale, eps, symmetric)
    return FusedFull.apply(x_BD, y_CD, tril_DD, beta_D, lmbda, scale, eps, symmetric)


class FusedDiagonal(torch.autograd.Function):
    """Diagonal Σ, in the whitened coordinates z = Σ^½ x, m = Σ^½ y, where q = |z - m|²."""

    @staticmethod
    def forward(ctx, x_BD, y_CD, sigma_D, beta_D, lmbda, scale, eps, symmetric):
        root_D = sigma_D.sqrt()
        shift_D = y_CD.mean(0)
        z_BD, m_CD = ((t - shift_D).mul_(root_D) for t in (x_BD, y_CD))
        bx_B, by_C = torch.mv(z_BD, beta_D / root_D), torch.mv(m_CD, beta_D / root_D)
        zz_B1 = torch.linalg.vector_norm(z_BD, dim=1, keepdim=True).square_()
        mm_C = torch.linalg.vector_norm(m_CD, dim=1).square_()
        q_BC = torch.addmm(mm_C, z_BD, m_CD.t(), alpha=-2.0).add_(zz_B1)
        saved = (x_BD, y_CD, sigma_D, beta_D, lmbda, scale, shift_D, bx_B, by_C)
        return _finish(ctx, q_BC, saved, eps, symmetric)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, G_BC):
        *inputs, shift_D, bx_B, by_C, dist_BC = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _plain_gradient(ctx, inputs, G_BC)
        x_BD, y_CD, sigma_D, beta_D, lmbda, scale = inputs
        g_BC, ex_B, ey_C, dlmbda, dscale = _pull_back(ctx, G_BC, dist_BC, bx_B, by_C, lmbda, scale)
        r_B1, c_C1 = g_BC.sum(1, keepdim=True), g_BC.sum(0).unsqueeze(1)
        root_D = sigma_D.sqrt()
        z_BD, m_CD = ((t - shift_D).mul_(root_D) for t in (x_BD, y_CD))
        dbeta_D = (torch.mv(z_BD.t(), ex_B) - torch.mv(m_CD.t(), ey_C)).div_(root_D)
        dx_BD = (z_BD * r_B1).addmm_(g_BC, m_CD, alpha=-1.0)
        dy_CD = torch.mm(g_BC.t(), z_BD).addcmul_(m_CD, c_C1, value=-1.0)  # -(c∘m - g'z)
        dsigma_D = (z_BD.mul_(dx_BD).sum(0) - m_CD.mul_(dy_CD).sum(0)).div_(sigma_D)
        dx_BD.mul_(2.0 * root_D).addr_(ex_B, beta_D)
        dy_CD.mul_(-2.0 * root_D).addr_(ey_C, beta_D, alpha=-1.0)
        return dx_BD, dy_CD, dsigma_D, dbeta_D, dlmbda, dscale, None, None


class FusedFull(torch.autograd.Function):
    """Σ = T T' + ε I for lower-triangular T. The prototypes meet T three times, the fewest that give all gradients."""

    @staticmethod
    def forward(ctx, x_BD, y_CD, tril_DD, beta_D, lmbda, scale, eps, symmetric):
        shift_D = y_CD.mean(0)
        xc_BD, yc_CD = x_BD - shift_D, y_CD - shift_D
        bx_B, by_C = torch.mv(xc_BD, beta_D), torch.mv(yc_CD, beta_D)
        tri_y_CD = tri_matmul(yc_CD, tril_DD)
        tri_x_BD = tri_matmul(xc_BD, tril_DD)
        sx_BD = tri_matmul_t(tri_x_BD, tril_DD).add_(xc_BD, alpha=eps)
        xx_B1 = (xc_BD * sx_BD).sum(-1, keepdim=True)
        yy_C = tri_y_CD.square().sum(-1) + eps * yc_CD.square().sum(-1)
        q_BC = torch.addmm(yy_C, sx_BD, yc_CD.t(), alpha=-2.0).add_(xx_B1)
        saved = (x_BD, y_CD, tril_DD, beta_D, lmbda, scale, shift_D, bx_B, by_C, tri_x_BD, sx_BD, tri_y_CD)
        return _finish(ctx, q_BC, saved, eps, symmetric)

    @staticmethod
    @backward_without_autocast
    def backward(ctx, G_BC):
        *inputs, shift_D, bx_B, by_C, tri_x_BD, sx_BD, tri_y_CD, dist_BC = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _plain_gradient(ctx, inputs, G_BC)
        x_BD, y_CD, tril_DD, beta_D, lmbda, scale = inputs
        g_BC, ex_B, ey_C, dlmbda, dscale = _pull_back(ctx, G_BC, dist_BC, bx_B, by_C, lmbda, scale)
        r_B1, c_C1 = g_BC.sum(1, keepdim=True), g_BC.sum(0).unsqueeze(1)
        xc_BD, yc_CD = x_BD - shift_D, y_CD - shift_D
        dbeta_D = torch.mv(xc_BD.t(), ex_B) - torch.mv(yc_CD.t(), ey_C)
        h_BD = g_BC @ yc_CD
        v_BD = (xc_BD * r_B1).sub_(h_BD)
        tri_v_BD = tri_matmul(v_BD, tril_DD)
        cy_CD = tri_y_CD * c_C1
        # dΣ T with Σ's gradient split by side, so that only c∘y (not g'x) meets T at size C
        dtril_DD = tri_outer(torch.cat([xc_BD, -h_BD]), torch.cat([tri_v_BD, tri_x_BD]))
        dtril_DD.add_(tri_outer(yc_CD, cy_CD)).mul_(2.0)
        dx_BD = tri_matmul_t(tri_v_BD, tril_DD).add_(v_BD, alpha=ctx.eps).mul_(2.0).addr_(ex_B, beta_D)
        dy_CD = tri_matmul_t(cy_CD, tril_DD).addcmul_(yc_CD, c_C1, value=ctx.eps)
        dy_CD.addmm_(g_BC.t(), sx_BD, alpha=-1.0).mul_(2.0).addr_(ey_C, beta_D, alpha=-1.0)
        return dx_BD, dy_CD, dtril_DD, dbeta_D, dlmbda, dscale, None, None


def _finish(ctx, q_BC: Tensor, saved: tuple, eps: float, symmetric: bool) -> Tensor:
    """Output from q (overwritten by its root, the one [B, C] tensor that is kept)."""
    lmbda, scale, _, bx_B, by_C = saved[4:9]
    dist_BC = q_BC.clamp_min_(0.0).add_(eps).sqrt_()
    ctx.save_for_backward(*saved, dist_BC)
    ctx.eps, ctx.symmetric = eps, symmetric
    term_BC, _ = _one_form(bx_B, by_C, eps, symmetric, slope=False)
    return term_BC.mul_(lmbda).add_(dist_BC).mul_(scale)


def _pull_back(
    ctx, G_BC: Tensor, dist_BC: Tensor, bx_B: Tensor, by_C: Tensor, lmbda: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Through the pointwise epilogue: g [B, C], the 1-form's gradients at β'x [B] and -β'y [C], dλ, ds."""
    term_BC, slope_BC = _one_form(bx_B, by_C, ctx.eps, ctx.symmetric, slope=True)
    g_term = term_BC.mul_(G_BC).sum()
    g_root = torch.mul(G_BC, dist_BC, out=term_BC).sum()
    dscale = (g_root + lmbda * g_term).reshape(scale.shape)
    dlmbda = (scale * g_term).reshape(lmbda.shape)
    slope_BC = slope_BC.mul_(G_BC)
    ex_B, ey_C = slope_BC.sum(1).mul_(scale * lmbda), slope_BC.sum(0).mul_(scale * lmbda)
    g_BC = torch.div(G_BC, dist_BC, out=slope_BC).mul_(0.5 * scale)
    return g_BC, ex_B, ey_C, dlmbda, dscale


def _one_form(bx_B: Tensor, by_C: Tensor, eps: float, symmetric: bool, slope: bool) -> tuple[Tensor, Tensor | None]:
    """The 1-form term [B, C] and, if asked, its derivative with respect to b = β'(x - y)."""
    b_BC = bx_B[:, None] - by_C
    if not symmetric:
        return b_BC, torch.ones_like(b_BC) if slope else None
    h_BC = (b_BC * b_BC).add_(eps).sqrt_()
    return h_BC, b_BC.div_(h_BC) if slope else None


def _plain_gradient(ctx, inputs: list, G_BC: Tensor) -> tuple:
    """The gradient as a differentiable graph (``create_graph=True``), through the plain GEMM form."""
    x, y, sigma, beta, lmbda, scale = inputs
    diagonal, tril = (sigma, None) if sigma.dim() == 1 else (None, sigma)
    out = scale * gemm_distance(x, y, diagonal, tril, beta, lmbda, ctx.eps, ctx.symmetric)
    wanted = [i for i in range(6) if ctx.needs_input_grad[i]]
    grads = torch.autograd.grad(out, [inputs[i] for i in wanted], G_BC, create_graph=True)
    full: list[Tensor | None] = [None] * 8
    for i, grad in zip(wanted, grads, strict=True):
        full[i] = grad
    return tuple(full)
