"""The FAIM metric: a Finsler (Minkowski) norm with parameters, and distances under it."""

from .module import FAIMMetric, absolute, faim_distance

__all__ = ["FAIMMetric", "absolute", "faim_distance"]
