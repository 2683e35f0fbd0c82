"""Cross entropy over prototypes with a margin on the target's geodesic: the role of ArcFace and CosFace."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from timm_faim.head import FAIMHead
from timm_faim.head.margin import gathered_gamma, ldam_margins, subtract_margin

from .base import check_labels, check_positive

IGNORED = -100  # the label that cross entropy leaves out


class FAIMMarginLoss(nn.Module):
    """Cross entropy of logits -γ (d_F(x, μ_k) + m_k [k = target]): the target must be nearer by m_k.

    The margin is an additive one on a distance, as CosFace's is on a cosine (Wang et al. 2018) and ArcFace's on an
    angle (Deng et al. 2019). With ``class_counts`` small classes get the full margin and larger ones less, m_k =
    margin (n_min / n_k)^(1/4) (Cao et al. 2019, LDAM).

    Args:
        num_classes: C, with ``in_features``: the loss owns prototypes and a metric, to be given to the optimiser.
        in_features: D.
        head: share a head instead; the loss then has no parameters of its own (and the head's own margin is not used).
        margin: m > 0, in units of the distance.
        class_counts: training images of each class [C] for the adaptive margin.
        scale: initial γ of an owned head.
        space: of an owned head, see :class:`FAIMHead`.
        reducer: a reducer of pytorch-metric-learning; None is the mean.

    Raises:
        ValueError: both or none of ``head`` and (``num_classes``, ``in_features``), margin <= 0, class_counts that are
            not C positive numbers; on call, labels of another shape or out of range.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        in_features: int | None = None,
        *,
        head: FAIMHead | None = None,
        margin: float = 0.15,
        class_counts: Tensor | list[int] | None = None,
        scale: float = 24.0,
        space: str = "sphere",
        reducer: Any = None,
    ) -> None:
        super().__init__()
        owns = num_classes is not None and in_features is not None
        if owns == (head is not None) or (num_classes is None) != (in_features is None):
            raise ValueError(
                "FAIMMarginLoss takes head=model_head to share one, or num_classes and in_features to own "
                f"one; got num_classes={num_classes}, in_features={in_features}, "
                f"head={None if head is None else type(head).__name__}"
            )
        if owns:
            head = self.owned_head = FAIMHead(in_features, num_classes, space=space, scale_init=scale)
        self._head = (head,)  # in a tuple: not registered as a submodule
        self.margin = check_positive(margin, "margin")
        self.reducer = reducer
        margins = torch.full((head.num_classes,), self.margin)
        if class_counts is not None:
            counts = torch.as_tensor(class_counts, dtype=torch.float32)
            if counts.shape != margins.shape or not (counts > 0).all():
                raise ValueError(
                    f"class_counts must be {head.num_classes} numbers > 0, one per class, got "
                    f"{counts.tolist() if counts.numel() < 10 else list(counts.shape)}"
                )
            margins = ldam_margins(counts, self.margin)
        self.register_buffer("margins", margins)

    @property
    def head(self) -> FAIMHead:
        """The head, shared or owned."""
        return self._head[0]

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of embeddings [B, D] of the classes ``labels`` [B]; those of label -100 take no part."""
        check_labels(labels, len(embeddings))
        if labels.device.type == "cpu":
            wrong = (labels >= self.head.num_classes) | ((labels < 0) & (labels != IGNORED))
            if wrong.any():
                raise ValueError(f"label {int(labels[wrong][0])} is out of range for {self.head.num_classes} classes")
        logits = self.head(embeddings)
        margins = self.margins.to(logits.device)[labels.clamp_min(0)]
        logits = subtract_margin(logits, labels, gathered_gamma(self.head) * margins)
        losses = cross_entropy(logits, labels.long(), reduction="none")
        if self.reducer is None:
            return losses.sum() / (labels != IGNORED).sum().clamp_min(1)
        indices = torch.arange(len(labels), device=logits.device)
        element = {"losses": losses, "indices": indices, "reduction_type": "element"}
        return self.reducer({"loss": element}, embeddings, labels)

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, margins {float(self.margins.min()):.3g} to {float(self.margins.max()):.3g}"
