"""Closed-form start of FAIM heads from data: class means, shrunk within-class precision, between-class 1-form.

One pass accumulates, in float64, the class counts and sums and the second moment of the features. With W the
within-class covariance, shrunk to (1 - a) W + a tr(W)/D I, and B the between-class covariance:

    μ_k = class mean,  Σ = W⁻¹ / s,  β = the leading direction of B in the Σ-orthonormal frame, β'Σ⁻¹β = 1,

which is linear discriminant analysis read as a metric (Fisher 1936; Rao 1948). s makes the mean squared distance from
a feature to a prototype 1, the scale at which a head starts otherwise.

A head with ``indicatrix`` gets the mean of all features as its centre c, and its prototypes are the class means
projected onto the indicatrix, (m_k - c) / F(m_k - c), so that one learning rate suits every backbone. There s is
the inverse of the mean variance: distances on the indicatrix do not depend on it.

Shapes: N samples, C classes, D features.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Optional

import torch
from torch import Tensor, nn

from .head import FAIMHead
from .margin import faim_heads

_logger = logging.getLogger(__name__)


class HeadStatistics:
    """Running moments of a head's features by class; float64 on the head's device, O(C·D) or with full Σ + O(D²)."""

    def __init__(self, head: FAIMHead) -> None:
        C, D, device = head.num_classes, head.in_features, head.mu.device
        self.counts_C = torch.zeros(C, dtype=torch.float64, device=device)
        self.sums_CD = torch.zeros(C, D, dtype=torch.float64, device=device)
        shape = (D, D) if head.metric.full_sigma else (D,)
        self.second = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add features [N, D] of classes ``targets`` [N] (integers in [0, C))."""
        C, D = self.sums_CD.shape
        if features.dim() != 2 or features.shape[1] != D or targets.shape != features.shape[:1]:
            raise ValueError(
                f"expected features [N, {D}] and targets [N], got {list(features.shape)} and {list(targets.shape)}"
            )
        if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < C):
            raise ValueError(f"targets must lie in [0, {C}), got {int(targets.min())} to {int(targets.max())}")
        if not torch.isfinite(features).all():
            raise ValueError("features contain NaN or inf; check the backbone's weights and the input normalisation")
        x = features.to(self.sums_CD)
        self.counts_C += torch.bincount(targets, minlength=C)
        self.sums_CD.index_add_(0, targets, x)
        self.second += x.t() @ x if self.second.dim() == 2 else x.square().sum(0)

    def all_reduce(self) -> None:
        """Sum the moments over all ranks of an initialised process group."""
        for moment in (self.counts_C, self.sums_CD, self.second):
            torch.distributed.all_reduce(moment)


@torch.no_grad()
def fit_from_statistics_(head: FAIMHead, stats: HeadStatistics, shrinkage: float = 0.3) -> FAIMHead:
    """Set μ, Σ and β of ``head`` from moments; γ, λ and the prior stay.

    Raises:
        ValueError: shrinkage outside (0, 1], no samples, or features all equal. Classes without a sample keep their
            prototype, with a warning.
    """
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must lie in (0, 1], got {shrinkage}; few samples a class need more")
    n = stats.counts_C.sum()
    if n == 0:
        raise ValueError("no samples to fit the head from")
    seen_C = stats.counts_C > 0
    if not seen_C.all():
        missing = (~seen_C).nonzero().flatten().tolist()
        _logger.warning(f"{len(missing)} classes have no samples and keep their prototypes: {missing[:10]}")
    means_CD = stats.sums_CD / stats.counts_C.clamp_min(1)[:, None]
    mean_D = stats.sums_CD.sum(0) / n
    spread_CD = (means_CD - mean_D) * (stats.counts_C / n).sqrt()[:, None]  # spread'spread = B
    degrees = (n - seen_C.sum()).clamp_min(1)
    total_D = stats.second.diagonal() if stats.second.dim() == 2 else stats.second
    if not (total_D / n - mean_D.square()).sum() > 1e-12 * (total_D / n).sum():
        raise ValueError("all features are equal; there is nothing to fit (is the backbone collapsed?)")

    if stats.second.dim() == 2:
        within_DD = (stats.second - (stats.sums_CD.t() @ means_CD)) / degrees
        eye_DD = torch.eye(head.in_features, dtype=torch.float64, device=mean_D.device)
        average = within_DD.diagonal().mean().clamp_min(1e-12)
        within_DD = (1 - shrinkage) * within_DD + shrinkage * average * eye_DD
        sigma_DD = torch.cholesky_inverse(torch.linalg.cholesky(within_DD))
        pairs_DD = (stats.second / n - torch.outer(mean_D, mean_D)) + spread_CD.t() @ spread_CD
        sigma_DD *= average if head.center is not None else 1.0 / (sigma_DD * pairs_DD).sum()
        root_DD = torch.linalg.cholesky(sigma_DD)
        head.metric.L.copy_(root_DD)
        frame_CD = spread_CD @ root_DD
        beta_D = root_DD @ _leading_direction(frame_CD)
    else:
        within_D = (stats.second - (stats.sums_CD * means_CD).sum(0)) / degrees
        within_D = within_D.clamp_min(0.0)
        average = within_D.mean().clamp_min(1e-12)
        sigma_D = 1.0 / ((1 - shrinkage) * within_D + shrinkage * average)
        pairs_D = (stats.second / n - mean_D.square()) + spread_CD.square().sum(0)
        sigma_D *= average if head.center is not None else 1.0 / (sigma_D * pairs_D).sum()
        head.metric.log_sigma_diag.copy_(sigma_D.log())
        root_D = sigma_D.sqrt()
        beta_D = root_D * _leading_direction(spread_CD * root_D)
    head.metric.beta.copy_(beta_D)
    means_CD = means_CD[seen_C]
    if head.center is not None:
        head.center.copy_(mean_D)
        means_CD = head.embed(means_CD)
    head.mu[seen_C] = means_CD.to(head.mu.dtype)
    return head


