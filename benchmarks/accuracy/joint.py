"""Heads over parts of features: one of a kind on each part, or FAIM on all parts as one point of one sphere.

Both have ``loss(x, target, smoothing)``, ``start_(x, y)``, ``forward(x)`` for log-posteriors up to a constant, and
``logits(x)`` by part.

Shapes: B images, C classes, D features of all parts.
"""

from collections.abc import Callable
from typing import Any

import torch
from heads import METHODS, Faim
from refits import DEFAULT_WEIGHT
from torch import Tensor, nn
from torch.nn import functional as F

import timm_faim
from timm_faim.head.parts import part_cosines


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


class ProductHead(Faim):
    """The package's FAIM head on parts: one point of one sphere, of the refit's weights. ``start_`` fits it."""

    def __init__(self, widths: dict[str, int], num_classes: int, *, scale: float = 16.0, margin: float = 0.2) -> None:
        weights = (1.0 - DEFAULT_WEIGHT, DEFAULT_WEIGHT)
        options = {"scale_init": scale, "margin": margin, "parts": list(widths.values()), "part_weights": weights}
        super().__init__(sum(widths.values()), num_classes, **options)
        self.names = list(widths)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """By part."""
        scaled = [-self.gamma() * (2.0 + 1e-6 - 2.0 * each).clamp_min(1e-7).sqrt() for each in part_cosines(self, x)]
        return dict(zip(self.names, scaled, strict=True))

    def loss(self, x: Tensor, target: Tensor, smoothing: float) -> Tensor:
        return F.cross_entropy(self(x, target), target, label_smoothing=smoothing)

    def start_(self, x: Tensor, y: Tensor) -> None:
        timm_faim.fit_(self, [(x, y)])


def build_head(method: str, widths: dict[str, int], num_classes: int, options: dict[str, Any]) -> nn.Module:
    """The head of a method; FAIM on several parts is one on their product."""
    if method == "faim_indicatrix" and len(widths) > 1:
        return ProductHead(widths, num_classes, **options)
    return PartHeads(METHODS[method][0], widths, num_classes, options)
