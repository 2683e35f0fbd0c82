"""One number that makes confidence accuracy: softmax(logits / T) (Guo et al. 2017, arXiv:1706.04599).

Shapes: N images, C classes.
"""

import math

import torch
from torch import Tensor, nn

from timm_faim.head import faim_heads
from timm_faim.metric import checked_number

from .checked import checked_rows

LEAST, MOST = 0.01, 100.0  # of T
_STEPS, _CLOSE = 100, 1e-12  # of the search for log T
_AT_ONCE = 1 << 22  # numbers in float64


def fit_temperature(logits: Tensor, targets: Tensor, doubt: float = 0.0) -> float:
    """The T in [1/100, 100] with the least cross entropy of ``logits / T``.

    The cross entropy is convex in 1/T, so its slope has one root at most: Newton's steps, kept inside a bracket that
    halves where they leave it; in float64, always the same for the same numbers. Logits that put every target first
    have no least above T = 0 and get the lower end, those worse than a guess the upper one. Where T changes nothing
    (one class, equal logits) it is 1.

    Args:
        logits: [N, C] of images that the classifier has not been fitted to.
        targets: class indices [N].
        doubt: so many images >= 0 are added, each a mixture of the N with their likeliest wrong class for the right
            one. With 1, N images that are all classified rightly give a confidence near N / (N + 1) and not certainty
            (after Platt 1999, who adds such images to fit his sigmoid); where there are errors it changes little.

    Raises:
        ValueError: no images, targets outside the classes, logits that are not finite, a negative doubt.
    """
    logits_NC, y_N = checked_rows("logits", logits, targets), targets.to(logits.device).long()
    doubt = checked_number("doubt", doubt)
    logits_NC = logits_NC - logits_NC.amax(1, keepdim=True)
    if not logits_NC.any():
        return 1.0
    own_N1 = logits_NC.gather(1, y_N[:, None])
    wrong_N = logits_NC.scatter(1, y_N[:, None], -math.inf).amax(1)
    share = doubt / (len(y_N) + doubt)
    right = (1.0 - share) * own_N1.mean().item() + share * wrong_N.mean().item()  # the mean logit of what is right
    low, high = -math.log(MOST), -math.log(LEAST)  # of s = log 1/T; the slope grows with s
    if _slope(logits_NC, right, high)[0] <= 0.0:
        return LEAST
    if _slope(logits_NC, right, low)[0] >= 0.0:
        return MOST
    s = 0.0
    for _ in range(_STEPS):
        slope, curvature = _slope(logits_NC, right, s)
        low, high = (s, high) if slope < 0.0 else (low, s)
        step = slope / curvature if curvature > 0.0 else math.inf
        wanted = s - step
        if not low < wanted < high:
            wanted = 0.5 * (low + high)
        if abs(wanted - s) < _CLOSE:
            return math.exp(-wanted)
        s = wanted
    return math.exp(-s)


def _slope(logits_NC: Tensor, right: float, s: float) -> tuple[float, float]:
    """Of the mean cross entropy of β · logits, β = exp(s), the derivative by β, and that one's derivative by s."""
    beta, mean, variance = math.exp(s), 0.0, 0.0
    for l_BC in logits_NC.split(max(1, _AT_ONCE // logits_NC.shape[1])):
        p_BC = (beta * l_BC).softmax(1)
        mean_B = (p_BC * l_BC).sum(1)
        mean += mean_B.sum().item()
        variance += (p_BC * (l_BC - mean_B[:, None]).square()).sum().item()
    return mean / len(logits_NC) - right, beta * variance / len(logits_NC)


@torch.no_grad()
def apply_temperature_(model: nn.Module, T: float) -> nn.Module:
    """Divide the logits of ``model`` by T, in place: γ of every FAIM head, and its prior where it has one.

    Whoever opens the weights afterwards gets calibrated probabilities and needs nothing else. The order of the classes
    stays; several heads whose logits are averaged scale alike.

    Raises:
        ValueError: a T outside [1/100, 100], a model without FAIM heads (a folded head is a copy: fold again), or a γ
            or prior that would leave the range of its dtype; the model is then as it was.
    """
    if isinstance(T, bool) or not isinstance(T, (int, float)) or not LEAST <= T <= MOST:
        raise ValueError(f"the temperature must be a number in [{LEAST:g}, {MOST:g}], got {T!r}")
    heads = faim_heads(model)
    if not heads:
        raise ValueError("the model has no FAIM head to calibrate; create it under its faim_ name, and calibrate "
                         "before heads are folded or converted")  # fmt: skip
    parameters = {p for head in heads.values() for p in (head.scale, head.prior) if p is not None}  # once if shared
    scaled = {p: (p.double() / T).to(p.dtype) for p in parameters}
    for p, value in scaled.items():
        if not value.isfinite().all() or (value == 0).ne(p == 0).any():
            raise ValueError(f"logits divided by {T:g} leave the range of the head's {p.dtype}; convert it to float32")
    for p, value in scaled.items():
        p.copy_(value)
    return model
