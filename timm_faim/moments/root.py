"""The square root of positive matrices by products alone, as GPUs and gradients like it.

Coupled Newton-Schulz iteration (Higham, Functions of Matrices, 2008, section 6.7) on matrices of trace 1 with a small
ridge, as in iSQRT-COV (Li et al., CVPR 2018): with Y_0 = A, Z_0 = I and T = (3 I - Z Y) / 2,

    Y ← Y T,   Z ← T Z,   Y → A^½,   Z → A^-½.

An eigenvalue a of A grows by up to 3/2 a step towards its root: after k steps what is above (2/3)^2k has arrived, what
is below is smaller than its root.

Shapes: B matrices of size n.
"""

import torch
from torch import Tensor

from timm_faim.metric import without_autocast


def matrix_root(G_Bnn: Tensor, steps: int = 10, ridge: float = 1e-4) -> Tensor:
    """G^½ [B, n, n] of positive semi-definite matrices, in at least float32; the root of a zero matrix is 0.

    Args:
        G_Bnn: symmetric, without negative eigenvalues.
        steps: of the iteration, at least 1; 8 to 12 do.
        ridge: added to the mean eigenvalue 1/n of G / tr G, as a share of it.
    """
    if not torch.jit.is_scripting():
        return without_autocast(_matrix_root, G_Bnn, steps, ridge)
    return _matrix_root(G_Bnn, steps, ridge)


def _matrix_root(G_Bnn: Tensor, steps: int, ridge: float) -> Tensor:
    G_Bnn = G_Bnn.to(torch.promote_types(G_Bnn.dtype, torch.float32))
    n = G_Bnn.shape[-1]
    trace_B11 = G_Bnn.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp_min(torch.finfo(G_Bnn.dtype).tiny ** 0.5)
    eye_nn = torch.eye(n, dtype=G_Bnn.dtype, device=G_Bnn.device)
    A_Bnn = (G_Bnn / trace_B11 + eye_nn * (ridge / n)) / (1.0 + ridge)
    T_Bnn = 1.5 * eye_nn - 0.5 * A_Bnn  # of the first step, where Z = I
    Y_Bnn, Z_Bnn = torch.bmm(A_Bnn, T_Bnn), T_Bnn
    for step in range(1, steps):
        T_Bnn = torch.baddbmm(1.5 * eye_nn, Z_Bnn, Y_Bnn, alpha=-0.5)
        Y_Bnn = torch.bmm(Y_Bnn, T_Bnn)
        if step + 1 < steps:
            Z_Bnn = torch.bmm(T_Bnn, Z_Bnn)
    return Y_Bnn * (trace_B11 * (1.0 + ridge)).sqrt()
