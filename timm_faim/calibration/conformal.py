"""Thresholds with a rate that holds for few images too: split conformal prediction (Vovk et al. 2005; Lei et al. 2018).

The guarantee: where a new image is drawn like the n held-out ones (exchangeable with them) it is wrongly rejected, or
its class is missing from its set, with at most the probability asked for, on average over draws of the n. It says
nothing of images of other kinds.

Shapes: N images, C classes.
"""

import math

import torch
from torch import Tensor

from .checked import checked_rows, checked_scores, checked_share, smallest

_ROUNDING = 1e-9  # 100 · 0.29 is 28.999999999999996


def threshold(scores_of_known: Tensor, rate: float) -> float:
    """The score below which an image is rejected, so that at most a share ``rate`` of known images is.

    With n scores it is the k-th smallest, k = ⌊(n + 1) rate⌋; an image is accepted at the threshold itself. A rate
    below 1 / (n + 1) is too small for so few images: k = 0, and the threshold is -inf, which rejects nothing.

    Args:
        scores_of_known: [N], larger for images that are better known, of images that the classifier is not fitted to.
        rate: in [0, 1).

    Raises:
        ValueError: no scores, such that are not finite, a rate out of its range.
    """
    scores_N, rate = checked_scores(scores_of_known), checked_share("rate", rate)
    k = math.floor((len(scores_N) + 1) * rate + _ROUNDING)
    return smallest(scores_N, k) if k else -math.inf


def set_threshold(probabilities: Tensor, targets: Tensor, coverage: float) -> float:
    """The q for :func:`prediction_sets` that hold the right class with probability ``coverage`` or more.

    The nonconformity is 1 - p_y (Sadinle et al. 2019, arXiv:1609.00451), which gives the smallest sets on average where
    the probabilities are right; q is its k-th smallest value, k = ⌈(n + 1) coverage⌉. Where k exceeds n there are too
    few images for the coverage: q = 1, and all classes are in every set.

    Args:
        probabilities: [N, C] of images that the classifier is not fitted to.
        targets: class indices [N].
        coverage: in [0, 1).

    Raises:
        ValueError: no images, targets outside the classes, numbers that are no probabilities, a coverage out of range.
    """
    p_NC, coverage = _checked_probabilities(probabilities, targets), checked_share("coverage", coverage)
    n = len(p_NC)
    k = max(1, math.ceil((n + 1) * coverage - _ROUNDING))
    targets = targets.to(p_NC.device).long()
    return smallest(1.0 - p_NC.gather(1, targets[:, None])[:, 0], k) if k <= n else 1.0


def prediction_sets(probabilities: Tensor, q: float) -> Tensor:
    """Which classes an image may be of, bool [N, C]: those with 1 - p <= q, and the best class in any case.

    Of several best classes the first is the best. N may be 0.

    Raises:
        ValueError: numbers that are no probabilities, a q outside [0, 1].
    """
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 0.0 <= q <= 1.0:
        raise ValueError(f"q must be a number in [0, 1], got {q!r}")
    if probabilities.dim() == 2 and probabilities.shape[1] and not len(probabilities):
        return torch.zeros_like(probabilities, dtype=torch.bool)
    p_NC = _checked_probabilities(probabilities)
    sets_NC = 1.0 - p_NC <= q
    return sets_NC.scatter_(1, p_NC.argmax(1, keepdim=True), True)


def _checked_probabilities(p_NC: Tensor, targets_N: Tensor | None = None) -> Tensor:
    p_NC = checked_rows("probabilities", p_NC, targets_N)
    if p_NC.amin() < 0.0 or p_NC.amax() > 1.0 + 1e-3:
        raise ValueError(f"probabilities must lie in [0, 1], got {p_NC.amin().item():g} to {p_NC.amax().item():g}; "
                         "give logits.softmax(1)")  # fmt: skip
    return p_NC.clamp_max(1.0)
