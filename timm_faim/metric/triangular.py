"""Products with a lower-triangular matrix that skip the zero half.

BLAS through PyTorch has no triangular product with autograd, so on the CPU the triangle is cut into block columns
(or rows): with n blocks (n + 1) / 2n of the dense work is left. On a GPU, and for small D, one dense product wins.

Shapes: B rows, D features.
"""

import torch
from torch import Tensor


def _block(v: Tensor) -> int:
    """Columns a block; D itself (no blocking) where one dense product is faster."""
    D = v.shape[-1]
    return 128 if v.device.type == "cpu" and D >= 256 else D


def tri_matmul(v_BD: Tensor, tril_DD: Tensor) -> Tensor:
    """``v @ T`` for lower-triangular T [D, D]: column j of T has no entries above row j."""
    D, block = v_BD.shape[-1], _block(v_BD)
    if block == D:
        return v_BD @ tril_DD
    return torch.cat([v_BD[:, j:] @ tril_DD[j:, j : j + block] for j in range(0, D, block)], dim=-1)


def tri_matmul_t(v_BD: Tensor, tril_DD: Tensor) -> Tensor:
    """``v @ T.t()`` for lower-triangular T [D, D]: row i of T has no entries right of column i."""
    D, block = v_BD.shape[-1], _block(v_BD)
    if block == D:
        return v_BD @ tril_DD.t()
    return torch.cat([v_BD[:, : i + block] @ tril_DD[i : i + block, : i + block].t() for i in range(0, D, block)], -1)


def tri_outer(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """``tril(a.t() @ b)`` [D, D], the gradient of :func:`tri_matmul` with respect to T."""
    D, block = a_BD.shape[-1], _block(a_BD)
    if block == D:
        return torch.tril(a_BD.t() @ b_BD)
    out = a_BD.new_zeros(D, D)
    for j in range(0, D, block):
        out[j:, j : j + block] = a_BD[:, j:].t() @ b_BD[:, j : j + block]
    return out.tril_()
