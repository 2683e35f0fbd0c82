"""Closed-form start of FAIM heads from data: class means, shrunk within-class precision, between-class 1-form.

One pass accumulates, in float64, the class counts and sums and the second moment of the features. With W the
within-class covariance, shrunk to (1 - a) W + a tr(W)/D I, and B the between-class covariance:

    μ_k = class mean,  Σ = W⁻¹ / s,  β = the leading direction of B in the Σ-orthonormal frame, β'Σ⁻¹β = 1,

which is linear discriminant analysis read as a metric (Fisher 1936; Rao 1948). Where no class has two samples the
covariance of all stands in for W, with a = 0.93 or more. s makes the mean squared distance from
a feature to a prototype 1, the scale at which a head starts otherwise.

A head on the indicatrix gets the mean of all features as its centre c, the frame A of Σ = A A', and as prototypes the
class means in that frame, projected onto the indicatrix: z / F(z) with z = (m_k - c) A, so that one learning rate suits
every backbone. There s is the mean variance: distances on the indicatrix do not depend on it. A head on the sphere gets
its prototypes and β. Of features in parts the first is fitted so, the others have a Σ of few directions.

Shapes: N samples, C classes, D features.
"""

import logging
import math

import torch
from torch import Tensor

from timm_faim.metric import FAIMMetric

from .head import FAIMHead
from .sharing import check_share, share_prototypes
from .statistics import HeadStatistics

_DROWNED = 1.05  # squared distances at most 5 % longer than Σ makes them: 2.5 % of the distance
_SINGLE = 0.93  # shrinkage of the covariance of all images, which has what tells classes apart

_logger = logging.getLogger(__name__)


def shrinkage_of(single: bool, shrinkage: float) -> float:
    """The shrinkage of Σ where each class has a ``single`` image and of the usual case."""
    return max(shrinkage, _SINGLE) if single else shrinkage


@torch.no_grad()
def fit_from_statistics_(head: FAIMHead, stats: HeadStatistics, shrinkage: float = 0.3, share: float = 0.0) -> FAIMHead:
    """Set μ, Σ and β of ``head`` from moments; γ, λ and the prior stay.

    ``share`` is the strength at which prototypes of few images are shared with look-alikes (:mod:`.sharing`), in Σ's
    frame, each part of the features for itself; without effect where no class has two images.

    Raises:
        ValueError: shrinkage outside (0, 1], share outside [0, 100], no samples, features all equal, or of a scale at
            which the head's ``eps`` or dtype drowns the distances; the head is then as it was. Classes without a
            sample keep their prototype, with a warning.
    """
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must lie in (0, 1], got {shrinkage}; few samples a class need more")
    check_share(share)
    n = stats.counts_C.sum()
    if n == 0:
        raise ValueError("no samples to fit the head from")
    seen_C = stats.counts_C > 0
    if not seen_C.all():
        missing = (~seen_C).nonzero().flatten().tolist()
        _logger.warning(f"{len(missing)} classes have no samples and keep their prototypes: {missing[:10]}")
    all_means_CD = stats.sums_CD / stats.counts_C.clamp_min(1)[:, None]
    all_mean_D = stats.sums_CD.sum(0) / n
    means_CD, mean_D = all_means_CD[:, : head.parts[0]], all_mean_D[: head.parts[0]]
    spread_CD = (means_CD - mean_D) * (stats.counts_C / n).sqrt()[:, None]  # spread'spread = B
    single = bool(n == seen_C.sum())  # no class has two images: all of them stand in for those of a class
    degrees = (n - 1 if single else n - seen_C.sum()).clamp_min(1)
    shrinkage = shrinkage_of(single, shrinkage)
    total_D = stats.second.diagonal() if stats.second.dim() == 2 else stats.second
    variances_D = total_D / n - mean_D.square()
    if not variances_D.sum() > 1e-12 * (total_D / n).sum():
        raise ValueError("all features are equal; there is nothing to fit (is the backbone collapsed?)")

    variance = variances_D.clamp_min(0.0).mean()
    if stats.second.dim() == 2:
        around = n * torch.outer(mean_D, mean_D) if single else means_CD.t() @ (means_CD * stats.counts_C[:, None])
        within = (stats.second - around) / degrees
        pairs = (stats.second / n - torch.outer(mean_D, mean_D)) + spread_CD.t() @ spread_CD
    else:
        around = n * mean_D.square() if single else (means_CD.square() * stats.counts_C[:, None]).sum(0)
        within = ((stats.second - around) / degrees).clamp_min(0.0)
        pairs = variances_D + spread_CD.square().sum(0)
    sigma = _precision(within, shrinkage, 1e-12 * variance)
    if head.is_flat:
        _set_metric(head.metric, sigma / (sigma * pairs).sum(), spread_CD, pairs)
    elif head.whiten is None:
        head.metric.beta.copy_(_leading_direction(spread_CD))
    else:
        _set_frame(head, mean_D, sigma / variance, spread_CD)
        means = all_mean_D.split(head.parts)[1:]
        if single:
            stats.add_between()
        for frame, scatter, mean in zip(head.frames, stats.scatters, means, strict=True):
            frame.set_(mean, scatter, shrinkage, degrees)
    if share and not single:
        all_means_CD = _shared(head, all_means_CD, all_mean_D, sigma, stats.counts_C, share)
    head.mu[seen_C] = head.embed(all_means_CD)[seen_C].to(head.mu.dtype)
    return head


