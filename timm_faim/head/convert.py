"""Closed-form conversions between linear classifiers and FAIM heads; nothing is trained.

With logits l_k = w_k·x + b_k, prototypes μ_k = a w_k + t and Σ = I,

    |x - μ_k|² = R² - 2a (l_k - e_k),   R² = |x|² - 2 x·t + const,   e_k = b_k + |μ_k|² / 2a  (centred over k),

so that -γ d_k with γ = R/a is l_k - e_k up to a constant and terms l²/2M; M = R²/a is the size of the FAIM logits.

- *Without a prior* t makes all e_k zero: b_k + w_k·t + a |w_k|²/2 = const, a linear system, solvable where C <= D + 1.
  The nearest prototype then *is* the largest logit. Where C <= D the system leaves a direction free that no class uses;
  t moves far along it, where R is nearly the same for all features, which makes the softmaxes agree too.
- *With a prior* t lies along u, the direction of least spread of the w_k, and the prior takes the e_k up. What is lost
  is the part of the logits along u, (x·u)(w_k·u): little for trained weights, whose spread differs between directions,
  and more where classes outnumber features many times and no direction is idle.

Only differences between logits survive: all that a softmax or an argmax sees, but not enough for sigmoids.

Shapes: N features, C classes, D features' width. Everything is solved in float64 on the CPU.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .head import FAIMHead
from .presets import PRESETS

Linear = nn.Linear | nn.Conv2d

# Assumed where there are no features to measure: the logits of one image have this standard deviation over the classes.
ASSUMED_SPREAD = 2.0
# |t| in units of the features' norm: R varies by 1/shift between features. Smaller ones serve where the solution of the
# linear system would be longer than the shift (w_k nearly dependent).
_SHIFTS = (20.0, 10.0, 5.0)
_HALF_SHIFT = 1.0  # half precision cannot afford more: |μ|²/2a must not drown the logits
# M = _OFFSET · (spread of the logits) / sqrt(ε): rounding costs ε M, curvature l²/2M
_OFFSET = 3.0
_ROUND_OFF = 1e-8  # of the logits' spread: what a solvable system leaves in float64


def from_linear(
    linear: Linear,
    *,
    features: Tensor | None = None,
    prior: bool | None = None,
    faim_cfg: Mapping[str, Any] | None = None,
    feature_norm: float | None = None,
) -> FAIMHead:
    """A FAIM head that classifies as a linear layer does: the same argmax, nearly the same softmax.

    The head has μ_k = a w_k + t, Σ = I, λ = 0 and γ = (mean distance)/a; a and t as the module's docstring derives.
    λ can leave 0 in training; β keeps its random initialisation. With a prior or not, device, dtype and training mode
    are the layer's.

    Args:
        linear: ``nn.Linear`` or 1×1 ``nn.Conv2d`` of D inputs and C >= 2 outputs, with or without a bias.
        features: inputs [N, D] of the layer, a few hundred; their norm, the logits' spread, γ and the prior are then
            measured, in O(N·C) memory. Without, the norm is estimated from the weights: a trained classifier is assumed
            to spread the logits of one image by a standard deviation of 2 over the classes, and features to point in
            no particular direction, so |x| = 2 sqrt(D) / rms |w_k - w̄|. A factor of 3 either way is harmless: it
            enters through |t|/|x|.
        prior: True gives the head a prior, False none, None one where the conversion needs it: where C > D, where the
            weights are too dependent for the linear system, and in half precision. False with C = D + 1 keeps the
            argmax but not the softmax, as nothing is left to make R the same for all features, and with C > D + 1
            leaves the least-squares fit, whose decisions differ too.
        faim_cfg: further options of the head (``full_sigma``, ``margin``, ``learn_scale``, …).
        feature_norm: mean |x|, where it is known; ``features`` measure it otherwise.

    Precision: float32 keeps every decision whose margin exceeds about 0.005 logits. FAIM logits of a converted head
    are offsets from a large common value, so half precision is poor: 11 bits (float16) leave about 90 %, 8 bits
    (bfloat16) 70 to 85 % of the decisions of a 1000-class checkpoint. Convert float32 weights and run under
    autocast instead, where distances stay float32.

    Raises:
        TypeError: another kind of layer.
        ValueError: fewer than two classes, weights or features that are not finite or of another width, a
            feature_norm <= 0 or drowned by ``eps``, or head options that contradict a conversion.
    """
    weight_CD, bias_C = _weights(linear)
    C, D = weight_CD.shape
    options = dict(faim_cfg or {})
    if reason := contradiction(options):
        raise ValueError(f"faim_cfg {reason}")
    if prior is None:
        prior = options.get("prior")
    x_ND = None if features is None else checked_features(features, D)
    if feature_norm is None:
        feature_norm = estimated_norm(weight_CD) if x_ND is None else x_ND.norm(dim=1).mean().item()
    if not (feature_norm > 0 and math.isfinite(feature_norm)):
        raise ValueError(f"feature_norm must be a finite number > 0, got {feature_norm}; are the features all zero?")
    spread = ASSUMED_SPREAD
    if x_ND is not None:
        logits_NC = x_ND @ weight_CD.t() + bias_C
        spread = max(logits_NC.std(1, correction=0).mean().item(), 1e-3)

    dtype = linear.weight.dtype
    eps = options.get("eps", FAIMHead.__init__.__kwdefaults__["eps"])
    a, t_D, needs_prior = _placement(weight_CD, bias_C, feature_norm, spread, dtype, prior)
    mu_CD = (a * weight_CD + t_D).to(dtype).double()  # as the head will hold them
    squares_C = mu_CD.square().sum(1)
    if x_ND is None:
        # at equal linear logits d_k² = R² + excess_k, features having mean zero
        excess_C = 2.0 * a * bias_C + squares_C
        radius = math.sqrt(squares_C.mean().item() + feature_norm**2 + eps)
        gamma = radius / a
        missing_C = gamma * (radius**2 + excess_C - excess_C.mean()).clamp_min(0.0).sqrt()
    else:
        distance_NC = (torch.cdist(x_ND, mu_CD).square() + eps).sqrt()
        radius = distance_NC.mean().item()
        gamma = radius / a
        missing_C = (logits_NC + gamma * distance_NC).mean(0)

    if radius**2 < 2.0 * eps:
        raise ValueError(
            f"features of norm {feature_norm:.1e} drown in the smoothing eps={eps:g} of the distance; "
            "check the backbone, or pass a smaller eps in faim_cfg"
        )

    options = PRESETS["flat"] | options | {"lambda_init": 0.0, "scale_init": gamma, "prior": needs_prior}
    head = FAIMHead(D, C, **options, device=linear.weight.device, dtype=dtype)
    with torch.no_grad():
        head.mu.copy_(mu_CD)
        if head.metric.L is not None:  # Σ = L L' + ε I is to be the identity
            nn.init.eye_(head.metric.L).mul_(math.sqrt(1.0 - head.metric.eps))
        else:
            head.metric.log_sigma_diag.fill_(math.log1p(-head.metric.eps))
        if head.prior is not None:
            head.prior.copy_(missing_C - missing_C.mean())
    return head.train(linear.training)


def contradiction(faim_cfg: Mapping[str, Any]) -> str | None:
    """What among explicitly given head options rules a conversion out, as the end of a sentence; None if nothing."""
    if faim_cfg.get("preset", "flat") != "flat":
        return f"preset={faim_cfg['preset']!r}: a linear classifier becomes a head of preset 'flat'; leave preset out"
    if faim_cfg.get("space", "flat") != "flat":
        return f"space={faim_cfg['space']!r}: a linear classifier sees the length of a feature; leave space out"
    if faim_cfg.get("lambda_init"):
        return f"lambda_init={faim_cfg['lambda_init']}: a linear classifier has λ = 0; leave lambda_init out"
    if faim_cfg.get("init", "scaled") != "scaled":
        return f"init={faim_cfg['init']!r}: the weights decide where prototypes start; leave init out"
    if "scale_init" in faim_cfg:
        return f"scale_init={faim_cfg['scale_init']}: the weights decide γ; leave scale_init out"
    if faim_cfg.get("moments"):
        return f"moments={faim_cfg['moments']}: a linear classifier sees the pooled features alone; leave moments out"
    if not faim_cfg.get("eps", 0.0) < 1.0:
        return f"eps={faim_cfg['eps']}: Σ = I needs eps < 1; leave eps out"
    return None


@torch.no_grad()
def agreement(head: FAIMHead, linear: Linear, features: Tensor) -> dict[str, float]:
    """How far a FAIM head and a linear layer give the same answers on features [N, D].

    The head runs as it is, in its own dtype; the layer in float64, which is what it means.

    Returns:
        ``top1``: features of the same best class, in per cent. ``top5``: share of the layer's five best classes among
        the head's five best, in per cent. ``kl``: mean KL divergence of the head's softmax from the layer's, in nats.

    Raises:
        TypeError, ValueError: as :func:`from_linear`, and for different numbers of classes.
    """
    weight_CD, bias_C = _weights(linear)
    C, D = weight_CD.shape
    if (head.num_classes, head.in_features) != (C, D):
        raise ValueError(
            f"a head of {head.num_classes} classes and {head.in_features} features has no agreement with a layer of "
            f"{C} and {D}"
        )
    x_ND = checked_features(features, D)
    sums = torch.zeros(3, dtype=torch.float64)
    five = min(5, C)
    training = head.training
    head.eval()
    for x_BD in x_ND.split(256):
        wanted_BC = x_BD @ weight_CD.t() + bias_C
        got_BC = head(x_BD.to(head.mu)).double().cpu()
        best_B5, found_B5 = wanted_BC.topk(five).indices, got_BC.topk(five).indices
        log_p, log_q = wanted_BC.log_softmax(-1), got_BC.log_softmax(-1)
        sums[0] += (wanted_BC.argmax(-1) == got_BC.argmax(-1)).sum()
        sums[1] += (best_B5[:, :, None] == found_B5[:, None]).sum() / five
        sums[2] += (log_p.exp() * (log_p - log_q)).sum()
    head.train(training)
    top1, top5, kl = (sums / len(x_ND)).tolist()
    return {"top1": 100.0 * top1, "top5": 100.0 * top5, "kl": kl}


@torch.no_grad()
def probe_features(linear: Linear, count: int = 512) -> Tensor:
    """Features [count, D] in float64 for which a trained classifier would have made these weights; always the same.

    Random directions of the norm that :func:`from_linear` estimates, pulled towards one class each by a quarter of
    that norm (a cosine of 1/4 to the class's weights), so that there is a clear best class as on real images. Norms
    vary by 10 %, as those of pooled features do.
    """
    weight_CD, _ = _weights(linear)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(count, weight_CD.shape[1], generator=generator, dtype=torch.float64)
    pull_ND = (weight_CD - weight_CD.mean(0))[torch.randint(len(weight_CD), (count,), generator=generator)]
    x_ND = nn.functional.normalize(nn.functional.normalize(x_ND) + 0.25 * nn.functional.normalize(pull_ND))
    norms_N1 = 1.0 + 0.1 * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return estimated_norm(weight_CD) * norms_N1 * x_ND


def estimated_norm(weight_CD: Tensor) -> float:
    """|x| of which the weights make logits of the assumed spread; sqrt(D) for weights that tell no classes apart."""
    D = weight_CD.shape[1]
    rms = (weight_CD - weight_CD.mean(0)).square().sum(1).mean().sqrt().item()
    return ASSUMED_SPREAD * math.sqrt(D) / rms if rms > 0 else math.sqrt(D)


def _placement(
    weight_CD: Tensor, bias_C: Tensor, norm: float, spread: float, dtype: torch.dtype, prior: bool | None
) -> tuple[float, Tensor, bool]:
    """The scale a, the shift t [D] of the prototypes, and whether the head has a prior (which takes the rest up)."""
    C, D = weight_CD.shape
    eps = torch.finfo(dtype).eps
    half = eps > torch.finfo(torch.float32).eps
    offset = _OFFSET * spread / math.sqrt(max(eps, torch.finfo(torch.float32).eps))
    shifts = [norm * shift for shift in ((_HALF_SHIFT,) if half else _SHIFTS)]
    centred_CD = weight_CD - weight_CD.mean(0)
    if prior is False or (prior is None and C <= D and not half):
        a, t_D, solved = _solve(weight_CD, centred_CD, bias_C, norm, spread, offset, shifts)
        if solved or prior is False:
            return a, t_D, False
    least_D = torch.linalg.eigh(centred_CD.t() @ centred_CD).eigenvectors[:, 0]
    return shifts[0] ** 2 / offset, shifts[0] * least_D, True


def _solve(
    weight_CD: Tensor,
    centred_CD: Tensor,
    bias_C: Tensor,
    norm: float,
    spread: float,
    offset: float,
    shifts: list[float],
) -> tuple[float, Tensor, bool]:
    """a and t [D] from the linear system without a prior, and whether they solve it at a usable length."""
    C, D = weight_CD.shape
    # signs that alternate: features of one sign (after a ReLU) have little of this direction
    start_D = torch.ones(D, dtype=torch.float64)
    start_D[1::2] = -1.0
    right_C3 = torch.stack([-bias_C, -0.5 * weight_CD.square().sum(1), centred_CD @ start_D], 1)
    right_C3 -= right_C3.mean(0)
    # gelsy: also for dependent rows, and the shortest of several solutions
    bias_D, squares_D, used_D = torch.linalg.lstsq(centred_CD, right_C3, driver="gelsy").solution.unbind(1)
    if C <= D:
        free_D = nn.functional.normalize(start_D - used_D, dim=0)
    else:  # nothing is free: no shift, and R varies with the feature as |x| does
        free_D, shifts = torch.zeros(D, dtype=torch.float64), [norm]
    for shift in shifts:
        a = shift**2 / offset
        t_D = bias_D + a * squares_D
        residual_C = centred_CD @ t_D - right_C3[:, 0] - a * right_C3[:, 1]
        solved = residual_C.abs().max().item() <= _ROUND_OFF * spread and t_D.norm().item() <= shift
        if solved:
            break
    return a, t_D + shift * free_D, solved


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C] (zeros without) in float64 on the CPU."""
    pointwise = isinstance(linear, nn.Conv2d) and linear.kernel_size == (1, 1) and linear.groups == 1
    if not (pointwise or isinstance(linear, nn.Linear)):
        raise TypeError(f"expected nn.Linear or a 1×1 nn.Conv2d without groups, got {linear}")
    if linear.weight.is_meta:
        raise ValueError("the weights are on the meta device, without values; load them first")
    weight_CD = linear.weight.detach().flatten(1).double().cpu()
    if len(weight_CD) < 2:
        raise ValueError(f"a classifier has at least 2 outputs, got {len(weight_CD)}; only differences are converted")
    bias_C = torch.zeros(len(weight_CD), dtype=torch.float64)
    if linear.bias is not None:
        bias_C = linear.bias.detach().double().cpu()
    if not (weight_CD.isfinite().all() and bias_C.isfinite().all()):
        raise ValueError("the linear layer's weights contain NaN or inf; check the checkpoint")
    return weight_CD, bias_C


def checked_features(features: Tensor, D: int) -> Tensor:
    """Features in float64 on the CPU."""
    if features.dim() != 2 or features.shape[1] != D or len(features) == 0:
        raise ValueError(f"expected features [N, {D}] with N >= 1, got {list(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features contain NaN or inf; check the backbone's weights and the input normalisation")
    return features.detach().double().cpu()
