"""What calibration asks of logits, classes and rates, in one place.

Shapes: N images, C classes.
"""

import torch
from torch import Tensor


def checked_rows(name: str, rows_NC: Tensor, targets_N: Tensor | None = None) -> Tensor:
    """Rows [N, C] in float64, N and C >= 1, with their classes [N] where there are any.

    Raises:
        ValueError: other shapes, no rows, targets that are no class indices, numbers that are not finite.
    """
    if rows_NC.dim() != 2 or not rows_NC.numel():
        raise ValueError(f"{name} must be [N, C] with N, C >= 1, got shape {list(rows_NC.shape)}")
    if not rows_NC.isfinite().all():
        raise ValueError(f"{name} contain NaN or inf; check the model's weights and its input")
    if targets_N is not None:
        C = rows_NC.shape[1]
        if targets_N.shape != rows_NC.shape[:1] or targets_N.is_floating_point() or targets_N.is_complex():
            raise ValueError(f"targets must be {len(rows_NC)} class indices, got {targets_N.dtype} of shape "
                             f"{list(targets_N.shape)}")  # fmt: skip
        if not (int(targets_N.min()) >= 0 and int(targets_N.max()) < C):
            raise ValueError(f"targets must lie in [0, {C}), got {int(targets_N.min())} to {int(targets_N.max())}")
    return rows_NC.detach().double()


def checked_share(name: str, value: object) -> float:
    """A number in [0, 1).

    Raises:
        ValueError: another one, or no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def checked_scores(scores_N: Tensor) -> Tensor:
    """Scores [N] in float64, N >= 1.

    Raises:
        ValueError: another shape, no scores, scores that are not finite.
    """
    if scores_N.dim() != 1 or not len(scores_N):
        raise ValueError(f"scores must be [N] with N >= 1, got shape {list(scores_N.shape)}")
    if not scores_N.isfinite().all():
        raise ValueError("scores contain NaN or inf; check the model's weights and its input")
    return scores_N.detach().double()


def smallest(values_N: Tensor, k: int) -> float:
    """The k-th smallest value, k from 1 to N."""
    return torch.kthvalue(values_N, k).values.item()
