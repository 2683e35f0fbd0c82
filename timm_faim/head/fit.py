"""Closed-form start of FAIM heads from data: class means, shrunk within-class precision, between-class 1-form.

One pass accumulates, in float64, the class counts and sums and the second moment of the features. With W the
within-class covariance, shrunk to (1 - a) W + a tr(W)/D I, and B the between-class covariance:

    μ_k = class mean,  Σ = W⁻¹ / s,  β = the leading direction of B in the Σ-orthonormal frame, β'Σ⁻¹β = 1,

which is linear discriminant analysis read as a metric (Fisher 1936; Rao 1948). s makes the mean squared distance from
a feature to a prototype 1, the scale at which a head starts otherwise.

A head on the indicatrix gets the mean of all features as its centre c, the frame A of Σ = A A', and as prototypes the
class means in that frame, projected onto the indicatrix: z / F(z) with z = (m_k - c) A, so that one learning rate suits
every backbone. There s is the mean variance: distances on the indicatrix do not depend on it. A head on the sphere gets
its prototypes and β.

Shapes: N samples, C classes, D features.
"""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from timm_faim.metric import FAIMMetric

from .head import FAIMHead
from .margin import faim_heads
from .tap import layer_inputs, pooled

_DROWNED = 1.05  # squared distances at most 5 % longer than Σ makes them: 2.5 % of the distance

_logger = logging.getLogger(__name__)


