"""FAIMChart: a metric with a base point, the coordinates in which a FAIM block works."""

import math

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from timm_faim.metric import FAIMMetric, FillsMissing, traced_call
from timm_faim.metric.frame import Frame

from .maps import exp_map, log_map

BASES = ("learned", "mean", "mlp")


class FAIMChart(FillsMissing, nn.Module):
    """Coordinates log_p(x) around a base point p, and back.

    Starts as the identity: Σ = I, λ = 0, p = 0. β starts at N(0, 1/D), so that λ has a gradient from the first step.

    Args:
        dim: D.
        metric: a metric to share, not registered here; None owns one.
        base: "learned", p a parameter [D]; "mean", p + g ∘ (mean of the input over its places), with a gate g [D] that
            starts at 0; "mlp", p + f(that mean) with timm's Mlp, whose last layer starts at 0.
        full_sigma: a full Σ, for an owned metric.
        symmetric: False is a Randers metric, for an owned one.
        channels_first: the input is [B, D, ...] instead of [B, ..., D].

    Parameters: ``p`` [D], those of ``metric`` and of the base point's function.

    Raises:
        ValueError: an unknown ``base``, a metric of another width.
    """

    def __init__(
        self,
        dim: int,
        metric: FAIMMetric | None = None,
        *,
        base: str = "learned",
        full_sigma: bool = False,
        symmetric: bool = True,
        channels_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if base not in BASES:
            raise ValueError(f"base must be one of {BASES}, got {base!r}")
        factory = {"device": device, "dtype": dtype}
        if metric is None:
            metric = self.owned_metric = FAIMMetric(dim, full_sigma, symmetric, lambda_init=0.0, **factory)
        elif metric.in_features != dim:
            raise ValueError(f"the metric has width {metric.in_features}, the chart {dim}")
        self._metric = (metric,)  # in a tuple: a shared metric is no submodule
        self.dim, self.base, self.channels_first = dim, base, channels_first
        self.p = nn.Parameter(torch.empty(dim, **factory))
        self.register_parameter("gate", nn.Parameter(torch.empty(dim, **factory)) if base == "mean" else None)
        self.mlp = Mlp(dim, max(1, dim // 4), dim).to(device=device, dtype=dtype) if base == "mlp" else None
        self.reset_parameters()

    @property
    def metric(self) -> FAIMMetric:
        """The metric, shared or owned (a copy or a wrapper by now, where the chart was copied or sharded)."""
        return self._modules.get("owned_metric") or self._metric[0]

    def reset_parameters(self) -> None:
        """Back to the identity (a shared metric is left as it is)."""
        nn.init.zeros_(self.p)
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        if self.mlp is not None:
            nn.init.zeros_(self.mlp.fc2.weight)
            nn.init.zeros_(self.mlp.fc2.bias)
        if "owned_metric" in self._modules:
            self.metric.start_at(beta_std=1.0 / math.sqrt(self.dim), sigma=1.0 - self.metric.eps)

    def forward(
        self, x: Tensor, p: Tensor | None = None, frame: Frame | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Frame]:
        """Into the tangent space and back; all that reads parameters in a forward pass, so that hooks see it.

        Args:
            x: features, or with p and frame coordinates, [B, ..., D] or [B, D, ...] with ``channels_first``.
            p: base point, and
            frame: the metric's frame, as the call on the features gave them.

        Returns:
            The coordinates log_p(x), p and the frame; with p and frame the point exp_p(x).
        """
        node = traced_call(self, x, p, frame)
        if node is not None:
            return node
        if p is not None:
            return self.exp(x, p, frame)
        p, frame = self.base_point(x), self.frame(x)
        return self.log(x, p, frame), p, frame

    def base_point(self, x: Tensor) -> Tensor:
        """p for an input x: [D], or for a dynamic p one per sample that broadcasts with x."""
        if self.base == "learned":
            return self.p.clone()  # it outlives the call, after which a sharded parameter is gone
        places = tuple(range(2, x.dim())) if self.channels_first else tuple(range(1, x.dim() - 1))
        mean_BD = x.mean(places) if places else x
        p_BD = self.p + (self.gate * mean_BD if self.mlp is None else self.mlp(mean_BD))
        shape = [len(x)] + [1] * (x.dim() - 1)
        shape[1 if self.channels_first else -1] = self.dim
        return p_BD.reshape(shape)

    def frame(self, x: Tensor) -> Frame:
        """The metric's frame for an input x, to be used by both maps of a forward pass."""
        return self.metric(x, frame=True)

    def log(self, x: Tensor, p: Tensor, frame: Frame | None = None) -> Tensor:
        """log_p(x), see :func:`timm_faim.log_map`."""
        return log_map(x, p, self.metric, 1 if self.channels_first else -1, frame)

    def exp(self, w: Tensor, p: Tensor, frame: Frame | None = None) -> Tensor:
        """exp_p(w), see :func:`timm_faim.exp_map`."""
        return exp_map(w, p, self.metric, 1 if self.channels_first else -1, frame)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, channels_first={self.channels_first}"
