"""The FAIM metric: a Finsler (Minkowski) norm with parameters, and distances under it."""

from .checks import checked_count, checked_number, checked_parts
from .cosine import cosine_logits
from .functional import unit_vectors
from .hosts import FillsMissing, is_filled, traced_call
from .low_rank import LowRankFrame, RowScatter
from .module import FAIMMetric, absolute, faim_distance
from .precision import without_autocast

__all__ = [
    "FAIMMetric",
    "FillsMissing",
    "LowRankFrame",
    "RowScatter",
    "absolute",
    "checked_count",
    "checked_number",
    "checked_parts",
    "cosine_logits",
    "is_filled",
    "traced_call",
    "faim_distance",
    "unit_vectors",
    "without_autocast",
]
