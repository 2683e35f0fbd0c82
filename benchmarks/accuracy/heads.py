"""Peer heads of the accuracy benchmarks, and every method's builder and search ranges.

All are ``head(in_features, num_classes, **options)`` with ``forward(x [B, D], target=None) -> logits [B, C]`` in
float32, also under autocast. A target (class indices [B], or soft targets [B, C]) applies the margin in training mode.
Nothing in ``forward`` looks at values, so that a step can be captured in a CUDA graph.

``start_(features [N, D], targets [N])`` sets the prototypes of a peer to the class means, so that no method is alone
in starting from data ("imprinted weights", Qi et al. 2018, arXiv:1712.07136).

Shapes: B images, C classes, D features, K sub-centres.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_faim import PRESETS, FAIMHead
from timm_faim.head.margin import subtract_margin

Ranges = dict[str, tuple[float, float, str]]  # option -> (low, high, 'log' or 'linear')


def place(u: float, range_: tuple[float, float, str]) -> float:
    """The value of an option at u in [0, 1] of its range."""
    low, high, kind = range_
    return low * (high / low) ** u if kind == "log" else low + u * (high - low)


def class_means(features: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Means [C, D] of features [N, D] by class; 0 for a class without one."""
    sums_CD = features.new_zeros(num_classes, features.shape[1]).index_add_(0, targets, features)
    return sums_CD / torch.bincount(targets, minlength=num_classes).clamp_min(1).to(features)[:, None]


def at_target(plain_BC: Tensor, changed_BC: Tensor, target: Tensor) -> Tensor:
    """``changed`` where the target is, ``plain`` elsewhere; soft targets [B, C] weigh the two."""
    if target.dim() == 1:
        target = torch.zeros_like(plain_BC).scatter(1, target[:, None], 1.0)
    return plain_BC + target.to(plain_BC.dtype) * (changed_BC - plain_BC)


class Linear(nn.Linear):
    """x W' + b, the usual head. ``scale`` and ``margin`` have no meaning here and are not taken."""

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())

    def start_(self, features: Tensor, targets: Tensor) -> None:
        """Zero weights: softmax regression is convex, so that the start decides nothing but the path."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Cosine(nn.Module):
    """s cos θ, with a margin m at the target in training.

    * ``kind='none'``: s cos θ, s learned ("NormFace", Wang et al. 2017, arXiv:1704.06369);
    * ``kind='cosface'``: s (cos θ - m) (CosFace, Wang et al. 2018, arXiv:1801.09414, eq. 4), s fixed;
    * ``kind='arcface'``: s cos(θ + m) (ArcFace, Deng et al. 2019, arXiv:1801.07698, eq. 3), s fixed; past θ = π - m,
      where that would rise again, s (cos θ - m sin m) as in its reference code.

    ``sub_centres`` = K > 1 takes the largest cosine of K prototypes a class (Sub-center ArcFace, Deng et al. 2020,
    ECCV, section 3.2).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: str = "none",
        scale: float = 16.0,
        margin: float = 0.0,
        sub_centres: int = 1,
    ) -> None:
        super().__init__()
        if kind not in ("none", "cosface", "arcface"):
            raise ValueError(f"kind must be none, cosface or arcface, got {kind!r}")
        self.kind, self.margin, self.sub_centres = kind, margin, sub_centres
        self.weight = nn.Parameter(torch.randn(num_classes * sub_centres, in_features) / math.sqrt(in_features))
        self.scale = nn.Parameter(torch.full((1,), scale), requires_grad=kind == "none")

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            cosine_BC = F.normalize(x.float(), dim=1) @ F.normalize(self.weight, dim=1).t()
            if self.sub_centres > 1:
                cosine_BC = cosine_BC.unflatten(1, (-1, self.sub_centres)).amax(2)
            if target is not None and self.training and self.kind != "none":
                cosine_BC = at_target(cosine_BC, self._with_margin(cosine_BC), target)
            return self.scale * cosine_BC

    def _with_margin(self, cosine: Tensor) -> Tensor:
        m = self.margin
        if self.kind == "cosface":
            return cosine - m
        sine = (1.0 - cosine.square()).clamp_min(1e-6).sqrt()
        return torch.where(
            cosine > math.cos(math.pi - m), cosine * math.cos(m) - sine * math.sin(m), cosine - m * math.sin(m)
        )

    @torch.no_grad()
    def start_(self, features: Tensor, targets: Tensor) -> None:
        """Mean directions; sub-centres begin near each other, apart by noise of a tenth of their length."""
        K = self.sub_centres
        means_CD = class_means(F.normalize(features.float(), dim=1), targets, len(self.weight) // K)
        means_CD = F.normalize(means_CD, dim=1).repeat_interleave(K, 0)
        noise_CD = torch.randn_like(means_CD) * (0.1 / math.sqrt(means_CD.shape[1])) if K > 1 else 0.0
        self.weight.copy_(means_CD + noise_CD)


class EuclideanPrototypes(nn.Module):
    """-s |x - p|² (Prototypical Networks, Snell et al. 2017, arXiv:1703.05175), s > 0 and the prototypes learned.

    ``scale`` is s D, as the squared distance of features of unit variance grows with D; ``margin`` is added to the
    target's |x - p|² / D in training.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 10.0, margin: float = 0.0) -> None:
        super().__init__()
        self.margin = margin
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))
        self.scale = nn.Parameter(torch.full((1,), scale))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            squares_BC = x.square().sum(1, keepdim=True) + self.weight.square().sum(1) - 2.0 * x @ self.weight.t()
            squares_BC = squares_BC / x.shape[1]
            if target is not None and self.training and self.margin > 0:
                squares_BC = at_target(squares_BC, squares_BC + self.margin, target)
            return -self.scale.abs() * squares_BC

    @torch.no_grad()
    def start_(self, features: Tensor, targets: Tensor) -> None:
        """Class means."""
        self.weight.copy_(class_means(features.float(), targets, len(self.weight)))


class IsoMaxPlus(nn.Module):
    """-E |d| ‖x/|x| - p/|p|‖ with a learned distance scale d (IsoMax+, Macêdo et al. 2021, arXiv:2105.14399).

    ``scale`` is the entropic scale E, applied in training and taken away for inference, as published: predictions
    stay, confidences are low by design. No margin.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 10.0) -> None:
        super().__init__()
        self.entropic_scale = scale
        self.weight = nn.Parameter(torch.randn(num_classes, in_features))
        self.distance_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            cosine_BC = F.normalize(x.float(), dim=1) @ F.normalize(self.weight, dim=1).t()
            distance_BC = (2.0 - 2.0 * cosine_BC).clamp_min(1e-8).sqrt()
            logits_BC = -self.distance_scale.abs() * distance_BC
            return self.entropic_scale * logits_BC if self.training else logits_BC

    @torch.no_grad()
    def start_(self, features: Tensor, targets: Tensor) -> None:
        """Mean directions."""
        means_CD = class_means(F.normalize(features.float(), dim=1), targets, len(self.weight))
        self.weight.copy_(F.normalize(means_CD, dim=1))


