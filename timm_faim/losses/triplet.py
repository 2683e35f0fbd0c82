"""Triplet loss with d_F: margin + d_F(anchor, positive) - d_F(anchor, negative)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import FAIMLoss, check_positive

_MININGS = ("batch-hard", "semi-hard", "all")


class FAIMTripletLoss(FAIMLoss):
    """Triplet loss: max(0, d_F(a, p) - d_F(a, n) + m), or log(1 + e^(d_F(a, p) - d_F(a, n))) with ``soft_margin``.

    | mining | triplets | mean over |
    |---|---|---|
    | batch-hard | farthest positive, nearest negative of each anchor (Hermans et al. 2017) | anchors |
    | semi-hard | each positive pair with the nearest negative farther than the positive, | positive pairs |
    |  | else with the farthest negative (Schroff et al. 2015) | |
    | all | every one | those of positive loss (Hermans et al. 2017) |
    |  | with ``soft_margin`` | all triplets |

    A miner's pairs are the positives and negatives to choose from. Its triplets are taken as they are: mean over all of
    them, or with ``all`` over those of positive loss.

    ``semi-hard`` and ``all`` sort each anchor's negatives, in O(B·N log N) time and O(B·N) memory; ``all`` with
    ``soft_margin`` visits every triplet.

    Args:
        metric, in_features: one of them, see :class:`FAIMLoss`.
        margin: m > 0.
        mining: see the table.
        soft_margin: softplus instead of the hinge; the margin is not used.
        **options: normalize, reducer, cross_rank of :class:`FAIMLoss`.

    Raises:
        ValueError: margin <= 0, an unknown mining; on call, see :class:`FAIMLoss`.
    """

    def __init__(
        self,
        metric: Any = None,
        in_features: int | None = None,
        margin: float = 0.2,
        *,
        mining: str = "batch-hard",
        soft_margin: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(metric, in_features, **options)
        self.margin = check_positive(margin, "margin")
        if mining not in _MININGS:
            raise ValueError(f"mining must be one of {_MININGS}, got {mining!r}")
        self.mining, self.soft_margin = mining, soft_margin

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; arguments as in :meth:`FAIMLoss.forward`."""
        if indices_tuple is None or len(indices_tuple) != 3:
            return super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self.check(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        x_BD = self.embed(embeddings)
        distance_BN = self.distances(x_BD, x_BD if ref_emb is None else self.embed(ref_emb))
        anchors, positives, negatives = indices_tuple
        losses_T = self._excess(distance_BN[anchors, positives] - distance_BN[anchors, negatives])
        every = self.mining != "all" or self.soft_margin
        counts_T = torch.ones_like(losses_T) if every else (losses_T > 0).to(losses_T.dtype)
        zeros_B = torch.zeros_like(distance_BN[:, 0])
        losses_B, counts_B = (zeros_B.index_add(0, anchors, t) for t in (losses_T, counts_T))
        return self.reduce(losses_B, counts_B, embeddings, labels)

    def row_losses(self, distance_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FAIMLoss.row_losses`."""
        if self.mining == "batch-hard":
            return self._hardest(distance_bN, positive_bN, negative_bN)
        if self.mining == "all" and self.soft_margin:
            return self._every_soft(distance_bN, positive_bN, negative_bN)
        sorted_bN = distance_bN.masked_fill(~negative_bN, torch.inf).sort(1).values
        negatives_b1 = negative_bN.sum(1, keepdim=True)
        both_bN = positive_bN & (negatives_b1 > 0)
        losses_bN, counts_bN = (self._semi_hard if self.mining == "semi-hard" else self._every)(
            distance_bN, sorted_bN, negatives_b1
        )
        return losses_bN.masked_fill(~both_bN, 0.0).sum(1), counts_bN.masked_fill(~both_bN, 0.0).sum(1)

    def _excess(self, difference: Tensor) -> Tensor:
        return softplus(difference) if self.soft_margin else (difference + self.margin).relu()

    def _hardest(self, distance_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        has_both = positive_bN.any(1) & negative_bN.any(1)
        farthest = distance_bN.masked_fill(~positive_bN, -torch.inf).amax(1)
        nearest = distance_bN.masked_fill(~negative_bN, torch.inf).amin(1)
        difference = farthest.where(has_both, 0.0) - nearest.where(has_both, 0.0)
        return self._excess(difference).where(has_both, 0.0), has_both.to(distance_bN.dtype)

    def _semi_hard(self, distance_bN: Tensor, sorted_bN: Tensor, negatives_b1: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.searchsorted(sorted_bN.detach(), distance_bN.detach().contiguous(), right=True)
        place = torch.minimum(place, (negatives_b1 - 1).clamp_min(0))  # none is farther: the farthest negative
        difference = distance_bN - sorted_bN.gather(1, place)
        return self._excess(difference.masked_fill(negatives_b1 == 0, 0.0)), torch.ones_like(distance_bN)

    def _every(self, distance_bN: Tensor, sorted_bN: Tensor, negatives_b1: Tensor) -> tuple[Tensor, Tensor]:
        """The hinge summed over all negatives of each pair: k t - (sum of the k negatives below t = d + m)."""
        reach_bN = distance_bN + self.margin
        below_bN = torch.searchsorted(sorted_bN.detach(), reach_bN.detach().contiguous())
        sums_bN = sorted_bN.masked_fill(sorted_bN == torch.inf, 0.0).cumsum(1)
        sums_bN = torch.nn.functional.pad(sums_bN, (1, 0)).gather(1, below_bN)
        counts_bN = below_bN.to(distance_bN.dtype)
        return counts_bN * reach_bN - sums_bN, counts_bN

    def _every_soft(self, distance_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        anchors, positives = positive_bN.nonzero(as_tuple=True)
        difference_MN = distance_bN[anchors, positives][:, None] - distance_bN[anchors]
        losses_M = self._excess(difference_MN).masked_fill(~negative_bN[anchors], 0.0).sum(1)
        losses_b = torch.zeros_like(distance_bN[:, 0]).index_add(0, anchors, losses_M)
        return losses_b, (positive_bN.sum(1) * negative_bN.sum(1)).to(distance_bN.dtype)

    def extra_repr(self) -> str:
        margin = "soft_margin" if self.soft_margin else f"margin={self.margin:g}"
        return f"{super().extra_repr()}, {margin}, mining={self.mining}"
