"""Log and exp maps of a FAIM metric in isometric normal coordinates.

In a Minkowski space x - p and p + v are the point-wise maps, and log, W, exp would collapse to one affine map. Here
tangent vectors live in the Σ-orthonormal frame, rescaled so that their Euclidean length is the Finsler distance. With
z = A (x - p), AᵀA = Σ, δ = ε of the metric:

    log_p(x) = z (1 + λ |β̂'z| / (sqrt(|z|² + δ) + sqrt(δ)))                                    |log_p(x)| = F(x - p)
    exp_p(w) = p + A⁻¹ w / (1 + λ |β̂'w| / (R + sqrt(δ))),   R = sqrt(|w|² + 2 λ |β̂'w| sqrt(δ) + δ)

(Randers: β̂'z instead of |β̂'z|; F(x - p) then is d_F(x, p), not d_F(p, x).) Each is the exact inverse of the other,
whatever δ; δ makes both differentiable at p, where their derivatives are A and A⁻¹. For lengths far above sqrt(δ), and
for all with δ = 0, they are homogeneous of degree one and |log_p(x)| = |z| + λ |β̂'z|; with δ the two sides of that
differ by at most (1 + 3 λ |β̂|) sqrt(δ).

Shapes: D features, any other dimensions.
"""

import torch
from torch import Tensor

from timm_faim.metric import FAIMMetric, without_autocast
from timm_faim.metric.frame import Frame


def log_map(x: Tensor, p: Tensor, metric: FAIMMetric, dim: int = -1, frame: Frame | None = None) -> Tensor:
    """Coordinates log_p(x) of points x seen from p, of Euclidean length F(x - p); in the dtype of x.

    Args:
        x: points [..., D], or with D at ``dim`` (1 for images [B, D, H, W]).
        p: base points that broadcast with x.
        metric: a metric of width D.
        dim: where D is, the same in x and p; a p of one dimension [D] goes with any.
        frame: the metric's frame, where it is known already (a full Σ is factored for it).

    Raises:
        ValueError: another width than the metric's.
    """
    return _apply(_log, x, p, metric, dim, frame)


def exp_map(w: Tensor, p: Tensor, metric: FAIMMetric, dim: int = -1, frame: Frame | None = None) -> Tensor:
    """The point exp_p(w) whose coordinates seen from p are w, the inverse of :func:`log_map`; in the dtype of w.

    Args:
        w: coordinates [..., D], or with D at ``dim``.
        p: base points that broadcast with w.
        metric: a metric of width D.
        dim: where D is, the same in w and p; a p of one dimension [D] goes with any.
        frame: the metric's frame, where it is known already (a full Σ is factored for it).

    Raises:
        ValueError: another width than the metric's.
    """
    return _apply(_exp, w, p, metric, dim, frame)


def _log(x: Tensor, p: Tensor, frame: Frame, symmetric: bool, delta: float) -> Tensor:
    z = frame.whiten(x - p)
    stretch = _one_form(z, frame, symmetric) / (_root(z.square().sum(-1, keepdim=True), delta) + delta**0.5)
    return z * (1.0 + stretch)


def _exp(w: Tensor, p: Tensor, frame: Frame, symmetric: bool, delta: float) -> Tensor:
    form = _one_form(w, frame, symmetric)
    root = _root(w.square().sum(-1, keepdim=True) + 2.0 * delta**0.5 * form, delta)
    return p + frame.unwhiten(w / (1.0 + form / (root + delta**0.5)))


def _one_form(z: Tensor, frame: Frame, symmetric: bool) -> Tensor:
    """λ |β̂'z| [..., 1], or λ β̂'z."""
    b = (z * frame.one_form_D).sum(-1, keepdim=True)
    return frame.lmbda * (b.abs() if symmetric else b)


def _root(square: Tensor, delta: float) -> Tensor:
    """sqrt(square + δ), never 0: a quotient by it is 0 at p."""
    return (square + delta).clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _apply(map_, x: Tensor, p: Tensor, metric: FAIMMetric, dim: int, frame: Frame | None = None) -> Tensor:
    if x.shape[dim] != metric.in_features:
        raise ValueError(f"expected {metric.in_features} features at dimension {dim}, got shape {list(x.shape)}")
    if p.shape[-1 if p.dim() == 1 else dim] != metric.in_features:
        raise ValueError(f"expected base points of {metric.in_features} features, got shape {list(p.shape)}")
    if dim not in (-1, x.dim() - 1):
        p = p if p.dim() == 1 else p.movedim(dim, -1)
        return _apply(map_, x.movedim(dim, -1), p, metric, -1, frame).movedim(-1, dim)
    return without_autocast(_apply_last, x, p, map_, metric, frame)


def _apply_last(x: Tensor, p: Tensor, map_, metric: FAIMMetric, frame: Frame | None) -> Tensor:
    """Features at the last dimension, in at least float32."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)
    if frame is None or frame.one_form_D.dtype != dtype:
        frame = metric(x.to(dtype), frame=True)
    return map_(x.to(dtype), p.to(dtype), frame, metric.symmetric, metric.eps).to(x.dtype)
