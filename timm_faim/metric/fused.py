"""The GEMM form as one autograd node: what eager training runs.

Plain autograd of :func:`gemm_distance` keeps about ten [B, C] tensors alive; this node keeps one and recomputes the
rest. TorchScript and torch.compile use the plain form instead (the compiler fuses it itself), and so does double
backward: with ``create_graph=True`` the gradient is that of the plain form.

Shapes: B points x, C prototypes y, D features. With v = x - y, q = v'Σv, and G the incoming gradient,

    g = G s / (2 sqrt(q + ε)),  r = rows of g summed,  c = columns of g summed,  H = g y,
    dx = 2 Σ (r∘x - H),  dy = 2 Σ (c∘y - g'x),  dΣ = x'(r∘x - H) + y'(c∘y - g'x).
"""

from typing import Optional

import torch
from torch import Tensor

from .functional import gemm_distance, inverse_norms
from .triangular import tri_matmul, tri_matmul_t, tri_outer


class FusedDistance(torch.autograd.Function):
    """s · d_F(x, y) [B, C]; arguments as :func:`timm_faim.metric.functional.gemm_distance`, and the scale s [1]."""

    @staticmethod
    def forward(ctx, x_BD, y_CD, sigma_D, tril_DD, beta_D, lmbda, scale, eps, symmetric, damping, unit):
        xc_BD, yc_CD, _ = _place(x_BD, y_CD, unit)
        tri_y_CD = None
        if tril_DD is None:
            sx_BD = xc_BD * sigma_D
            yy_C = torch.mv(yc_CD * yc_CD, sigma_D)
        else:
            tri_y_CD = tri_matmul(yc_CD, tril_DD)
            sx_BD = tri_matmul_t(tri_matmul(xc_BD, tril_DD), tril_DD).add_(xc_BD, alpha=eps)
            yy_C = tri_y_CD.square().sum(-1) + eps * yc_CD.square().sum(-1)
        xx_B1 = (xc_BD * sx_BD).sum(-1, keepdim=True)
        root_BC = torch.addmm(yy_C, sx_BD, yc_CD.t(), alpha=-2.0)
        root_BC.add_(xx_B1).clamp_min_(0.0).add_(eps).sqrt_()
        term_BC, _ = _one_form(xc_BD, yc_CD, beta_D, eps, symmetric, damping, slope=False)
        out_BC = term_BC.mul_(lmbda).add_(root_BC).mul_(scale)
        ctx.save_for_backward(x_BD, y_CD, sigma_D, tril_DD, beta_D, lmbda, scale, damping, root_BC, tri_y_CD)
        ctx.eps, ctx.symmetric, ctx.unit = eps, symmetric, unit
        return out_BC

    @staticmethod
    def backward(ctx, G_BC):
        x_BD, y_CD, sigma_D, tril_DD, beta_D, lmbda, scale, damping, root_BC, tri_y_CD = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return _plain_gradient(ctx, G_BC)
        eps = ctx.eps
        xc_BD, yc_CD, scale_C1 = _place(x_BD, y_CD, ctx.unit)

        term_BC, slope_BC = _one_form(xc_BD, yc_CD, beta_D, eps, ctx.symmetric, damping, slope=True)
        g_root, g_term = torch.sum(G_BC * root_BC), torch.sum(term_BC.mul_(G_BC))
        dscale = (g_root + lmbda * g_term).reshape(scale.shape)
        dlmbda = (scale * g_term).reshape(lmbda.shape)
        slope_BC = slope_BC.mul_(G_BC).mul_(scale * lmbda)
        ex_B, ey_C = slope_BC.sum(1), slope_BC.sum(0)
        dbeta_D = torch.mv(xc_BD.t(), ex_B) - torch.mv(yc_CD.t(), ey_C)
        del term_BC, slope_BC

        g_BC = (G_BC * (0.5 * scale)).div_(root_BC)
        r_B1, c_C1 = g_BC.sum(1, keepdim=True), g_BC.sum(0).unsqueeze(1)
        v_BD = (xc_BD * r_B1).addmm_(g_BC, yc_CD, alpha=-1.0)
        dsigma_D = dtril_DD = None
        if tril_DD is None:
            u_CD = torch.mm(g_BC.t(), xc_BD).neg_().addcmul_(yc_CD, c_C1)
            dsigma_D = (xc_BD * v_BD).sum(0) + (yc_CD * u_CD).sum(0)
            dx_BD, dy_CD = v_BD.mul_(2.0 * sigma_D), u_CD.mul_(2.0 * sigma_D)
        else:
            tri_x_BD = tri_matmul(xc_BD, tril_DD)
            sx_BD = tri_matmul_t(tri_x_BD, tril_DD).add_(xc_BD, alpha=eps)
            tri_v_BD = tri_matmul(v_BD, tril_DD)
            cy_CD = tri_y_CD * c_C1
            h_BD = xc_BD * r_B1 - v_BD
            dtril_DD = tri_outer(torch.cat([xc_BD, -h_BD]), torch.cat([tri_v_BD, tri_x_BD]))
            dtril_DD = dtril_DD.add_(tri_outer(yc_CD, cy_CD)).mul_(2.0)
            dx_BD = tri_matmul_t(tri_v_BD, tril_DD).add_(v_BD, alpha=eps).mul_(2.0)
            dy_CD = tri_matmul_t(cy_CD, tril_DD).addcmul_(yc_CD, c_C1, value=eps)
            dy_CD = dy_CD.addmm_(g_BC.t(), sx_BD, alpha=-1.0).mul_(2.0)
        dx_BD = dx_BD.addr_(ex_B, beta_D)
        dy_CD = dy_CD.addr_(ey_C, beta_D, alpha=-1.0)
        if scale_C1 is not None:  # y / |y| only moves within the sphere
            radial_C1 = (yc_CD * dy_CD).sum(1, keepdim=True)
            dy_CD = dy_CD.sub_(yc_CD.mul_(radial_C1)).mul_(scale_C1)
        return dx_BD, dy_CD, dsigma_D, dtril_DD, dbeta_D, dlmbda, dscale, None, None, None, None


