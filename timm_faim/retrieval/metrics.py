"""Recall@K, mAP@R and NMI of a distance, as shares of 1.

Recall@K is the share of queries with an image of their class among the K nearest. mAP@R (Musgrave, Belongie and Lim,
A Metric Learning Reality Check, ECCV 2020) is the mean of 1/R sum_{i<=R} P(i) rel(i), R the number of other gallery
images of the query's class, P(i) the precision among the i nearest, rel(i) whether the i-th is right. NMI compares a
clustering of the images with their classes.

Shapes: Q queries, N gallery images, B queries of one chunk, K neighbours, M numbers K of Recall@K, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distances import Distance
from .search import Between, chunk_for, nearest

ITERATIONS = 50  # of one clustering at most


@dataclass(frozen=True)
class Ranking:
    """What the neighbours of each query say; queries without positives are in it, with hits and precision 0."""

    at: tuple[int, ...]  # the numbers K of Recall@K
    hits_QM: Tensor  # whether an image of the class is among the K nearest
    precision_Q: Tensor  # average precision at R, float64
    positives_Q: Tensor  # R, other gallery images of the class
    first_QK: Tensor  # gallery numbers of the nearest
    distance_QK: Tensor  # and their distances

    def recall(self) -> dict[int, float]:
        """Recall@K by K, over the queries that have positives."""
        hits_M = self.hits_QM[self.positives_Q > 0].double().mean(0)
        return dict(zip(self.at, hits_M.tolist(), strict=True))

    def map_at_r(self) -> float:
        """mAP@R, over the queries that have positives."""
        return float(self.precision_Q[self.positives_Q > 0].mean())


def count_positives(query_labels_Q: Tensor, gallery_labels_N: Tensor, exclude_self: bool) -> Tensor:
    """R [Q]: gallery images of each query's class, without the query itself under ``exclude_self``."""
    classes = 1 + max(int(query_labels_Q.max()), int(gallery_labels_N.max()))
    return torch.bincount(gallery_labels_N, minlength=classes)[query_labels_Q] - int(exclude_self)


def average_precision_at_r(correct_BK: Tensor, positives_B: Tensor) -> Tensor:
    """Average precision at R [B] in float64, 0 where R = 0.

    Args:
        correct_BK: whether the i-th neighbour is of the query's class, K >= the largest R.
        positives_B: R.
    """
    place_K = torch.arange(1, correct_BK.shape[1] + 1, device=correct_BK.device)
    relevant_BK = correct_BK & (place_K <= positives_B[:, None])
    precision_BK = relevant_BK.cumsum(1).double() / place_K
    return (precision_BK * relevant_BK).sum(1) / positives_B.clamp_min(1)


@torch.no_grad()
def rank(
    query_QD: Tensor,
    query_labels_Q: Tensor,
    gallery_ND: Tensor,
    gallery_labels_N: Tensor,
    between: Between,
    at: Sequence[int],
    keep: int = 1,
    exclude_self: bool = False,
    chunk: int | None = None,
) -> Ranking:
    """Search the gallery for each query and judge what comes first.

    Args:
        query_QD: points, as ``between`` takes them.
        query_labels_Q: class numbers.
        gallery_ND: points.
        gallery_labels_N: class numbers of the same numbering.
        between: distances of queries [B, D] to the gallery [N, D] -> [B, N].
        at: the numbers K of Recall@K, none larger than the gallery.
        keep: neighbours of each query to hand back.
        exclude_self: the queries are the gallery, and none is its own neighbour.
        chunk: queries at a time; by default :func:`.search.chunk_for` the gallery. Memory is O(chunk · N + Q · keep).

    Raises:
        ValueError: more neighbours than the gallery has.
    """
    positives_Q = count_positives(query_labels_Q, gallery_labels_N, exclude_self)
    k = max(*at, keep, int(positives_Q.max()))
    parts, start = [], 0
    for d_BK, index_BK in nearest(query_QD, gallery_ND, between, k, exclude_self, chunk or chunk_for(len(gallery_ND))):
        rows = slice(start, start + len(index_BK))
        correct_BK = gallery_labels_N[index_BK] == query_labels_Q[rows, None]
        hits_BM = torch.stack([correct_BK[:, :n].any(1) for n in at], 1)
        precision_B = average_precision_at_r(correct_BK, positives_Q[rows])
        parts.append((hits_BM, precision_B, index_BK[:, :keep].clone(), d_BK[:, :keep].clone()))
        start = rows.stop
    hits, precision, first, d = (torch.cat(part) for part in zip(*parts, strict=True))
    return Ranking(tuple(at), hits, precision, positives_Q, first, d)


@torch.no_grad()
def lloyd(points_ND: Tensor, distance: Distance, initial_K: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Clusters [N] of points by Lloyd's iteration: assign each to the nearest centre, move each centre to the mean.

    The distance goes from the point to the centre; the mean is brought back by ``distance.embed`` (onto the sphere,
    for the cosine). For Euclidean and cosine this is k-means and spherical k-means; for a FAIM distance with a 1-form
    the mean is not the exact minimiser, so that the iteration may end at its limit instead of at rest.

    Args:
        points_ND: points of ``distance``.
        distance: what is near.
        initial_K: numbers of the points that are the first centres. A centre that loses all points stays.
        iterations: the limit.
    """
    centres_KD = points_ND[initial_K]
    label_N = points_ND.new_full((len(points_ND),), -1, dtype=torch.int64)
    for _ in range(iterations):
        found = nearest(points_ND, centres_KD, distance.between, 1, chunk=chunk_for(len(centres_KD)))
        new_N = torch.cat([index_B1[:, 0] for _, index_B1 in found])
        if torch.equal(new_N, label_N):
            break
        label_N = new_N
        count_K1 = torch.bincount(label_N, minlength=len(centres_KD))[:, None]
        means_KD = torch.zeros_like(centres_KD).index_add_(0, label_N, points_ND) / count_K1.clamp_min(1)
        centres_KD = torch.where(count_K1 > 0, distance.project(means_KD), centres_KD)
    return label_N


def clustering_nmi(points_ND: Tensor, labels_N: Tensor, distance: Distance, restarts: int = 3, seed: int = 42) -> float:
    """Normalised mutual information of classes and of clusters, as many as classes; the mean over ``restarts``.

    The points that start a clustering depend on the seed alone, so that distances are compared from the same start.
    """
    from sklearn.metrics import normalized_mutual_info_score

    generator = torch.Generator().manual_seed(seed)
    K, scores = len(labels_N.unique()), []
    for _ in range(restarts):
        initial_K = torch.randperm(len(points_ND), generator=generator)[:K].to(points_ND.device)
        clusters_N = lloyd(points_ND, distance, initial_K)
        scores.append(normalized_mutual_info_score(labels_N.cpu().numpy(), clusters_N.cpu().numpy()))
    return float(sum(scores) / restarts)
