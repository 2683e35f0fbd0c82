"""Rows of a head by what its classes are made of: classes from before, images of their own, or both.

A class that stays keeps its row bit for bit. Images give the point that a closed-form fit would under the head's own
frame: the mean of the features in it, z / F(z). Several sources give the mean of their points, weighted by their
images; its parts are as long as theirs are on average. Off flat heads the length of a new row, on which distances don't
depend, is the median of those before, so that it trains on at their rate.

Shapes: C classes before, S sources of one class, D features.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_faim.head import FAIMHead

from .features import Means

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What a class is made of: numbers of classes from before, and its place among classes with new images."""

    name: str
    before: tuple[int, ...] = ()
    fresh: int | None = None

    @property
    def stays(self) -> bool:
        """Whether it is a class from before and nothing else."""
        return len(self.before) == 1 and self.fresh is None


@torch.no_grad()
def rebuild_(head: FAIMHead, sources: Sequence[Source], weights: Sequence[Tensor], fresh_KD: Tensor | None) -> None:
    """Set μ and the prior of ``head`` to those of other classes, in place.

    A merged class has the log of its classes' summed priors, one of images alone the mean of all.

    Args:
        head: of the classes before.
        sources: the classes in their new order.
        weights: of each class's sources [S], of sum 1.
        fresh_KD: mean features of the new images.
    """
    mu_CD = head.mu.double()
    fresh_KD = mu_CD[:0] if fresh_KD is None else fresh_KD.to(mu_CD)
    points_KD = head.embed(fresh_KD) if head.center is not None else head.project(fresh_KD)
    points_CD = head.project(mu_CD)
    length = mu_CD.norm(dim=1).median()
    rows, priors = [], []
    for source, weight_S in zip(sources, weights, strict=True):
        before, new = list(source.before), [] if source.fresh is None else [source.fresh]
        if source.stays:
            rows.append(head.mu[before[0]])
        else:
            points_SD = torch.cat([points_CD[before], points_KD[new]]).double()
            row_D = _mean(points_SD, weight_S.to(points_SD), head.parts if not head.is_flat else None)
            rows.append((row_D if head.is_flat else row_D * (length / row_D.norm())).to(head.mu.dtype))
        if head.prior is not None:
            mass = head.prior[before].double().logsumexp(0) if before else head.prior.double().mean()
            priors.append(head.prior[before[0]] if source.stays else mass.to(head.prior.dtype))
    head.mu = _like(head.mu, torch.stack(rows))
    if head.prior is not None:
        head.prior = _like(head.prior, torch.stack(priors))


def weights_of(sources: Sequence[Source], images: Sequence[int] | None, means: Means | None) -> list[Tensor]:
    """Weights [S] of each class's sources, of sum 1: by training images, or alike where those are not known."""
    weights, alike = [], []
    for source in sources:
        counts = [None if images is None else images[k] for k in source.before]
        counts += [] if source.fresh is None or means is None else [means.counts[source.fresh]]
        known = [1 if count is None else count for count in counts]
        if len(counts) > 1 and (None in counts or not sum(known)):
            known = [1] * len(counts)
            alike.append(source.name)
        weights.append(torch.tensor(known, dtype=torch.float64) / max(1, sum(known)))
    if alike:
        _logger.warning(f"training images of the classes are not known: equal weights make {', '.join(alike)}")
    return weights


def counts_of(sources: Sequence[Source], images: Sequence[int] | None, means: Means | None) -> list[int] | None:
    """Images of each class; None where those before are not known."""
    if images is None:
        return None
    new = [0 if source.fresh is None or means is None else means.counts[source.fresh] for source in sources]
    return [sum(images[k] for k in source.before) + n for source, n in zip(sources, new, strict=True)]


def _mean(points_SD: Tensor, weight_S: Tensor, parts: Sequence[int] | None) -> Tensor:
    """The weighted mean [D]; with ``parts`` its pieces get their mean lengths back.

    Where the points cancel, as those of two classes around their mean do, the heaviest one stands for all.
    """
    mean_D = weight_S @ points_SD
    if parts is None:
        return mean_D
    if mean_D.norm() < 1e-6 * points_SD.norm(dim=1).max():
        return points_SD[weight_S.argmax()]
    pieces = zip(mean_D.split(list(parts)), points_SD.split(list(parts), 1), strict=True)
    return torch.cat(
        [piece / piece.norm().clamp_min(1e-12) * (weight_S @ whole.norm(dim=1)) for piece, whole in pieces]
    )


def _like(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(rows.detach().clone(), requires_grad=parameter.requires_grad)
