"""How well an image is known, from the logits alone.

Shapes: N images, C classes.
"""

import torch
from torch import Tensor

WARMTH = 2.0  # times the calibrated temperature
SHARE = 0.75  # of the probability, the rest of the distance


def known_score(logits: Tensor) -> Tensor:
    """Larger for images of known classes [N], of calibrated logits [N, C] (those of a model after its temperature).

        s = ¾ log p_y + ¼ l_y = l_y - ¾ log Σ exp(l_k),   l = logits / 2, p = softmax(l), y the best class

    The probability tells an image between classes from one that is clearly of one class, the largest logit, -γ d of the
    nearest prototype, tells how far it is from all of them. Where many classes are known the former says more, where
    few are the latter; this mixture is near the better one in both cases (docs/unknown.md has the study). Of one class
    the distance is all there is. It is computed in at least float32; N may be 0.

    Raises:
        ValueError: another shape, no classes.
    """
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [N, C] with C >= 1, got shape {list(logits.shape)}")
    warm_NC = logits.to(torch.promote_types(logits.dtype, torch.float32)) / WARMTH
    return warm_NC.amax(1) - SHARE * warm_NC.logsumexp(1)
