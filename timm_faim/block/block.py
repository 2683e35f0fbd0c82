"""FAIMBlock: log map → W → exp map around any module."""

from typing import Any

from timm.layers import Attention, Mlp
from torch import Tensor, nn

from .chart import FAIMChart

_INNER = {"linear": lambda dim, **options: nn.Linear(dim, dim, **options), "mlp": Mlp, "attention": Attention}
_RESIDUALS = ("none", "tangent", "ambient")


class FAIMBlock(nn.Module):
    """x ↦ exp_p(W(log_p(x))), in isometric normal coordinates around p.

    It starts equal to ``inner`` alone, and bends as Σ, λ, β and p learn.

    Args:
        dim: D, the width of input and output.
        inner: W: "linear", "mlp" or "attention" for a fresh one of torch or timm, or any module from [..., D] to
            [..., D] of the same shape.
        residual: "none", exp_p(W(w)), for a module that has its own (timm's blocks do); "tangent", exp_p(w + W(w));
            "ambient", x + exp_p(W(w)) - p.
        inner_options: arguments of a fresh W.
        **chart: options of :class:`FAIMChart` (metric, base, full_sigma, symmetric, channels_first).

    Raises:
        ValueError: an unknown ``inner`` or ``residual``, and what FAIMChart says.
    """

    def __init__(
        self,
        dim: int,
        inner: str | nn.Module = "mlp",
        *,
        residual: str = "none",
        inner_options: Any = None,
        **chart: Any,
    ) -> None:
        super().__init__()
        if not (isinstance(inner, nn.Module) or inner in _INNER):
            raise ValueError(f"inner must be a module or one of {tuple(_INNER)}, got {inner!r}")
        if residual not in _RESIDUALS:
            raise ValueError(f"residual must be one of {_RESIDUALS}, got {residual!r}")
        self.inner = _INNER[inner](dim, **(inner_options or {})) if isinstance(inner, str) else inner
        self.residual = residual
        self.chart = FAIMChart(dim, **chart)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features like x: [B, ..., D], or [B, D, ...] with ``channels_first``; further arguments go to W."""
        w, p, frame = self.chart(x)
        out = self.inner(w, *args, **kwargs)
        out = self.chart(w + out if self.residual == "tangent" else out, p, frame)
        if self.residual != "ambient":
            return out
        if self.chart.channels_first and p.dim() == 1:
            p = p.reshape(-1, *[1] * (x.dim() - 2))
        return (x + out - p).to(x.dtype)

    def extra_repr(self) -> str:
        return f"residual={self.residual}"