def _cosine(kind: str, sub_centres: int = 1) -> Callable[..., nn.Module]:
    return lambda D, C, **options: Cosine(D, C, kind=kind, sub_centres=sub_centres, **options)


class Faim(FAIMHead):
    """Takes the target, as the peers do; in a model TargetMargin does this."""

    def forward(self, x: Tensor, target: Tensor | None = None, embeds: bool = False) -> Tensor:
        logits = super().forward(x, embeds)
        if target is None or not self.training:
            return logits
        return subtract_margin(logits, target, self.gamma() * self.margin)


def _faim(**fixed) -> Callable[..., nn.Module]:
    """FAIMHead under the names of options that the peers use."""
    return lambda D, C, scale=16.0, margin=0.0: Faim(D, C, **fixed | {"scale_init": scale, "margin": margin})


_SCALE = {"scale": (8.0, 64.0, "log")}
_DISTANCE_SCALE = {"scale": (4.0, 32.0, "log")}
_MARGINS = {"margin": (0.0, 0.5, "linear")}

# name -> (builder(in_features, num_classes, **options), ranges of its options). Learning rate, weight decay and label
# smoothing belong to the training loop. On the sphere -s d²/2 = s (cos θ - 1), hence like ranges for both.
METHODS: dict[str, tuple[Callable[..., nn.Module], Ranges]] = {
    "linear": (Linear, {}),
    "cosine": (_cosine("none"), _SCALE),
    "cosface": (_cosine("cosface"), _SCALE | _MARGINS),
    "arcface": (_cosine("arcface"), _SCALE | _MARGINS),
    "subcentre_arcface": (_cosine("arcface", 3), _SCALE | _MARGINS),
    "euclidean": (EuclideanPrototypes, {"scale": (4.0, 64.0, "log"), "margin": (0.0, 0.5, "linear")}),
    "isomax_plus": (IsoMaxPlus, {"scale": (4.0, 40.0, "log")}),
    "faim_mahalanobis": (_faim(**PRESETS["flat"] | {"lambda_init": 0.0}), _DISTANCE_SCALE | _MARGINS),
    "faim_sphere": (_faim(space="sphere"), _DISTANCE_SCALE | _MARGINS),
    "faim_indicatrix": (_faim(), _DISTANCE_SCALE | _MARGINS),
    "faim_indicatrix_eye": (_faim(full_sigma=False), _DISTANCE_SCALE | _MARGINS),
    "faim_indicatrix_beta": (_faim(lambda_init=0.1), _DISTANCE_SCALE | _MARGINS),
}
