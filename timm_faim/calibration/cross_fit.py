"""Logits of training images under heads that are fitted without them, for heads in closed form.

Shapes: N images, C classes, D features.
"""

import copy

import torch
from torch import Tensor

from timm_faim.head import FAIMHead, fit_
from timm_faim.metric import checked_count

FOLDS = 5
_ROUNDING = 1e-5  # of the variance of all points


def lookalike_folds(points: Tensor, targets: Tensor, count: int = FOLDS) -> Tensor:
    """The fold of each image [N], so that images of a class that look alike are held out together; -1: never held out.

    Photographs come in series, of one object in one place. Held out at random, an image has its neighbours of the
    series in the training images, and is recognised far better than a new one. So each class falls into as many groups
    as there are folds: around the image that is farthest from the class's mean, then around the one that is farthest
    from those picked so far, and so on (Gonzalez 1985); each image goes with the nearest. Images of a class that has
    one, or copies of one up to rounding, are never held out.

    Args:
        points: [N, D], such as ``head.embed(features)``.
        targets: class indices [N].
        count: of folds, 2 or more; classes of fewer images are in fewer folds.

    Raises:
        TypeError, ValueError: a count that is none or below 2; shapes that do not fit.
    """
    if checked_count("count", count) < 2:
        raise ValueError(f"count must be >= 2 folds, got {count}")
    if points.dim() != 2 or targets.shape != points.shape[:1]:
        raise ValueError(f"expected points [N, D] and targets [N], got {list(points.shape)} and {list(targets.shape)}")
    folds_N = torch.full_like(targets, -1, dtype=torch.long)
    same = same_image(points)
    for i, label in enumerate(targets.unique()):
        members = (targets == label).nonzero().flatten()
        groups = _groups(points[members].double(), count, same)
        if groups.any():
            folds_N[members] = (groups + i) % count  # shifted, so that folds are of like size
    return folds_N


def same_image(points_ND: Tensor) -> float:
    """The squared distance up to which two points are one image, computed twice or in half precision."""
    return _ROUNDING * points_ND.double().var(0, correction=0).sum().item() if len(points_ND) else 0.0


def _groups(points_nD: Tensor, count: int, same: float) -> Tensor:
    """Group [n] of each point, from 0 on; all 0 where the points are equal."""
    group_n = torch.zeros(len(points_nD), dtype=torch.long, device=points_nD.device)
    pick = (points_nD - points_nD.mean(0)).square().sum(1).argmax()
    nearest_n = (points_nD - points_nD[pick]).square().sum(1)
    for group in range(1, min(count, len(points_nD))):
        if nearest_n.max() <= same:
            break
        distance_n = (points_nD - points_nD[nearest_n.argmax()]).square().sum(1)
        closer_n = distance_n < nearest_n
        group_n[closer_n], nearest_n[closer_n] = group, distance_n[closer_n]
    return group_n


@torch.no_grad()
def cross_fitted_logits(
    head: FAIMHead, features: Tensor, targets: Tensor, folds: Tensor, shrinkage: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Logits [M, C] and classes [M] of the images that are in a fold, each under a copy of ``head`` that is fitted in
    closed form to the images of all other folds.

    Args:
        head: fitted to all of them in closed form; not changed.
        features: [N, D] of the training images.
        targets: class indices [N].
        folds: [N], see :func:`lookalike_folds`.
        shrinkage: as the head was fitted with.

    Raises:
        ValueError: no image is in a fold, as where each class has one image; and as :func:`timm_faim.fit_`.
    """
    if folds.shape != targets.shape:
        raise ValueError(f"expected a fold for each of {len(targets)} images, got shape {list(folds.shape)}")
    logits, classes = [], []
    for fold in folds[folds >= 0].unique():
        held_N = folds == fold
        fitted = fit_(copy.deepcopy(head).eval(), [(features[~held_N], targets[~held_N])], shrinkage)
        logits.append(fitted(features[held_N]))
        classes.append(targets[held_N])
    if not logits:
        raise ValueError("no training image can be held out, as each class has one image; calibrate on validation "
                         "images, or not at all")  # fmt: skip
    return torch.cat(logits), torch.cat(classes)
