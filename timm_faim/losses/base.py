"""What the losses share: their metric, the checks of their input, references, and the mean over what counts."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_faim.head import FAIMHead
from timm_faim.metric import FAIMMetric, unit_vectors

from .pairs import Pairs, block_entries, blockwise_sum, mined_masks
from .processes import gather_all, gather_with_gradient, mean_over_processes, rank, world_size


class MetricHolder:
    """A head or a metric that is shared, and then no submodule, or a metric that is owned."""

    def hold_metric(self, metric: None | FAIMHead | FAIMMetric, in_features: int | None, normalize: bool) -> None:
        """Share a head or a metric, or own a new one of width ``in_features`` under which random points are about 1
        apart.

        Raises:
            ValueError: both or none of the two, or ``normalize`` beside a head.
            TypeError: ``metric`` is no FAIMHead or FAIMMetric.
        """
        name = type(self).__name__
        if (metric is None) == (in_features is None):
            raise ValueError(
                f"{name} takes a head or a metric to share, or in_features=D to own a metric; got "
                f"{'neither' if metric is None else 'both'}"
            )
        self._head = (metric,) if isinstance(metric, FAIMHead) else ()  # in a tuple: not registered as a submodule
        self._normalizes = normalize
        if self._head:
            if normalize:
                raise ValueError(f"{name} measures a head's distances where the head does; leave normalizing out")
            metric = metric.metric
        elif metric is None:
            metric = FAIMMetric(in_features)
            metric.reset_to_unit_distance(2.0 if normalize else 2.0 * in_features)
            self.owned_metric = metric
        elif not isinstance(metric, FAIMMetric):
            raise TypeError(f"metric must be a FAIMHead or a FAIMMetric, got {type(metric).__name__}")
        self._metric = (metric,)

    @property
    def metric(self) -> FAIMMetric:
        """The metric, shared or owned (a copy or a wrapper by now, where the loss was copied or sharded)."""
        return self._modules.get("owned_metric") or self._metric[0]

    def embed(self, embeddings: Tensor) -> Tensor:
        """Embeddings as the metric sees them, in at least float32: those that a head, where there is one, makes."""
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        if self._head:
            return self._head[0].embed(embeddings).to(wide)
        return unit_vectors(embeddings) if self._normalizes else embeddings.to(wide)


class FAIMLoss(MetricHolder, nn.Module):
    """Base of the losses on pairs of embeddings, called as ``loss(embeddings, labels)``.

    Args:
        metric: a head or a metric to share; the loss then has no parameters of its own. Of a head the embeddings are
            the input features: distances are measured between the points that the head makes of them.
        in_features: D, to own a new metric instead.
        normalize: without a head, L2-normalise embeddings first.
        reducer: None for the mean described at each loss, or a reducer of pytorch-metric-learning, which gets one loss
            per anchor ("element").
        cross_rank: compare with the embeddings of all processes, gradients included. Their batches must be equal in
            size; the loss is that of one process with all batches once gradients (and losses) are averaged.
        check_finite: look for embeddings that are not finite; off where the caller looks at the loss itself.
    """

    def __init__(
        self,
        metric: None | FAIMHead | FAIMMetric = None,
        in_features: int | None = None,
        *,
        normalize: bool = False,
        reducer: Callable | None = None,
        cross_rank: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        self.hold_metric(metric, in_features, normalize)
        self.reducer = reducer
        self.cross_rank = cross_rank
        self.check_finite = check_finite
        self._checked = False

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar (what the reducer makes of it, with one); arguments as in pytorch-metric-learning.

        Args:
            embeddings: [B, D]: queries, the first argument of d_F (which matters for a Randers metric).
            labels: class indices [B].
            indices_tuple: pairs or triplets of a miner instead of all that the labels give; with ``cross_rank`` still
                of this process alone.
            ref_emb: references [N, D] to compare with, the second argument of d_F; None for the embeddings.
            ref_labels: [N], with ``ref_emb``.

        Without any positive (or, for triplets, any triplet) the loss is 0, with gradients of 0.

        Raises:
            ValueError: wrong shapes, labels that are no integers, embeddings that are not finite (looked for in every
                call on the CPU and in the first one elsewhere, where looking waits for the device; after that a NaN
                goes on into the loss).
        """
        self.check(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        x_BD = self.embed(embeddings)
        if len(x_BD) == 0:
            return x_BD.sum()
        is_own = are_own(embeddings, labels, ref_emb, ref_labels)
        y_ND = x_BD if is_own else self.embed(ref_emb)
        ref_labels = labels if is_own else ref_labels
        own: int | None = 0 if is_own else None
        if self.is_gathered() and indices_tuple is None:  # a miner's indices count the rows of this process
            y_ND = gather_with_gradient(y_ND)
            ref_labels = None if ref_labels is None else gather_all(ref_labels)
            own = len(x_BD) * rank() if is_own else None
        masks = None if indices_tuple is None else mined_masks(indices_tuple, len(x_BD), len(y_ND))
        pairs = Pairs(labels, ref_labels, own, masks)

        def rows(x: Tensor, y: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
            return self.row_losses(self.distances(x, y), *pairs.block(start, stop))

        whole = len(x_BD) * len(y_ND) <= block_entries(x_BD.device) or torch.compiler.is_compiling()
        if whole or self.reducer is not None:
            losses_B, counts_B = rows(x_BD, y_ND, 0, len(x_BD))
            return self.reduce(losses_B, counts_B, embeddings, labels)
        return self._mean(*blockwise_sum(rows, x_BD, y_ND, list(self.metric.parameters())))

    def row_losses(self, distance_bN: Tensor, positive_bN: Tensor, negative_bN: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of each anchor [b], and over how many terms the mean counts it [b] (the same dtype).

        ``distance_bN`` is what :meth:`distances` gives.
        """
        raise NotImplementedError

    def distances(self, x_BD: Tensor, y_ND: Tensor) -> Tensor:
        """d_F(x, y) [B, N]."""
        return self.metric(x_BD, y_ND)

    def check(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> None:
        """Raise ValueError for input that :meth:`forward` does not take."""
        if labels is None and indices_tuple is None:
            raise ValueError("labels (or indices_tuple) are needed to tell positives from negatives")
        if ref_labels is not None and ref_emb is None:
            raise ValueError("ref_labels are given without ref_emb, the embeddings they belong to")
        if ref_emb is not None and ref_emb is not embeddings and ref_labels is None and indices_tuple is None:
            raise ValueError("ref_emb needs ref_labels [N], the classes of the references")
        look = self.check_finite and (embeddings.device.type == "cpu" or not self._checked)
        for name, points, classes in (("embeddings", embeddings, labels), ("ref_emb", ref_emb, ref_labels)):
            if points is None:
                continue
            width = self.metric.in_features
            if points.dim() != 2 or points.shape[1] != width:
                raise ValueError(f"{name} must be [B, {width}], the width of the metric, got {list(points.shape)}")
            check_labels(classes, len(points), "labels" if points is embeddings else "ref_labels")
            if look and not torch.compiler.is_compiling() and not (finite := torch.isfinite(points).all(1)).all():
                rows = (~finite).nonzero().flatten().tolist()
                raise ValueError(
                    f"{name} are not finite in {len(rows)} of {len(points)} rows (first: row {rows[0]}). "
                    "Lower the learning rate or clip gradients, or look for broken input"
                )
        self._checked = True

    def is_gathered(self) -> bool:
        """Whether other processes take part."""
        return self.cross_rank and world_size() > 1

    def reduce(self, losses_B: Tensor, counts_B: Tensor, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """The mean of what :meth:`row_losses` gives, or what the reducer makes of each anchor's mean."""
        if self.reducer is not None:
            return self._reduced(losses_B / counts_B.clamp_min(1), embeddings, labels)
        return self._mean(losses_B.sum(), counts_B.sum())

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        if self.is_gathered():
            count = mean_over_processes(count)
        return total / torch.where(count > 0, count, torch.ones_like(count))

    def _reduced(self, losses_B: Tensor, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        indices = torch.arange(len(losses_B), device=losses_B.device)
        element = {"losses": losses_B, "indices": indices, "reduction_type": "element"}
        return self.reducer({"loss": element}, embeddings, labels)

    def extra_repr(self) -> str:
        return f"{self.metric.in_features}, normalize={self._normalizes}, cross_rank={self.cross_rank}"


def are_own(embeddings: Tensor, labels: Any, ref_emb: Tensor | None, ref_labels: Any) -> bool:
    """Whether the references are the embeddings themselves, so that none is compared with itself."""
    return ref_emb is None or ref_emb is embeddings and (ref_labels is None or ref_labels is labels)


def check_labels(labels: Tensor | None, count: int, name: str = "labels") -> None:
    """Raise ValueError for class labels that are not integers [count]; None passes."""
    if labels is None:
        return
    if labels.shape != (count,):
        raise ValueError(f"{name} must be class indices [{count}], one per embedding, got shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}; mixed (soft) labels have no positives")


def check_positive(value: float, name: str) -> float:
    """The number, if it is finite and > 0.

    Raises:
        ValueError: it is not.
    """
    if not (value > 0 and value < float("inf")):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return float(value)