class HeadStatistics:
    """Running moments of a head's features by class; float64 on the head's device, O(C·D) or with full Σ + O(D²)."""

    def __init__(self, head: FAIMHead) -> None:
        C, D, device = head.num_classes, head.in_features, head.mu.device
        self.counts_C = torch.zeros(C, dtype=torch.float64, device=device)
        self.sums_CD = torch.zeros(C, D, dtype=torch.float64, device=device)
        shape = (D, D) if head.full_sigma else (D,)
        self.second = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add features [N, D] of classes ``targets`` [N] (integers in [0, C))."""
        C, D = self.sums_CD.shape
        if targets.dim() != 1:
            raise ValueError(f"expected class indices [B], got targets of shape {list(targets.shape)} (Mixup off?)")
        if features.dim() != 2 or features.shape[1] != D or targets.shape != features.shape[:1]:
            raise ValueError(
                f"expected features [N, {D}] and targets [N], got {list(features.shape)} and {list(targets.shape)}"
            )
        if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < C):
            raise ValueError(f"targets must lie in [0, {C}), got {int(targets.min())} to {int(targets.max())}")
        x = features.to(self.sums_CD)
        if not torch.isfinite(x).all():
            raise ValueError("features contain NaN or inf; check the backbone's weights and the input normalisation")
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
        ValueError: shrinkage outside (0, 1], no samples, features all equal, or of a scale at which the head's ``eps``
            or dtype drowns the distances; the head is then as it was. Classes without a sample keep their prototype,
            with a warning.
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
    variances_D = total_D / n - mean_D.square()
    if not variances_D.sum() > 1e-12 * (total_D / n).sum():
        raise ValueError("all features are equal; there is nothing to fit (is the backbone collapsed?)")

    variance = variances_D.clamp_min(0.0).mean()
    if stats.second.dim() == 2:
        within = (stats.second - (stats.sums_CD.t() @ means_CD)) / degrees
        pairs = (stats.second / n - torch.outer(mean_D, mean_D)) + spread_CD.t() @ spread_CD
    else:
        within = ((stats.second - (stats.sums_CD * means_CD).sum(0)) / degrees).clamp_min(0.0)
        pairs = variances_D + spread_CD.square().sum(0)
    sigma = _precision(within, shrinkage, 1e-12 * variance)
    points_CD = means_CD
    if head.is_flat:
        _set_metric(head.metric, sigma / (sigma * pairs).sum(), spread_CD, pairs)
    elif head.whiten is None:
        head.metric.beta.copy_(_leading_direction(spread_CD))
        points_CD = head.project(means_CD)
    else:
        _set_frame(head, mean_D, sigma / variance, spread_CD)
        points_CD = head.embed(means_CD)
    head.mu[seen_C] = points_CD[seen_C].to(head.mu.dtype)
    return head


def _set_frame(head: FAIMHead, mean_D: Tensor, sigma: Tensor, spread_CD: Tensor) -> None:
    """Centre, frame and β of a head on the indicatrix; its prototypes keep their directions in feature space.

    Raises:
        ValueError: numbers beyond the range of the head's dtype; the head is as it was.
    """
    whiten = torch.linalg.cholesky(sigma) if sigma.dim() == 2 else sigma.sqrt()
    if not all(t.to(head.mu.dtype).isfinite().all() for t in (mean_D, whiten)):
        _refuse_scale(mean_D.abs().max().item(), head.metric)
    before = head.whiten.double()
    if whiten.dim() == 2:
        mu_CD = torch.linalg.solve(before, head.mu.double(), left=False) @ whiten
        framed_CD = spread_CD @ whiten
    else:
        mu_CD, framed_CD = head.mu.double() / before * whiten, spread_CD * whiten
    head.mu.copy_(mu_CD)
    head.center.copy_(mean_D)
    head.whiten.copy_(whiten)
    head.metric.beta.copy_(_leading_direction(framed_CD))


def _precision(within: Tensor, shrinkage: float, least: Tensor) -> Tensor:
    """W⁻¹ of the shrunk within-class covariance [D, D], or variances [D], in units in which tr(W)/D = 1."""
    average = (within.diagonal() if within.dim() == 2 else within).mean().clamp_min(least)
    if within.dim() == 1:
        return 1.0 / ((1 - shrinkage) * within / average + shrinkage)
    eye_DD = torch.eye(len(within), dtype=within.dtype, device=within.device)
    return torch.cholesky_inverse(torch.linalg.cholesky((1 - shrinkage) * within / average + shrinkage * eye_DD))


def _set_metric(metric: FAIMMetric, sigma: Tensor, spread_CD: Tensor, pairs: Tensor) -> None:
    """Σ [D, D] or its diagonal [D], and β along the leading direction of spread'spread in Σ's frame, β'Σ⁻¹β = 1.

    Raises:
        ValueError: distances between points with the covariance ``pairs`` are not what Σ says: drowned in the metric's
            ε, or beyond the range of its dtype. The metric is as it was.
    """
    before = [parameter.clone() for parameter in metric.parameters()]
    variances_D = pairs.diagonal() if pairs.dim() == 2 else pairs
    if sigma.dim() == 2:
        root_DD = torch.linalg.cholesky(sigma)
        eye_DD = torch.eye(len(sigma), dtype=sigma.dtype, device=sigma.device)
        factor_DD, failed = torch.linalg.cholesky_ex(sigma - metric.eps * eye_DD)  # the metric adds the ridge ε again
        ridge = metric.eps if failed else 0.0
        metric.L.copy_(root_DD if failed else factor_DD)
        metric.beta.copy_(root_DD @ _leading_direction(spread_CD @ root_DD))
    else:
        failed = sigma.min() <= metric.eps
        ridge = metric.eps if failed else 0.0
        metric.log_sigma_diag.copy_((sigma - metric.eps + ridge).log())
        root_D = sigma.sqrt()
        metric.beta.copy_(root_D * _leading_direction(spread_CD * root_D))

    squared = (sigma * pairs).sum()  # the mean of v'Σv
    smoothed = squared + ridge * variances_D.sum() + metric.eps
    probe_D = variances_D.clamp_min(0.0).sqrt()
    wanted = (probe_D @ sigma @ probe_D if sigma.dim() == 2 else (probe_D.square() * sigma).sum()).sqrt()
    measured = metric.norm(probe_D.to(metric.beta.dtype)).double() / wanted
    one_form = metric.lmbda.abs().double() * (1.0 + 1.0 / squared.sqrt())
    if not (smoothed < _DROWNED * squared and 0.5 < measured < 2.0 + 2.0 * one_form):
        for parameter, value in zip(metric.parameters(), before, strict=True):
            parameter.copy_(value)
        _refuse_scale(variances_D.mean().sqrt().item() / math.sqrt(2.0), metric)


def _refuse_scale(scale: float, metric: FAIMMetric) -> None:
    raise ValueError(
        f"features of size {scale:.1e} are beyond what a {metric.beta.dtype} head with eps={metric.eps:g} can tell "
        "apart; scale them towards 1 (a norm layer before the head) or, for small differences, pass a smaller eps"
    )


def _leading_direction(rows_CD: Tensor) -> Tensor:
    return torch.linalg.svd(rows_CD, full_matrices=False).Vh[0]


def _fitted_features(head: FAIMHead, x: Tensor) -> Tensor:
    """What the moments are taken of: on the indicatrix, which the fit itself decides, the features as they come."""
    return x if head.center is not None else head.embed(x)


@torch.no_grad()
def fit_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    shrinkage: float = 0.3,
    device: torch.device | None = None,
) -> nn.Module:
    """Set every FAIM head of ``model``, in place and in closed form, from (images [B, ...], class indices [B]).

    A head alone is such a model, of features [B, D]: ``fit_(head, [(features, targets)])``.

    The model runs in eval mode and is left in its modes. In an initialised process group the moments are summed over
    the ranks, whether each reads its own shard or all read everything (the result is a ratio of sums); what is wrong
    with the data of one rank raises on all of them. Inputs [B, N, D] of a head (token heads) are averaged over the
    tokens; a head that eval mode does not reach keeps its start, with a warning.

    Raises:
        ValueError: a model without FAIM heads, soft targets, no batches, targets outside the classes, features that
            are not finite, and as :func:`fit_from_statistics_`.
    """
    heads = faim_heads(model)
    if not heads:
        raise ValueError("the model has no FAIM head to fit; create it under its faim_ name")
    stats = {name: HeadStatistics(head) for name, head in heads.items()}
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    problem: str | None = None
    forward = None if device is None else lambda images: model(images.to(device))
    for inputs, targets in layer_inputs(model, heads, batches, forward):
        try:
            for name, x in inputs.items():
                x = pooled(x, heads[name].in_features)
                stats[name].update(_fitted_features(heads[name], x), targets.to(x.device))
        except ValueError as e:
            if not distributed:
                raise
            problem = problem or str(e)  # the other ranks may wait in this one's forward passes: go on with them
    if distributed:
        _raise_together(problem)
        for moments in stats.values():
            moments.all_reduce()
    reached = [name for name in heads if stats[name].counts_C.any()]
    for name, head in heads.items():
        if reached and name not in reached:
            _logger.warning(f"head {name!r} is not reached in eval mode and keeps its start")
            continue
        fit_from_statistics_(head, stats[name], shrinkage)
    return model


def _raise_together(problem: str | None) -> None:
    """Raise the first rank's problem on every rank; a collective call."""
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ValueError(f"{found} (process {rank})")