def _leading_direction(rows_CD: Tensor) -> Tensor:
    return torch.linalg.svd(rows_CD, full_matrices=False).Vh[0]


def fit_(head: FAIMHead, features: Tensor, targets: Tensor, shrinkage: float = 0.3) -> FAIMHead:
    """Set μ, Σ and β of ``head`` in closed form from features [N, D] and class indices [N]; returns the head."""
    stats = HeadStatistics(head)
    stats.update(_fitted_features(head, features.to(head.mu.device)), targets.to(head.mu.device))
    return fit_from_statistics_(head, stats, shrinkage)


def _fitted_features(head: FAIMHead, x: Tensor) -> Tensor:
    """What the moments are taken of: on the indicatrix, which the fit itself decides, the features as they come."""
    return x if head.center is not None else head.embed(x)


def mean_input(head: FAIMHead, x: Tensor) -> Tensor:
    """What a head gets for each image as one vector [B, D]: inputs [B, D, H, W] and [B, ..., D] are averaged."""
    if x.dim() == 4 and x.shape[1] == head.in_features:
        return x.flatten(2).mean(-1)
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x


@torch.no_grad()
def fit_heads(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    shrinkage: float = 0.3,
    device: Optional[torch.device] = None,
) -> nn.Module:
    """Set every FAIM head of ``model`` in closed form from one pass over (images [B, ...], class indices [B]).

    The model runs in eval mode and is left in its mode. In an initialised process group the moments are summed over
    the ranks, whether each reads its own shard or all read everything (the result is a ratio of sums). Inputs
    [B, N, D] of a head (token heads) are averaged over the tokens; a head that eval mode does not reach keeps its
    start, with a warning.

    Raises:
        ValueError: a model without FAIM heads, soft targets, no batches, targets outside the classes.
    """
    heads = faim_heads(model)
    if not heads:
        raise ValueError("the model has no FAIM head to fit; create it under its faim_ name")
    stats = {name: HeadStatistics(head) for name, head in heads.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, head: FAIMHead, args: tuple) -> None:
        inputs[name] = args[0].detach()

    handles = [head.register_forward_pre_hook(partial(keep, name)) for name, head in heads.items()]
    training = model.training
    model.eval()
    try:
        for images, targets in batches:
            if targets.dim() != 1:
                raise ValueError(f"expected class indices [B], got targets of shape {list(targets.shape)} (Mixup off?)")
            device = device or next(model.parameters()).device
            model(images.to(device))
            for name, x in inputs.items():
                head = heads[name]
                stats[name].update(_fitted_features(head, mean_input(head, x)), targets.to(x.device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, head in heads.items():
        if distributed:
            stats[name].all_reduce()
        if name not in inputs and inputs:
            _logger.warning(f"head {name!r} is not reached in eval mode and keeps its start")
            continue
        fit_from_statistics_(head, stats[name], shrinkage)
    return model
