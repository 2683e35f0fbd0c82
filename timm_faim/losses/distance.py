"""FAIMDistance: d_F for the losses, miners, reducers and testers of pytorch-metric-learning."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from timm_faim.head import FAIMHead
from timm_faim.metric import FAIMMetric

from .base import MetricHolder

try:
    from pytorch_metric_learning.distances import BaseDistance
    from pytorch_metric_learning.utils import common_functions
except ImportError as e:
    raise ImportError("FAIMDistance needs pytorch-metric-learning: pip install 'timm-faim[metric]'") from e

# What to use where a loss or miner of the library has its own distance built in.
INSTEAD = {
    "AngularLoss": "FAIMTripletLoss",
    "AngularMiner": "TripletMarginMiner",
    "CircleLoss": "FAIMInfoNCELoss",
    "ArcFaceLoss": "FAIMMarginLoss",
    "CosFaceLoss": "FAIMMarginLoss",
    "SphereFaceLoss": "FAIMMarginLoss",
    "LargeMarginSoftmaxLoss": "FAIMMarginLoss",
    "SubCenterArcFaceLoss": "FAIMMarginLoss",
    "InstanceLoss": "FAIMMarginLoss",
    "TupletMarginLoss": "FAIMNPairLoss",
    "DistanceWeightedMiner": "BatchHardMiner or MultiSimilarityMiner",
    "DynamicSoftMarginLoss": "FAIMTripletLoss(soft_margin=True)",
    "FastAPLoss": "FAIMInfoNCELoss",
    "SmoothAPLoss": "FAIMInfoNCELoss",
    "PNPLoss": "FAIMInfoNCELoss",
    "ThresholdConsistentMarginLoss": "ContrastiveLoss",
    "SignalToNoiseRatioContrastiveLoss": "ContrastiveLoss",
}


class FAIMDistance(MetricHolder, BaseDistance):
    """d_F as a distance of pytorch-metric-learning.

    For a Randers metric the order matters: mat[i, j] = d_F(query_i, reference_j) = F(query_i - reference_j).

    Args:
        metric: a head or a metric to share; the distance then has no parameters of its own. Of a head the embeddings
            are the input features.
        in_features: D, to own a new metric instead.
        normalize_embeddings: without a head, L2-normalise first; off, other than in that library.
        **options: those of BaseDistance (power, collect_stats).

    Raises:
        ImportError: on import, without the optional package.
        ValueError: both or none of ``metric`` and ``in_features``; on call, embeddings of another width.
    """

    def __init__(
        self,
        metric: None | FAIMHead | FAIMMetric = None,
        in_features: int | None = None,
        *,
        normalize_embeddings: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(normalize_embeddings=normalize_embeddings, **options)
        if self.is_inverted:
            raise ValueError("is_inverted must be False: d_F is a distance, smaller is more similar")
        self.hold_metric(metric, in_features, normalize_embeddings)

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """See :meth:`compute_mat`; in the dtype of the queries, however they are embedded."""
        return super().forward(query_emb, ref_emb).to(query_emb.dtype)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """d_F(query, reference) [B, N] of queries [B, D] and references [N, D] (None: the queries)."""
        return self.metric(query_emb, query_emb if ref_emb is None else ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """d_F(query_i, reference_i) [B] of paired rows [B, D]."""
        dtype = torch.promote_types(query_emb.dtype, ref_emb.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return self.metric(query_emb.to(wide) - ref_emb.to(wide)).to(dtype)

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **options: Any) -> Tensor:
        """Embeddings as the metric sees them."""
        return self.embed(embeddings.movedim(dim, -1)).movedim(-1, dim)


def _name_what_to_use(check: Any) -> Any:
    """Add to the library's refusal of a FAIMDistance what to use instead."""

    @wraps(check)
    def checked(obj: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(obj, *args, **kwargs)
        except AssertionError as e:
            instead = next((INSTEAD[c.__name__] for c in type(obj).__mro__ if c.__name__ in INSTEAD), None)
            if isinstance(obj.distance, FAIMDistance) and instead:
                raise AssertionError(f"{e}, not FAIMDistance. Use {instead} instead") from e
            raise

    checked.names_faim = True
    return checked


if not hasattr(common_functions.assert_distance_type, "names_faim"):
    common_functions.assert_distance_type = _name_what_to_use(common_functions.assert_distance_type)
