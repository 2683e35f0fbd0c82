"""Prototypes of labelled and unlabelled images: expectation and maximisation on the whitened sphere.

    μ_k ∝ s_k μ⁰_k + Σ_u p_uk z_u,    p_u = softmax(logits of z_u under μ)

s_k μ⁰_k is the sum of the labelled points of class k as far as it goes along their prototype, and stays; the second sum
is over the unlabelled points. With calibrated logits this is EM for a mixture of one direction a class (Banerjee et al.
2005, JMLR 6) in which the labels of some images are known (Nigam et al. 2000), Σ and γ kept.

Shapes: N labelled and U unlabelled images, C classes, D features.
"""

import torch
from torch import Tensor

from timm_faim.calibration import known_score
from timm_faim.head import FAIMHead
from timm_faim.metric import checked_count, checked_number, cosine_logits, unit_vectors

ASSUMPTION = "assumes that most of the unlabelled images are of these classes, in about these proportions"
REJECTED = 0.05  # of images of the classes, by the calibration: what is known less well is left out
STEPS = 5
_AT_ONCE = 4096  # points in float32
_ROUNDS = 10  # of scaling to the proportions


@torch.no_grad()
def evidence(head: FAIMHead, points: Tensor, targets: Tensor) -> Tensor:
    """s [C], float32: how far the labelled points of each class go along its prototype, added up.

    Args:
        head: fitted to them.
        points: [N, D], of ``head.embed``; half precision will do.
        targets: class indices [N].
    """
    mu, s_C = unit_vectors(head.mu.float()), torch.zeros(head.num_classes, device=head.mu.device)
    for z, y in zip(points.split(_AT_ONCE), targets.split(_AT_ONCE), strict=True):
        y = y.to(mu.device)
        s_C.index_add_(0, y, (z.to(mu) * mu[y]).sum(1))
    return s_C.clamp_min_(0.0)


@torch.no_grad()
def adapt_(
    head: FAIMHead,
    labelled: Tensor,
    points: Tensor,
    *,
    temperature: float = 1.0,
    least: float = -torch.inf,
    proportions: Tensor | None = None,
    steps: int = STEPS,
) -> int:
    """Move the prototypes of ``head``, in place, to where labelled and unlabelled images put them.

    A point is used if the head knows it before anything moves; others, of no class, pull nothing. Prototypes keep the
    lengths of their parts.

    Args:
        head: fitted; its distance is that of cosines (no 1-form, no learned metric).
        labelled: s [C] >= 0 of :func:`evidence`; the number of images of a class is the most that it can be.
        points: [U, D] of the unlabelled images, of ``head.embed``, on any device; half precision will do.
        temperature: divides the logits, 1 of a head that is calibrated.
        least: of :func:`timm_faim.calibration.known_score` of a point that is used.
        proportions: of the classes among the unlabelled images [C], > 0, of any sum; None: they are not told, and
            each image goes where the head puts it. Images are then shared out so that the classes get theirs (Sinkhorn
            and Knopp 1967), which helps where they are right and ruins much where they are not.
        steps: of EM.

    Returns:
        How many points were used; with 0 the head is as it was.

    Raises:
        ValueError, TypeError: another kind of head, no points, shapes that do not fit, points, evidence or proportions
            that are not finite or negative, a temperature that is not above 0, a number of steps below 1.
    """
    _check(head, labelled, points, proportions)
    T, steps = checked_number("temperature", temperature, above=True), checked_count("steps", steps)
    before = head.mu.float().split(head.parts, 1)
    lengths = [part.norm(dim=1, keepdim=True) for part in before]
    start_CD = unit_vectors(head.mu.float())
    labelled_CD = labelled.to(start_CD)[:, None] * start_CD
    mu, kept, parts = start_CD, [], points.split(_AT_ONCE)
    for z in parts:
        kept.append(known_score(_logits(head, z, mu, T)).ge(least).cpu())
    used = int(sum(each.sum() for each in kept))
    if not used:
        return 0
    for _ in range(steps):
        logits = torch.cat([_logits(head, z[keep.to(z.device)], mu, T) for z, keep in zip(parts, kept, strict=True)])
        if proportions is not None:
            logits = logits + _bias(logits, proportions.to(logits))
        shares, total_CD = logits.softmax(1).split([int(keep.sum()) for keep in kept]), labelled_CD.clone()
        for z, keep, p in zip(parts, kept, shares, strict=True):
            total_CD += p.t() @ z[keep.to(z.device)].to(mu)
        pieces = zip(total_CD.split(head.parts, 1), before, lengths, strict=True)
        mu = torch.cat([_direction(new, old) * length for new, old, length in pieces], 1)
    head.mu.copy_(mu)
    return used


def _direction(new_CD: Tensor, old_CD: Tensor) -> Tensor:
    """Unit rows of new_CD; where one is zero, of a class without any image, those of before."""
    return unit_vectors(torch.where(new_CD.norm(dim=1, keepdim=True) > 0, new_CD, old_CD))


def _logits(head: FAIMHead, z_UD: Tensor, mu_CD: Tensor, T: float) -> Tensor:
    """Of points [U, D], divided by T, in float32 on the head's device."""
    logits = cosine_logits(z_UD.to(mu_CD), mu_CD, head.scale.float(), head.metric.eps)
    return (logits if head.prior is None else logits + head.prior.float()) / T


def _bias(logits_UC: Tensor, proportions_C: Tensor) -> Tensor:
    """b [C] with which softmax(logits + b) gives each class its share of the images, nearly."""
    wanted_C = proportions_C / proportions_C.sum() * len(logits_UC)
    b_C = torch.zeros_like(wanted_C)
    for _ in range(_ROUNDS):
        b_C = b_C + (wanted_C / (logits_UC + b_C).softmax(1).sum(0).clamp_min(1e-9)).log()
    return b_C


def _check(head: FAIMHead, labelled: Tensor, points: Tensor, proportions: Tensor | None) -> None:
    if not head.cosine:
        raise ValueError("unlabelled images need a head on the indicatrix or sphere with lambda_init=0 and "
                         f"learn_metric=False, got {head.kind}")  # fmt: skip
    C, D = head.num_classes, head.in_features
    if points.dim() != 2 or points.shape[1] != D or not len(points):
        raise ValueError(f"expected points [U, {D}] of one unlabelled image or more, got shape {list(points.shape)}")
    if not all(torch.isfinite(z).all() for z in points.split(_AT_ONCE)):
        raise ValueError("points contain NaN or inf; check the backbone's weights and the input normalisation")
    for name, each, least in (("labelled", labelled, 0.0), ("proportions", proportions, 1e-12)):
        if each is None:
            continue
        if each.shape != (C,) or not (torch.isfinite(each).all() and (each >= least).all()):
            sign = ">= 0" if least == 0.0 else "> 0"
            raise ValueError(f"{name} must be {C} finite numbers {sign}, one a class, got shape {list(each.shape)}, "
                             f"least {each.min().item() if each.numel() else None}")  # fmt: skip
