"""The Σ-orthonormal frame of a metric: coordinates z = A v with AᵀA = Σ, in which F(v) = |z| + λ |β̂'z|.

Shapes: D features, any leading dimensions.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .module import FAIMMetric


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


def orthonormal_frame(metric: "FAIMMetric", dtype: torch.dtype) -> Frame:
    """The frame of a metric in ``dtype``. The factor of a full Σ is found in float64: T T' + ε I squares the condition
    number of T."""
    sigma_D, tril_DD, beta_D, lmbda = metric.tensors(dtype)
    if sigma_D is not None:
        root_D = sigma_D.sqrt()
        return Frame(root_D, None, beta_D / root_D, lmbda)
    wide = tril_DD.double()
    ridge = metric.eps * torch.eye(metric.in_features, device=wide.device, dtype=wide.dtype)
    factor_DD = torch.linalg.cholesky_ex(wide @ wide.t() + ridge)[0]  # unchecked: a NaN must reach the loss
    one_form_D = torch.linalg.solve_triangular(factor_DD, beta_D.double().unsqueeze(1), upper=False).squeeze(1)
    return Frame(None, factor_DD.to(dtype), one_form_D.to(dtype), lmbda)