def _shared(head: FAIMHead, means_CD: Tensor, mean_D: Tensor, sigma: Tensor, counts_C: Tensor, share: float) -> Tensor:
    """Class means in feature space, those of each part shared with look-alikes in the frame of its Σ."""
    first_CD, *others = means_CD.split(head.parts, 1)
    first_mean_D, *other_means = mean_D.split(head.parts)
    around_CD = first_CD - first_mean_D
    framed_CD = around_CD @ torch.linalg.cholesky(sigma) if sigma.dim() == 2 else around_CD * sigma.sqrt()
    shared = [first_mean_D + share_prototypes(framed_CD, counts_C, share, around_CD)]
    for frame, means, mean in zip(head.frames, others, other_means, strict=True):
        shared.append(mean + share_prototypes(frame(means), counts_C, share, means - mean))
    return torch.cat(shared, 1)


def _set_frame(head: FAIMHead, mean_D: Tensor, sigma: Tensor, spread_CD: Tensor) -> None:
    """Centre, frame and β of a head on the indicatrix; its prototypes keep their directions in feature space.

    Raises:
        ValueError: numbers beyond the range of the head's dtype; the head is as it was.
    """
    whiten = torch.linalg.cholesky(sigma) if sigma.dim() == 2 else sigma.sqrt()
    if not all(t.to(head.mu.dtype).isfinite().all() for t in (mean_D, whiten)):
        _refuse_scale(mean_D.abs().max().item(), head.metric)
    before, first_CD = head.whiten.double(), head.mu[:, : head.parts[0]]
    if whiten.dim() == 2:
        mu_CD = torch.linalg.solve(before, first_CD.double(), left=False) @ whiten
        framed_CD = spread_CD @ whiten
    else:
        mu_CD, framed_CD = first_CD.double() / before * whiten, spread_CD * whiten
    first_CD.copy_(mu_CD)
    head.center.copy_(mean_D)
    head.whiten.copy_(whiten)
    if len(head.parts) == 1:  # others have no 1-form
        head.metric.beta.copy_(_leading_direction(framed_CD))


def _precision(within: Tensor, shrinkage: float, least: Tensor) -> Tensor:
    """W⁻¹ of the shrunk within-class covariance [D, D], or variances [D], in units in which tr(W)/D = 1."""
    average = (within.diagonal() if within.dim() == 2 else within).mean().clamp_min(least)
    if within.dim() == 1:
        return 1.0 / ((1 - shrinkage) * within / average + shrinkage)
    eye_DD = torch.eye(len(within), dtype=within.dtype, device=within.device)
    return torch.cholesky_inverse(root_of_shrunk((1 - shrinkage) * within / average + shrinkage * eye_DD, shrinkage))


def root_of_shrunk(shrunk_DD: Tensor, least: float) -> Tensor:
    """The Cholesky factor of a covariance whose eigenvalues are ``least`` or more, but for rounding: where images of a
    class are copies, that is all there is of the covariance."""
    root_DD, failed = torch.linalg.cholesky_ex(shrunk_DD)
    if not failed:
        return root_DD
    e_D, V_DD = torch.linalg.eigh(shrunk_DD)
    return torch.linalg.cholesky((V_DD * e_D.clamp_min(least)) @ V_DD.t())


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