def _place(x_BD: Tensor, y_CD: Tensor, unit: bool) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Centred x and y, or with ``unit`` x as it is and y / |y| with the factors 1 / |y| [C, 1]."""
    if unit:
        scale_C1 = inverse_norms(y_CD).unsqueeze(1)
        return x_BD, y_CD * scale_C1, scale_C1
    shift_D = y_CD.mean(0)
    return x_BD - shift_D, y_CD - shift_D, None


def _one_form(
    xc_BD: Tensor, yc_CD: Tensor, beta_D: Tensor, eps: float, symmetric: bool, damping: Optional[Tensor], slope: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """The 1-form term [B, C] and, if asked, its derivative with respect to b = β'(x - y)."""
    b_BC = torch.mv(xc_BD, beta_D)[:, None] - torch.mv(yc_CD, beta_D)
    if symmetric:
        h_BC = (b_BC * b_BC).add_(eps).sqrt_()
        slope_BC = b_BC.div_(h_BC) if slope else None
    else:
        h_BC = b_BC
        slope_BC = torch.ones_like(b_BC) if slope else None
    if damping is not None:
        tanh_BC = torch.tanh(0.5 * h_BC)
        if slope_BC is not None:  # d/dh of (1 - κ) h + 2 κ tanh(h/2) = 1 - κ tanh²(h/2)
            slope_BC = slope_BC * (1.0 - damping * tanh_BC * tanh_BC)
        h_BC = torch.lerp(h_BC, 2.0 * tanh_BC, damping)
    return h_BC, slope_BC


def _plain_gradient(ctx, G_BC: Tensor) -> tuple:
    """The gradient as a differentiable graph, through the plain GEMM form."""
    saved = list(ctx.saved_tensors[:7])
    x, y, sigma, tril, beta, lmbda, scale = saved
    damping = ctx.saved_tensors[7]
    wanted = [i for i in range(7) if ctx.needs_input_grad[i]]
    out = scale * gemm_distance(x, y, sigma, tril, beta, lmbda, ctx.eps, ctx.symmetric, damping, ctx.unit)
    grads = torch.autograd.grad(out, [saved[i] for i in wanted], G_BC, create_graph=True)
    full: list[Optional[Tensor]] = [None] * 11
    for i, grad in zip(wanted, grads, strict=True):
        full[i] = grad
    return tuple(full)
