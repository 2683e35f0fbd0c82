"""The FAIM distance as pure functions: the literal formula, and the GEMM form that is used.

    F(v) = sqrt(v' Σ v + ε) + λ sqrt((β' v)² + ε)      symmetric (default)
    F(v) = sqrt(v' Σ v + ε) + λ β' v                   Randers, λ² β' Σ⁻¹ β < 1
    d_F(x, y) = F(x - y)

F is the same at every point (a Minkowski norm), so geodesics are straight and d_F is exact.
Source: Z. Shen, Lectures on Finsler Geometry, World Scientific 2001 (Minkowski and Randers norms).

Shapes: B points x, C points y (prototypes), D features. Σ is given as its diagonal ``sigma_D`` or as a
lower-triangular ``tril_DD`` with Σ = T T' + ε I; exactly one of the two is set.
"""

import torch
from torch import Tensor

from .triangular import tri_matmul, tri_matmul_t


def one_form_term(b: Tensor, symmetric: bool, eps: float) -> Tensor:
    """The 1-form part of F before λ: smoothed |b| (symmetric) or b itself (Randers). Any shape."""
    return torch.sqrt(b * b + eps) if symmetric else b


def reference_distance(
    x_BD: Tensor,
    y_CD: Tensor,
    sigma_DD: Tensor,
    beta_D: Tensor,
    lmbda: Tensor,
    eps: float = 1e-6,
    symmetric: bool = True,
) -> Tensor:
    """d_F(x, y) [B, C] by the literal formula, with every difference [B, C, D] written out.

    The oracle of the tests, in the dtype of its inputs (use float64). O(B·C·D) memory: not for training.
    """
    v = x_BD[:, None, :] - y_CD
    q = torch.einsum("bcd,de,bce->bc", v, sigma_DD, v)
    b = torch.einsum("d,bcd->bc", beta_D, v)
    return torch.sqrt(q + eps) + lmbda * one_form_term(b, symmetric, eps)


def squared_norm(v_BD: Tensor, sigma_D: Tensor | None, tril_DD: Tensor | None, eps: float) -> Tensor:
    """v' Σ v [B] of each row."""
    if sigma_D is not None:
        return torch.mv(v_BD * v_BD, sigma_D)
    assert tril_DD is not None
    return tri_matmul(v_BD, tril_DD).square().sum(-1) + eps * v_BD.square().sum(-1)


def sigma_product(v_BD: Tensor, sigma_D: Tensor | None, tril_DD: Tensor | None, eps: float) -> Tensor:
    """Σ v [B, D] of each row."""
    if sigma_D is not None:
        return v_BD * sigma_D
    assert tril_DD is not None
    return tri_matmul_t(tri_matmul(v_BD, tril_DD), tril_DD) + eps * v_BD


def gemm_distance(
    x_BD: Tensor,
    y_CD: Tensor,
    sigma_D: Tensor | None,
    tril_DD: Tensor | None,
    beta_D: Tensor,
    lmbda: Tensor,
    eps: float,
    symmetric: bool,
) -> Tensor:
    """d_F(x, y) [B, C] from one GEMM, two rank-1 vectors and a pointwise epilogue; nothing of size B·C·D.

        q = x'Σx + y'Σy - 2 (Σx)'y,   b = β'x - β'y

    Both sides are first moved by the mean of y: distances do not change, the cancellation in q shrinks to the
    spread of the points. The shift carries no gradient because its exact gradient is zero.
    """
    shift_D = y_CD.detach().mean(0)
    x_BD = x_BD - shift_D
    y_CD = y_CD - shift_D
    sx_BD = sigma_product(x_BD, sigma_D, tril_DD, eps)
    xx_B = (x_BD * sx_BD).sum(-1)
    yy_C = squared_norm(y_CD, sigma_D, tril_DD, eps)
    q_BC = xx_B[:, None] + yy_C - 2.0 * (sx_BD @ y_CD.t())
    b_BC = torch.mv(x_BD, beta_D)[:, None] - torch.mv(y_CD, beta_D)
    return torch.sqrt(q_BC.clamp_min(0.0) + eps) + lmbda * one_form_term(b_BC, symmetric, eps)


def unit_vectors(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-4) of vectors x [..., D], in at least float32: the bound keeps the gradient at zero small."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-4)
