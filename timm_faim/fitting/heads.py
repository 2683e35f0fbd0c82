"""Heads from stored features, and what they say of images that they are not fitted to.

Shapes: N images, C classes, K folds.
"""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from timm_faim import FAIMHead
from timm_faim.fitting.store import Features
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.fit import fitted_features
from timm_faim.head.statistics import HeadStatistics
from timm_faim.run.errors import UserError


def fit_head(head: FAIMHead, features: Features, shrinkage: float, chosen: np.ndarray | None = None) -> FAIMHead:
    """Fit a head in place, in closed form, to the chosen images (default: all).

    Raises:
        UserError: what the fit says of the features (NaN, all equal).
    """
    device = head.mu.device
    stats = HeadStatistics(head)
    try:
        for x, target in features.blocks(chosen):
            stats.update(fitted_features(head, x.to(device)), target.to(device))
        return fit_from_statistics_(head, stats, shrinkage)
    except ValueError as e:
        raise UserError(f"the head cannot be fitted: {e}") from e


@torch.inference_mode()
def logits_of(head: FAIMHead, features: Features, chosen: np.ndarray | None = None) -> Tensor:
    """Logits [N, C] on the CPU."""
    return torch.cat([head(x.to(head.mu.device)).float().cpu() for x, _ in features.blocks(chosen)])


def folds(target: np.ndarray, count: int) -> np.ndarray:
    """The fold [N] that holds each image out, 0..K-1; -1 for the only image of a class, which none can.

    Neighbours in the order of the data set, which are often pictures of one thing, stay together. The folds of small
    classes begin at different numbers.
    """
    fold = np.full(len(target), -1, np.int64)
    for k in np.unique(target):
        mine = np.flatnonzero(target == k)
        if len(mine) > 1:
            fold[mine] = (np.arange(len(mine)) * count // len(mine) + k) % count
    return fold


def held_out_logits(head: FAIMHead, features: Features, shrinkage: float, count: int) -> tuple[Tensor, np.ndarray]:
    """Logits [M, C] of the images that some fold holds out, from a head fitted to the others, and their numbers [M].

    M is 0 where each class has a single image.
    """
    fold = folds(features.target, count)
    found: list[Tensor] = []
    numbers: list[np.ndarray] = []
    for held_out, others in _splits(fold, count):
        other = fit_head(copy.deepcopy(head), features, shrinkage, others)
        found.append(logits_of(other, features, held_out))
        numbers.append(held_out)
    if not found:
        return torch.empty(0, head.num_classes), np.empty(0, np.int64)
    number = np.concatenate(numbers)
    order = np.argsort(number)
    return torch.cat(found)[torch.from_numpy(order)], number[order]


def _splits(fold: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(count):
        held_out = np.flatnonzero(fold == k)
        if len(held_out):
            yield held_out, np.flatnonzero(fold != k)
