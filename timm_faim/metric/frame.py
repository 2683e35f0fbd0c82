"""The Σ-orthonormal frame of a metric: coordinates z = A v with AᵀA = Σ, in which F(v) = |z| + λ |β̂'z|.

Shapes: D features, any leading dimensions.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Frame(NamedTuple):  # a tuple: hooks of modules look for tensors in it
    """A as its diagonal or by its lower-triangular factor K (A = Kᵀ, Σ = K Kᵀ), and the 1-form β̂ = A⁻ᵀβ in it."""

    root_D: Tensor | None
    factor_DD: Tensor | None
    one_form_D: Tensor
    lmbda: Tensor

    def whiten(self, v: Tensor) -> Tensor:
        """A v of vectors v [..., D]."""
        return v * self.root_D if self.factor_DD is None else v @ self.factor_DD

    def unwhiten(self, z: Tensor) -> Tensor:
        """A⁻¹ z of coordinates z [..., D]; with a full Σ by a triangular solve."""
        if self.factor_DD is None:
            return z / self.root_D
        flat = torch.linalg.solve_triangular(self.factor_DD, z.reshape(-1, z.shape[-1]), upper=False, left=False)
        return flat.reshape(z.shape)


def orthonormal_frame(
    sigma_D: Tensor | None, tril_DD: Tensor | None, beta_D: Tensor, lmbda: Tensor, eps: float
) -> Frame:
    """The frame of Σ = diag(sigma) or T T' + ε I."""
    if sigma_D is not None:
        root_D = sigma_D.sqrt()
        return Frame(root_D, None, beta_D / root_D, lmbda)
    factor_DD, one_form_D = whitened_one_form(tril_DD, beta_D, eps)
    return Frame(None, factor_DD.to(beta_D.dtype), one_form_D.to(beta_D.dtype), lmbda)


def whitened_one_form(tril_DD: Tensor, beta_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The factor K of T T' + ε I = K K' and K⁻¹β, in float64: T T' squares the condition number of T."""
    wide = tril_DD.double()
    ridge = eps * torch.eye(len(wide), device=wide.device, dtype=wide.dtype)
    factor_DD = torch.linalg.cholesky_ex(wide @ wide.t() + ridge)[0]  # unchecked: a NaN must reach the loss
    return factor_DD, torch.linalg.solve_triangular(factor_DD, beta_D.double().unsqueeze(1), upper=False).squeeze(1)
