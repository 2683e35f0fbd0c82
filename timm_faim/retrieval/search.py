"""Exact search for nearest neighbours, a few queries at a time.

Shapes: Q queries, N gallery images, B queries of one chunk, K neighbours, D features.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Between = Callable[[Tensor, Tensor], Tensor]

CELLS = 2**24  # distances of one chunk: 128 MiB in float64


def chunk_for(gallery_size: int) -> int:
    """Queries at a time for a gallery of that size."""
    return max(1, CELLS // gallery_size)


def nearest(
    query_QD: Tensor, gallery_ND: Tensor, distance: Between, k: int, exclude_self: bool = False, chunk: int = 1024
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k nearest gallery points of each query, nearest first; every distance is looked at.

    Distances are computed in the dtype of the points and compared in float32, equal ones by the number of the gallery
    point: with points in float64 the rounding of a matrix product, which depends on the chunk, decides nothing.

    Args:
        query_QD: [Q, D].
        gallery_ND: [N, D].
        distance: of queries [B, D] and gallery points [N, D] -> [B, N]; the first argument is the query.
        k: neighbours, up to N, or N - 1 with ``exclude_self``.
        exclude_self: query i is gallery point i and no neighbour of itself (leave one out).
        chunk: queries B at a time; memory is O(chunk · N).

    Returns:
        An iterator over (distances [B, k] in float32, gallery numbers [B, k]) of the chunks, in the queries' order.

    Raises:
        ValueError: k or chunk out of range, or ``exclude_self`` of a query that is not the gallery.
    """
    N = len(gallery_ND)
    others = N - exclude_self
    if not 1 <= k <= others:
        besides = " besides the query" if exclude_self else ""
        raise ValueError(f"k must lie in 1..{others}, the number of gallery points{besides}, got {k}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    if exclude_self and len(query_QD) != N:
        raise ValueError(f"exclude_self takes the gallery itself as queries: {N} points, got {len(query_QD)}")
    return _search(query_QD, gallery_ND, distance, k, exclude_self, chunk)


def _search(
    query_QD: Tensor, gallery_ND: Tensor, distance: Between, k: int, exclude_self: bool, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    numbers_N = torch.arange(len(gallery_ND), device=gallery_ND.device)
    for start in range(0, len(query_QD), chunk):
        d_BN = distance(query_QD[start : start + chunk], gallery_ND).float()
        # topk leaves the order of equal distances open; the number in the lower half of the key settles it
        key_BN = (_ordered_bits(d_BN) << 32) | numbers_N
        if exclude_self:
            row_B = torch.arange(len(d_BN), device=d_BN.device)
            key_BN[row_B, start + row_B] = torch.iinfo(torch.int64).max
        index_BK = key_BN.topk(k, dim=1, largest=False).values & 0xFFFFFFFF
        yield d_BN.gather(1, index_BK), index_BK


def _ordered_bits(x: Tensor) -> Tensor:
    """Integers (int64) in the order of the float32 numbers x: the bits, turned over for negative numbers."""
    bits = x.contiguous().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
