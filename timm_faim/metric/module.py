"""FAIMMetric: the parameters Σ, β, λ of a Finsler (Minkowski) norm, and distances under it.

Precision policy: distances are computed in at least float32 with autocast off, whatever the dtype of the features
(bfloat16 and float16 features are widened first), because q = |x|² + |y|² - 2 x·y loses small distances in half
precision. TF32 matrix products follow the user's ``torch.backends`` setting, like any linear layer. The result has
the promoted dtype of features and parameters: float32 under autocast, bfloat16 for a model moved to bfloat16.
"""

import math

import torch
from torch import Tensor, nn
from torch.jit import Final

from .checks import checked_count, checked_number
from .frame import orthonormal_frame, whitened_one_form
from .functional import gemm_distance, one_form_term, reference_distance, squared_norm
from .fused import fused_distance
from .hosts import FillsMissing, is_filled
from .precision import needs_plain_ops, without_autocast


class FAIMMetric(FillsMissing, nn.Module):
    """A FAIM metric on R^D, the same at every point.

        F(v) = sqrt(v'Σv + ε) + λ sqrt((β'v)² + ε)     symmetric=True
        F(v) = sqrt(v'Σv + ε) + λ β̃'v                  symmetric=False (Randers)

    Σ = diag(exp(log_sigma_diag)) + ε I, or tril(L) tril(L)' + ε I with ``full_sigma``. λ is used as |lmbda|, so
    that no optimizer step can make it negative in effect. A Randers metric is positive for every parameter value:
    β̃ = 0.999 β / sqrt(1 + r²) with r² = λ² β'Σ⁻¹β, hence λ² β̃'Σ⁻¹β̃ < 1 (Shen 2001, section 1.2).

    Args:
        in_features: D.
        full_sigma: learn a full Σ (Cholesky factor L [D, D]) instead of its diagonal.
        symmetric: use |β'v|, which makes d_F(x, y) = d_F(y, x); False gives the directed Randers metric.
        lambda_init: initial λ >= 0.
        eps: ε, smoothing of both roots and ridge of Σ. With 0 gradients at x = y are not finite.

    Parameters: ``beta`` [D], ``lmbda`` [1], and ``log_sigma_diag`` [D] or ``L`` [D, D]. Σ starts at the identity, β
    at N(0, 1/D), so that |β'v| is about |v| / sqrt(D).

    Raises:
        TypeError, ValueError: in_features < 1, a negative or non-finite lambda_init or eps, or no numbers at all.
    """

    _randers_limit: Final[float] = 0.999  # of the Σ-norm of the effective 1-form; at 1 F would vanish somewhere

    def __init__(
        self,
        in_features: int,
        full_sigma: bool = False,
        symmetric: bool = True,
        lambda_init: float = 0.1,
        *,
        eps: float = 1e-6,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.in_features = checked_count("in_features", in_features)
        self.full_sigma = full_sigma
        self.symmetric = symmetric
        self.lambda_init = checked_number("lambda_init", lambda_init, hint="; 0 switches the 1-form off")
        self.eps = checked_number("eps", eps)
        self.beta = nn.Parameter(torch.empty(self.in_features, **factory))
        self.lmbda = nn.Parameter(torch.empty(1, **factory))
        self.register_parameter("log_sigma_diag", None)
        self.register_parameter("L", None)
        if full_sigma:
            self.L = nn.Parameter(torch.empty(in_features, in_features, **factory))
        else:
            self.log_sigma_diag = nn.Parameter(torch.empty(in_features, **factory))
        self._start: tuple[float, float] = (1.0, 1.0 / math.sqrt(self.in_features))
        self.reset_parameters()

    def start_at(self, sigma: float = 1.0, beta_std: float | None = None) -> None:
        """Reset, now and by every later :meth:`reset_parameters`, to Σ = sigma · I and β ~ N(0, beta_std²) (default
        sigma / D, a 1-form of Σ⁻¹-norm about 1)."""
        self._start = (sigma, math.sqrt(sigma / self.in_features) if beta_std is None else beta_std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Σ and β as :meth:`start_at` says (Σ = I and β ~ N(0, 1/D) at first), λ = lambda_init."""
        sigma, beta_std = self._start
        if self.L is not None and not is_filled(self.L):
            nn.init.eye_(self.L).data.mul_(math.sqrt(sigma))
        if self.log_sigma_diag is not None:
            nn.init.constant_(self.log_sigma_diag, math.log(sigma))
        nn.init.normal_(self.beta, std=beta_std)
        nn.init.constant_(self.lmbda, self.lambda_init)

    def reset_to_unit_distance(self, squared: float) -> None:
        """Start at Σ = σ I, β ~ N(0, σ/D), such that E d_F(x, y) is about 1 for points with E|x - y|² = squared."""
        # d = sqrt(σ) |v| (1 + λ E|n|/sqrt(D)) with n standard normal
        one_form = 1.0 + self.lambda_init * math.sqrt(2.0 / (math.pi * self.in_features))
        self.start_at(sigma=1.0 / (squared * one_form**2))

    def forward(self, x: Tensor, y: Tensor | None = None, scale: Tensor | None = None, frame: bool = False) -> Tensor:
        """Distances d_F(x, y) from x [..., D] to each row of y [C, D] -> [..., C], or without y the norms F(x) [...].

        All that reads the parameters in a forward pass comes through here, so that hooks see it.

        Args:
            x: points, or vectors without y.
            y: points.
            scale: [1], multiplies the distances; one autograd node with them in eager mode.
            frame: give the :class:`Frame` of the metric for points like x in the place of distances.

        Returns:
            In the promoted dtype of x and y, or of x and the parameters.

        Raises:
            ValueError: a last dimension other than D, or y that is not 2-D.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102  what follows is not compiled
            if frame:
                return orthonormal_frame(*self.tensors(torch.promote_types(x.dtype, torch.float32)), self.eps)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected features [..., {self.in_features}], got shape {list(x.shape)}")
        if y is not None and (y.dim() != 2 or y.shape[-1] != self.in_features):
            raise ValueError(f"expected points y [C, {self.in_features}], got shape {list(y.shape)}")
        if not torch.jit.is_scripting():
            return without_autocast(self._norm_or_distance, x, y, scale)
        return self._norm_or_distance(x, y, scale)

    @torch.jit.unused
    def norm(self, v: Tensor) -> Tensor:
        """F(v) of vectors v [..., D] -> [...]; d_F(x, y) of paired points is ``norm(x - y)``."""
        return self(v)

    def _norm_or_distance(self, x: Tensor, y: Tensor | None, scale: Tensor | None) -> Tensor:
        return self._norm(x) if y is None else self._scaled_distance(x, y, scale)

    def _norm(self, v: Tensor) -> Tensor:
        out_dtype, dtype = _dtypes(v, self.beta)
        sigma, tril, beta, lmbda = self.tensors(dtype)
        flat = v.to(dtype).reshape(-1, self.in_features)
        term = one_form_term(torch.mv(flat, beta), self.symmetric, self.eps)
        value = torch.sqrt(squared_norm(flat, sigma, tril, self.eps) + self.eps) + lmbda * term
        return value.to(out_dtype).reshape(v.shape[:-1])

    @torch.jit.ignore
    def reference(self, x: Tensor, y: Tensor) -> Tensor:
        """d_F(x, y) [B, C] for x [B, D], y [C, D] by the literal formula (the oracle); O(B·C·D) memory."""
        _, _, beta, lmbda = self.tensors(x.dtype)
        sigma = self.sigma().to(x.dtype)
        return reference_distance(x, y, sigma, beta, lmbda, self.eps, self.symmetric)

    @torch.jit.ignore
    def sigma(self) -> Tensor:
        """Σ as a dense matrix [D, D], in the dtype of the parameters."""
        if self.L is not None:
            tril = torch.tril(self.L)
            return tril @ tril.t() + self.eps * torch.eye(self.in_features, device=tril.device, dtype=tril.dtype)
        return torch.diag(self.log_sigma_diag.exp() + self.eps)

    def _scaled_distance(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        out_dtype, dtype = _dtypes(x, y)
        sigma, tril, beta, lmbda = self.tensors(dtype)
        flat = x.to(dtype).reshape(-1, self.in_features)
        y = y.to(dtype)
        scale = torch.ones_like(lmbda) if scale is None else scale.to(dtype)
        shape = x.shape[:-1] + y.shape[:1]
        if not torch.jit.is_scripting():  # noqa: SIM102  what follows is not compiled
            if not needs_plain_ops(x, y, beta):
                d = fused_distance(flat, y, sigma, tril, beta, lmbda, scale, self.eps, self.symmetric)
                return d.to(out_dtype).reshape(shape)
        d = scale * gemm_distance(flat, y, sigma, tril, beta, lmbda, self.eps, self.symmetric)
        return d.to(out_dtype).reshape(shape)

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """Effective diagonal of Σ or lower-triangular factor, β and λ in ``dtype``."""
        sigma: Tensor | None = None
        tril: Tensor | None = None
        if self.L is not None:
            tril = torch.tril(self.L.to(dtype))
        if self.log_sigma_diag is not None:
            sigma = self.log_sigma_diag.to(dtype).exp() + self.eps
        beta = self.beta.to(dtype)
        lmbda = absolute(self.lmbda.to(dtype))
        if not self.symmetric:
            beta = beta * self._randers_factor(sigma, tril, beta, lmbda)
        return sigma, tril, beta, lmbda

    def _randers_factor(self, sigma: Tensor | None, tril: Tensor | None, beta: Tensor, lmbda: Tensor) -> Tensor:
        if sigma is not None:
            dual = (beta * beta / sigma).sum()
        else:
            assert tril is not None
            dual = whitened_one_form(tril, beta, self.eps)[1].square().sum().to(beta.dtype)
        return self._randers_limit * torch.rsqrt(1.0 + lmbda * lmbda * dual)

    def extra_repr(self) -> str:
        return f"{self.in_features}, full_sigma={self.full_sigma}, symmetric={self.symmetric}, eps={self.eps:g}"


def absolute(scalar: Tensor) -> Tensor:
    """|scalar| with derivative 1 at 0, so that a λ that starts at 0 can leave it (torch.abs has derivative 0)."""
    return torch.where(scalar >= 0, scalar, -scalar)


def _dtypes(x: Tensor, y: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Result dtype and computing dtype (at least float32)."""
    out = torch.promote_types(x.dtype, y.dtype)
    return out, torch.promote_types(out, torch.float32)


def faim_distance(x: Tensor, y: Tensor, metric: FAIMMetric) -> Tensor:
    """Distances d_F(x, y) = F(x - y) from x [..., D] to each row of y [C, D] -> [..., C].

    For paired points use ``metric.norm(x - y)``; for the literal formula ``metric.reference(x, y)``.
    """
    return metric(x, y)
