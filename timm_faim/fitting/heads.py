"""Heads from stored features, and what they say of images that they are not fitted to.

Shapes: N images, C classes, D features.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from timm_faim import FAIMHead
from timm_faim.fitting.store import Features
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.fit import fitted_features
from timm_faim.head.statistics import HeadStatistics
from timm_faim.recipe import Plan
from timm_faim.run.errors import UserError


def fit_head(head: FAIMHead, features: Features, plan: Plan, chosen: np.ndarray | None = None) -> FAIMHead:
    """Fit a head in place, in closed form, to the chosen images (default: all).

    Raises:
        UserError: what the fit says of the features (NaN, all equal).
    """
    device = head.mu.device
    stats = HeadStatistics(head)
    try:
        for x, target in features.blocks(chosen):
            stats.update(fitted_features(head, x.to(device)), target.to(device))
        return fit_from_statistics_(head, stats, plan.shrinkage, plan.share)
    except ValueError as e:
        raise UserError(f"the head cannot be fitted: {e}") from e


@torch.inference_mode()
def logits_of(head: FAIMHead, features: Features, chosen: np.ndarray | None = None) -> Tensor:
    """Logits [N, C] on the CPU."""
    return torch.cat([head(x.to(head.mu.device)).float().cpu() for x, _ in features.blocks(chosen)])


@torch.inference_mode()
def points_of(head: FAIMHead, features: Features) -> Tensor:
    """Points [N, D] as the head's metric sees them, in half precision on the CPU."""
    return torch.cat([head.embed(x.to(head.mu.device)).half().cpu() for x, _ in features.blocks()])


def held_out_logits(
    head: FAIMHead,
    features: Features,
    plan: Plan,
    fold: np.ndarray,
    then: Callable[[FAIMHead, np.ndarray], object] | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Logits [M, C] of the images that some fold holds out, from a head fitted to the others, and their numbers [M].

    Args:
        head: fitted to all of them.
        features: of N images.
        plan: as the head was fitted by.
        fold: [N], -1 where none holds the image out.
        then: changes a head that is fitted to the images of these numbers, in place.

    Returns:
        M is 0 where no image can be held out, as where each class has a single one.
    """
    logits = torch.empty(len(features), head.num_classes)
    for k in np.unique(fold[fold >= 0]):
        chosen = np.flatnonzero(fold != k)
        other = fit_head(copy.deepcopy(head), features, plan, chosen)
        if then is not None:
            then(other, chosen)
        logits[torch.from_numpy(fold == k)] = logits_of(other, features, np.flatnonzero(fold == k))
    return logits[torch.from_numpy(fold >= 0)], np.flatnonzero(fold >= 0)
