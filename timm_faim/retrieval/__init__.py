"""Retrieval: how well the nearest neighbours of an image under the FAIM distance are of its class."""

from .distances import Distance, distances_of
from .metrics import Ranking, average_precision_at_r, clustering_nmi, count_positives, lloyd, rank
from .search import nearest

__all__ = [
    "Distance",
    "Ranking",
    "average_precision_at_r",
    "clustering_nmi",
    "count_positives",
    "distances_of",
    "lloyd",
    "nearest",
    "rank",
]
