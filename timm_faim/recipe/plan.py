"""What a head in closed form is made with: fixed, or chosen by held-out images."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHRINKAGE, WEIGHT, SINGLE_WEIGHT = 0.3, 0.75, 0.85  # of moments; the last where each class has one image


@dataclass(frozen=True)
class Plan:
    """Options of a fit.

    ``parts``: the parts of the features that the head reads, by number; the first is the pooled features. ``weight``:
    the others' share of the squared distance, in [0, 1], alike for each. ``shrinkage`` of Σ, in (0, 1], and ``share``,
    the strength at which prototypes are shared with look-alikes, in [0, 100].
    """

    parts: tuple[int, ...] = (0,)
    weight: float = WEIGHT
    shrinkage: float = SHRINKAGE
    share: float = 0.0

    @property
    def part_weights(self) -> list[float]:
        """One a part, of sum 1."""
        others = len(self.parts) - 1
        return [1.0 - self.weight] + [self.weight / others] * others if others else [1.0]

    def to_json(self) -> dict[str, Any]:
        """As a mapping of JSON's types."""
        return asdict(self) | {"parts": list(self.parts)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Plan":
        """What :meth:`to_json` gave."""
        return cls(**{**saved, "parts": tuple(saved["parts"])})
