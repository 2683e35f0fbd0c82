"""Heads over parts of features: one of a kind on each part, or FAIM on all parts as one point of one sphere.

Both have ``loss(x, target, smoothing)``, ``start_(x, y)``, ``forward(x)`` for log-posteriors up to a constant, and
``logits(x)`` by part.

Shapes: B images, C classes, D features of all parts.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from heads import METHODS
from refits import PartFit
from torch import Tensor, nn
from torch.nn import functional as F

import timm_faim
from timm_faim.head.margin import subtract_margin
from timm_faim.metric.low_rank import LowRankFrame


class PartHeads(nn.Module):
    """A head of one kind on each part, trained by the sum of their losses; predicts by the sum of log-posteriors."""

    def __init__(self, builder: Callable, widths: dict[str, int], num_classes: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.widths = widths
        self.heads = nn.ModuleDict({part: builder(D, num_classes, **options) for part, D in widths.items()})

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.widths, x.split(list(self.widths.values()), 1), strict=True))

    def loss(self, x: Tensor, target: Tensor, smoothing: float) -> Tensor:
        losses = [
            F.cross_entropy(self.heads[part](each, target), target, label_smoothing=smoothing)
            for part, each in self._split(x).items()
        ]
        return torch.stack(losses).sum()

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """By part, at the scale of training: IsoMax+ takes its own away, which would make its posteriors flat."""
        return {
            part: self.heads[part](each) * getattr(self.heads[part], "entropic_scale", 1.0)
            for part, each in self._split(x).items()
        }

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([each.log_softmax(1) for each in self.logits(x).values()]).sum(0)

    def start_(self, x: Tensor, y: Tensor) -> None:
        for part, each in self._split(x).items():
            if isinstance(self.heads[part], timm_faim.FAIMHead):
                timm_faim.fit_(self.heads[part], [(each, y)])
            else:
                self.heads[part].start_(each, y)


class ProductHead(nn.Module):
    """FAIM on parts: √w_i ẑ_i side by side are one point of one sphere; d = sqrt(2 - 2 Σ w_i cos_i + ε), w_i alike.

    ``start_`` fits centre and Σ of each part and its prototypes; Σ is then frozen.
    """

    def __init__(
        self, widths: dict[str, int], num_classes: int, *, rank: int = 256, scale: float = 16.0, margin: float = 0.2
    ) -> None:
        super().__init__()
        self.widths, self.margin = widths, margin
        ranks = {part: D if D <= 2048 else rank for part, D in widths.items()}
        self.frames = nn.ModuleDict({part: LowRankFrame(D, ranks[part]) for part, D in widths.items()})
        self.mu = nn.ParameterDict({p: torch.randn(num_classes, D) / math.sqrt(D) for p, D in widths.items()})
        self.scale = nn.Parameter(torch.full((1,), scale))

    _split = PartHeads._split

    def _cosines(self, x: Tensor) -> dict[str, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return {
                part: F.normalize(self.frames[part](each), dim=1) @ F.normalize(self.mu[part], dim=1).t()
                for part, each in self._split(x).items()
            }

    def _scaled(self, cosine_BC: Tensor) -> Tensor:
        return -self.scale.abs() * (2.0 + 1e-6 - 2.0 * cosine_BC).clamp_min(1e-7).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self._scaled(torch.stack(list(self._cosines(x).values())).mean(0))

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        return {part: self._scaled(cosine_BC) for part, cosine_BC in self._cosines(x).items()}

    def loss(self, x: Tensor, target: Tensor, smoothing: float) -> Tensor:
        logits = subtract_margin(self(x), target, self.scale.abs() * self.margin)
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    @torch.no_grad()
    def start_(self, x: Tensor, y: Tensor) -> None:
        for part, each in self._split(x).items():
            fit = PartFit(each, y, len(self.mu[part]), self.frames[part].rank)
            self.frames[part].load_state_dict(fit.frame.state_dict())
            self.mu[part].copy_(F.normalize(fit.frame(fit.means_CD), dim=1))


def build_head(method: str, widths: dict[str, int], num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The head of a method; FAIM on several parts is one on their product."""
    if method == "faim_indicatrix" and len(widths) > 1:
        return ProductHead(widths, num_classes, **options)
    return PartHeads(METHODS[method][0], widths, num_classes, options)
