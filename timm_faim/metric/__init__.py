"""The FAIM metric: a Finsler (Minkowski) norm with parameters, and distances under it."""

from .functional import inverse_norms
from .module import FAIMMetric, absolute, faim_distance

__all__ = ["FAIMMetric", "absolute", "faim_distance", "inverse_norms"]
