"""Rows of a head by what its classes are made of: classes from before, images of their own, or both.

A class that stays keeps its row bit for bit. Images give the point that a closed-form fit would under the head's own
frame: the mean of the features in it, z / F(z). Several sources give the mean of their points, weighted by their
images; its parts are as long as theirs are on average. Off flat heads the length of a new row, on which distances don't
depend, is the median of those before, so that it trains on at their rate.

Shapes: C classes before, S sources of one class, D features.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_faim.head import FAIMHead
from timm_faim.run.errors import few

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
def rebuild_(head: FAIMHead, sources: Sequence[Source], weights: Mapping[int, Tensor], fresh_KD: Tensor | None) -> None:
    """Set μ and the prior of ``head`` to those of other classes, in place.

    A merged class has the log of its classes' summed priors, one of images alone the mean of all.

    Args:
        head: of the classes before.
        sources: the classes in their new order.
        weights: of the sources [S] of each class that does not just stay, by its place; of sum 1.
        fresh_KD: mean features of the new images.
    """
    mu_CD = head.mu.double()
    fresh_KD = mu_CD[:0] if fresh_KD is None else fresh_KD.to(mu_CD)
    points_KD = head.embed(fresh_KD) if head.center is not None else head.project(fresh_KD)
    length = mu_CD.norm(dim=1).median()
    first = [source.before[0] if source.before else 0 for source in sources]  # what does not stay is set below
    rows_CD = head.mu[first]
    prior_C = None if head.prior is None else head.prior[first]
    for i, weight_S in weights.items():
        before, new = list(sources[i].before), [] if sources[i].fresh is None else [sources[i].fresh]
        points_SD = torch.cat([head.project(mu_CD[before]), points_KD[new]]).double()
        row_D = _mean(points_SD, weight_S.to(points_SD), None if head.is_flat else head.parts)
        rows_CD[i] = row_D if head.is_flat else row_D * (length / row_D.norm())
        if prior_C is not None:
            prior_C[i] = head.prior[before].double().logsumexp(0) if before else head.prior.double().mean()
    head.mu = nn.Parameter(rows_CD, requires_grad=head.mu.requires_grad)
    if prior_C is not None:
        head.prior = nn.Parameter(prior_C, requires_grad=head.prior.requires_grad)


def weights_of(sources: Sequence[Source], images: Sequence[int] | None, means: Means | None) -> dict[int, Tensor]:
    """Weights [S] of the sources of each class that does not just stay, by its place, of sum 1: by training images, or
    alike where those are not known."""
    weights, alike = {}, []
    for i, source in enumerate(sources):
        if source.stays:
            continue
        counts = [None if images is None else images[k] for k in source.before]
        counts += [] if source.fresh is None or means is None else [means.counts[source.fresh]]
        known = [1 if count is None else count for count in counts]
        if len(counts) > 1 and (None in counts or not sum(known)):
            known = [1] * len(counts)
            alike.append(source.name)
        weights[i] = torch.tensor(known, dtype=torch.float64) / sum(known)
    if alike:
        _logger.warning(f"training images of the classes are not known: equal weights make {few(alike)}")
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
