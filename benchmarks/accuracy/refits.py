"""Closed-form classifiers of parts of features and their blends; the same for every method.

Of each part: class means in the frame of the shrunk within-class Σ on its sphere ("FAIM"), the same without the sphere
("LDA", linear discriminant analysis), and the sphere around the centre without Σ ("Σ = I"). Σ of a wide part is low
rank plus a multiple of the identity. A blend weighs the last part by w, the first by 1 - w.

Shapes: B and N images, C classes, D features of a part.
"""

import torch
from heads import class_means
from torch import Tensor
from torch.nn import functional as F

from timm_faim.metric.low_rank import LowRankFrame, RowScatter

KINDS = ("FAIM", "LDA", "Σ = I")
WEIGHTS, DEFAULT_WEIGHT = (0.3, 0.5, 0.7, 0.85), 0.7
SHARES = (0.25, 0.5, 0.75)  # of a refit in its blend with the trained head
SHRINKAGE, RANK, WIDE, SCALE = 0.3, 256, 2048, 16.0


class PartFit:
    """Centre, class means and frame of one part, from features [N, D] of classes [N]."""

    def __init__(self, x: Tensor, y: Tensor, num_classes: int, rank: int | None = None) -> None:
        D = x.shape[1]
        rank = min(rank or (RANK if D > WIDE else D), D)
        self.centre_D = x.mean(0)
        self.means_CD = class_means(x.double(), y, num_classes).to(x)
        residuals = x - self.means_CD[y]
        if D <= WIDE and len(residuals) > D:  # the same scatter in fewer rows
            residuals = torch.linalg.qr(residuals.double(), mode="r").R
        scatter = RowScatter(D, min(3 * rank, WIDE), x.device)
        scatter.add(residuals)
        degrees = max(len(y) - num_classes, 1)
        self.frame = LowRankFrame(D, rank, device=x.device).set_(self.centre_D, scatter, SHRINKAGE, degrees)

    def scores(self, kind: str, x: Tensor) -> Tensor:
        """[B, C]: cosines, or discriminants divided by the mean square of the class means, which is of their size."""
        if kind == "Σ = I":
            z, m = x - self.centre_D, self.means_CD - self.centre_D
        else:
            z, m = self.frame(x), self.frame(self.means_CD)
        if kind == "LDA":
            squares_C = m.square().sum(1)
            return (z @ m.t() - 0.5 * squares_C) / squares_C.mean()
        return F.normalize(z, dim=1) @ F.normalize(m, dim=1).t()


def distance_logits(cosines: Tensor) -> Tensor:
    """-γ d of cosines, as a FAIM head has them."""
    return -SCALE * (2.0 + 1e-6 - 2.0 * cosines).clamp_min(0.0).sqrt()


def refits(seen: dict[str, Tensor], y: Tensor, num_classes: int, test: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores [B, C] of ``test`` by "kind part" and, of two parts, "kind w", from parts ``seen`` of classes ``y``."""
    fits = {part: PartFit(x, y, num_classes) for part, x in seen.items()}
    found = {}
    for kind in KINDS:
        scores = [fits[part].scores(kind, x) for part, x in test.items()]
        found |= {f"{kind} {part}": each for part, each in zip(test, scores, strict=True)}
        if len(scores) == 2:
            found |= {f"{kind} {w}": (1.0 - w) * scores[0] + w * scores[1] for w in WEIGHTS}
    return found


def default_refit(kind: str, parts: list[str]) -> str:
    """The name of the one fixed choice of a kind."""
    return f"{kind} {DEFAULT_WEIGHT}" if len(parts) == 2 else f"{kind} {parts[0]}"


def blends(trained: Tensor, refitted: dict[str, Tensor], parts: list[str]) -> dict[str, Tensor]:
    """Trained logits with the fixed refit of each kind, log-posteriors weighed by 1 - share and share."""
    found = {}
    for kind in KINDS:
        other = (SCALE * refitted[default_refit(kind, parts)]).log_softmax(1)
        own = trained.log_softmax(1)
        found |= {f"trained + {share} {kind}": (1.0 - share) * own + share * other for share in SHARES}
    return found
