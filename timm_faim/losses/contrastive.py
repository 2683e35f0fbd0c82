"""InfoNCE (NT-Xent and SupCon) and N-pair losses with logits -d_F(x, y) / τ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from .base import FAIMLoss, are_own, check_positive
from .processes import gather_all, gather_with_gradient, rank, world_size

_FORMS = ("ntxent", "supcon")


class FAIMInfoNCELoss(FAIMLoss):
    """InfoNCE with logits s_ij = -d_F(x_i, y_j) / τ.

        ntxent:  mean over positive pairs (i, p) of -log( e^s_ip / (e^s_ip + Σ_negatives n e^s_in) )
        supcon:  mean over anchors i of the mean over their positives p of -log( e^s_ip / Σ_{j ≠ i} e^s_ij )

    Source: van den Oord et al. 2018 (InfoNCE), Chen et al. 2020 (NT-Xent), Khosla et al. 2020 (SupCon, L_out). Two
    views of each image with the image's number as label make the self-supervised loss. Memory is O(B·N) and, above
    ``pairs.block_entries`` entries, that of a block of rows.

    Args:
        metric, in_features: one of them, see :class:`FAIMLoss`.
        temperature: τ > 0.
        form: "ntxent" or "supcon".
        **options: normalize, reducer, cross_rank of :class:`FAIMLoss`.

    Raises:
        ValueError: temperature <= 0, an unknown form; on call, see :class:`FAIMLoss`.
    """

    def __init__(
        self,
        metric: Any = None,
        in_features: int | None = None,
        temperature: float = 0.1,
        *,
        form: str = "ntxent",
        **options: Any,
    ) -> None:
        super().__init__(metric, in_features, **options)
        self.temperature = check_positive(temperature, "temperature")
        if form not in _FORMS:
            raise ValueError(f"form must be one of {_FORMS}, got {form!r}")
        self.form = form

    def distances(self, x_BD: Tensor, y_ND: Tensor) -> Tensor:
        """The logits -d_F(x, y) / τ [B, N], in one node with the distance."""
        return self.metric(x_BD, y_ND, x_BD.new_full((1,), -1.0 / self.temperature))

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
    or the first among ``ref_emb``; with ``cross_rank`` among those of all processes in their order.

    Args:
        metric, in_features: one of them, see :class:`FAIMLoss`.
        temperature: τ > 0.
        **options: normalize, cross_rank of :class:`FAIMLoss`.

    Raises:
        ValueError: temperature <= 0; on call, see :class:`FAIMLoss`, and an ``indices_tuple``, which it has no use for.
    """

    def __init__(
        self, metric: Any = None, in_features: int | None = None, temperature: float = 0.1, **options: Any
    ) -> None:
        super().__init__(metric, in_features, **options)
        self.temperature = check_positive(temperature, "temperature")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; arguments as in :meth:`FAIMLoss.forward`."""
        if labels is None or indices_tuple is not None:
            raise ValueError("FAIMNPairLoss chooses one pair per class by labels and takes no indices_tuple")
        self.check(embeddings, labels, None, ref_emb, ref_labels)
        x_BD = self.embed(embeddings)
        is_own = are_own(embeddings, labels, ref_emb, ref_labels)
        y_ND, ref_labels = (x_BD, labels) if is_own else (self.embed(ref_emb), ref_labels)
        first, all_labels = 0, labels
        if self.is_gathered():
            first, all_labels = len(labels) * rank(), gather_all(labels)
            y_ND, ref_labels = gather_with_gradient(y_ND), gather_all(ref_labels)
        anchors, positives = _pairs(all_labels, ref_labels, is_own)
        here = (anchors >= first) & (anchors < first + len(labels))
        rows = anchors[here] - first
        logits_PC = -self.metric(x_BD[rows], y_ND[positives]) / self.temperature
        losses_P = cross_entropy(logits_PC, here.nonzero().flatten(), reduction="none")
        if self.reducer is not None and len(rows) > 0:
            return self._reduced(losses_P, embeddings[rows], labels[rows])
        processes = world_size() if self.is_gathered() else 1
        return losses_P.sum() * (processes / max(1, len(anchors)))


def _pairs(labels: Tensor, ref_labels: Tensor, is_own: bool) -> tuple[Tensor, Tensor]:
    """Rows of the anchors and of the positives [C] of the classes that have both."""
    classes, label_ids = torch.cat([labels, ref_labels]).unique(return_inverse=True)
    anchors = _first(label_ids[: len(labels)], len(classes))
    ref_ids = label_ids[len(labels) :]
    if is_own:  # the next one: an anchor counts for a class of its own
        ref_ids = ref_ids.scatter(0, anchors, len(classes))
    positives = _first(ref_ids, len(classes) + 1)[:-1]
    has_both = (anchors < len(labels)) & (positives < len(ref_labels))
    return anchors[has_both], positives[has_both]


def _first(ids: Tensor, count: int) -> Tensor:
    """Where each of 0 to count - 1 comes first in ``ids`` [N]; N where it does not."""
    rows = torch.arange(len(ids), device=ids.device)
    return torch.full((count,), len(ids), device=ids.device).scatter_reduce(0, ids, rows, "amin")
