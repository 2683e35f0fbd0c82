"""Whether unlabelled images help, by images with labels that the head was not fitted to.

Shapes: N images, C classes.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

TOLERANCE = 2.0  # standard errors


@dataclass(frozen=True)
class Check:
    """Top-1 in per cent on held-out images without and with the unlabelled ones; ``error`` is the standard error of the
    difference, over the ``images``."""

    before: float
    after: float
    error: float
    images: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor, targets: Tensor) -> "Check":
        """From the logits [N, C] of the same held-out images without and with.

        Raises:
            ValueError: no images, shapes that do not fit.
        """
        if not len(targets) or before.shape != after.shape or targets.shape != before.shape[:1]:
            raise ValueError(f"expected logits [N, C] twice and N >= 1 targets, got {list(before.shape)}, "
                             f"{list(after.shape)}, {list(targets.shape)}")  # fmt: skip
        right = [(each.argmax(1) == targets.to(each.device)).double() for each in (before, after)]
        error = (right[1] - right[0]).std().item() / len(targets) ** 0.5 if len(targets) > 1 else 0.0
        return cls(*(100.0 * each.mean().item() for each in right), 100.0 * error, len(targets))

    @property
    def kept(self) -> bool:
        """Not worse by more than twice the standard error.

        Held-out images come from the same series as the labelled ones and gain less than new ones do; to ask for more
        gives away more than it guards (docs/unlabelled.md).
        """
        return self.after - self.before >= -TOLERANCE * self.error

    def line(self) -> str:
        """For a person."""
        return (
            f"unlabelled images: {self.images} held-out images {self.before:.1f} -> {self.after:.1f} % "
            f"(± {self.error:.1f}), {'kept' if self.kept else 'not kept'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)
