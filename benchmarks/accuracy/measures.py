"""Top-1 and calibration of logits, as train_faim.py measures them."""

import numpy as np
from torch import Tensor

from timm_faim.report.evaluation import Evaluation


def measures(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """``top1`` and ``ece`` (15 bins), both as fractions, of logits [N, C] and class indices [N]."""
    confidence, predicted = (t.cpu().numpy() for t in logits.softmax(1).max(1))
    target = targets.cpu().numpy()
    unused = np.zeros(len(target))  # top-5, loss and the like
    found = Evaluation(logits.shape[1], np.arange(len(target)), target, predicted, confidence, *[unused] * 3)
    return {"top1": found.correct.mean().item(), "ece": found.ece() / 100}
