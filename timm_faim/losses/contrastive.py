"""InfoNCE (NT-Xent and SupCon) and N-pair losses with logits -d_F(x, y) / τ."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from .base import FAIMLoss, check_positive
from .processes import gather_all, gather_with_gradient, mean_over_processes, rank, world_size

_FORMS = ("ntxent", "supcon")


class FAIMInfoNCELoss(FAIMLoss):
    """InfoNCE with logits s_ij = -d_F(x_i, y_j) / τ.

        ntxent:  mean over positive pairs (i, p) of -log( e^s_ip / (e^s_ip + Σ_negatives n e^s_in) )
        supcon:  mean over anchors i of the mean over their positives p of -log( e^s_ip / Σ_{j ≠ i} e^s_ij )

    Source: van den Oord et al. 2018 (InfoNCE), Chen et al. 2020 (NT-Xent), Khosla et al. 2020 (SupCon, L_out). Two
    views of each image with the image's number as label make the self-supervised loss. Memory is O(B·N) and, above
    ``pairs.BLOCK`` entries, that of a block of rows.

    Args:
        metric, in_features: one of them, see :class:`FAIMLoss`.
        temperature: τ > 0.
        form: "ntxent" or "supcon".
        **options: normalize, reducer, cross_rank of :class:`FAIMLoss`.

    Raises:
        ValueError: temperature <= 0, an unknown form; on call, see :class:`FAIMLoss`.
    """

    def __init__(
        self, metric: Any = None, in_features: Optional[int] = None, temperature: float = 0.1, *,
        form: str = "ntxent", **options: Any,
    ) -> None:
        super().__init__(metric, in_features, **options)
        self.temperature = check_positive(temperature, "temperature")
        if form not in _FORMS:
            raise ValueError(f"form must be one of {_FORMS}, got {form!r}")
        self.form = form

    def distances(self, x_BD: Tensor, y_ND: Tensor) -> Tensor:
        """The logits -d_F(x, y) / τ [B, N], in one node with the distance."""
        scale = torch.full_like(self.metric.lmbda, -1.0 / self.temperature, requires_grad=False)
        return self.metric.scaled_distance(x_BD, y_ND, scale)

    def row_losses(self, logits_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FAIMLoss.row_losses`; the distances are logits here."""
        positives_b = positive_bN.sum(1)
        if self.form == "supcon":
            others_b = logits_bN.masked_fill(~(positive_bN | negative_bN), -torch.inf).logsumexp(1)
            mean_b = logits_bN.masked_fill(~positive_bN, 0.0).sum(1) / positives_b.clamp_min(1)
            return (others_b - mean_b).where(positives_b > 0, 0.0), (positives_b > 0).to(logits_bN.dtype)
        negatives_b = logits_bN.masked_fill(~negative_bN, -torch.inf).logsumexp(1)
        losses_bN = softplus(negatives_b[:, None] - logits_bN)
        return losses_bN.masked_fill(~positive_bN, 0.0).sum(1), positives_b.to(logits_bN.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, temperature={self.temperature:g}, form={self.form}"


class FAIMNPairLoss(FAIMLoss):
    """Multi-class N-pair loss: one anchor and one positive per class, the other classes' positives are negatives.

        mean over classes c of -log( e^s_cc / Σ_c' e^s_cc' ),   s_cc' = -d_F(anchor of c, positive of c') / τ

    Source: Sohn 2016. The anchor is the first point of its class among the embeddings, the positive the next one there,
    or the first among ``ref_emb``. With ``cross_rank`` the positives of all processes are compared with.

    Args:
        metric, in_features: one of them, see :class:`FAIMLoss`.
        temperature: τ > 0.
        **options: normalize, cross_rank of :class:`FAIMLoss`.

    Raises:
        ValueError: temperature <= 0; on call, see :class:`FAIMLoss`, and an ``indices_tuple``, which it has no use for.
    """

    def __init__(
        self, metric: Any = None, in_features: Optional[int] = None, temperature: float = 0.1, **options: Any
    ) -> None:
        super().__init__(metric, in_features, **options)
        self.temperature = check_positive(temperature, "temperature")

    def forward(
        self,
        embeddings: Tensor,
        labels: Optional[Tensor] = None,
        indices_tuple: Optional[Sequence[Tensor]] = None,
        ref_emb: Optional[Tensor] = None,
        ref_labels: Optional[Tensor] = None,
    ) -> Tensor:
        """The loss, a scalar; arguments as in :meth:`FAIMLoss.forward`."""
        if labels is None or indices_tuple is not None:
            raise ValueError("FAIMNPairLoss chooses one pair per class by labels and takes no indices_tuple")
        self.check(embeddings, labels, None, ref_emb, ref_labels)
        x_BD = self.embed(embeddings)
        y_ND, ref_labels = (x_BD, labels) if ref_emb is None else (self.embed(ref_emb), ref_labels)
        is_gathered = self.cross_rank and world_size() > 1
        first = _occurrence(labels, 0)
        second = _occurrence(ref_labels, 1 if ref_emb is None else 0)
        # for every row the row of its class's positive; classes without one take no part
        partner = (labels[:, None] == ref_labels) & second
        anchors = (first & partner.any(1)).nonzero().flatten()
        positives = partner[anchors].int().argmax(1)
        x_PD, y_PD, classes = x_BD[anchors], y_ND[positives], labels[anchors]
        target = torch.arange(len(anchors), device=x_BD.device)
        if is_gathered:  # the numbers of pairs differ between processes: whole batches travel
            y_ND, used = gather_with_gradient(y_ND), torch.zeros_like(ref_labels, dtype=torch.bool)
            used[positives] = True
            used, all_labels = gather_all(used), gather_all(ref_labels)
            columns = used.nonzero().flatten()
            y_PD = y_ND[columns]
            own = len(ref_labels) * rank() + positives
            target = torch.searchsorted(columns, own)
            classes_N = all_labels[columns]
        else:
            classes_N = classes
        logits_PN = -self.metric(x_PD, y_PD) / self.temperature
        same = classes[:, None] == classes_N  # another process's positive of the same class is no negative
        same.scatter_(1, target[:, None], False)
        losses_P = cross_entropy(logits_PN.masked_fill(same, -torch.inf), target, reduction="none")
        if self.reducer is not None:
            return self._reduced(losses_P, embeddings[anchors], classes)
        count = torch.full_like(x_BD[0, 0], len(anchors), requires_grad=False)
        if is_gathered:
            count = mean_over_processes(count)
        return losses_P.sum() / count.clamp_min(1)

    def row_losses(self, distance_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        """Not used: pairs are chosen per class."""
        raise NotImplementedError


def _occurrence(labels: Tensor, number: int) -> Tensor:
    """Which of ``labels`` [N] are the ``number``-th (from 0) of their class (bool [N])."""
    before = (labels[:, None] == labels).tril(-1).sum(1)
    return before == number
