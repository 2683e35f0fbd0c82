"""What a classifier's logits on held-out images say of it, as one record that is saved beside the weights.

Shapes: N images, C classes.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .checked import checked_rows
from .conformal import set_threshold, threshold
from .error import calibration_error
from .score import known_score
from .temperature import LEAST, MOST, fit_temperature

RATES = (0.01, 0.05, 0.10)  # of known images rejected
COVERAGES = (0.90, 0.95, 0.99)  # of sets of classes
SOURCES = ("validation", "cross-fitted training images")


@dataclass(frozen=True)
class Calibration:
    """Temperature, thresholds, and what they come from.

    ``temperature`` divides the logits; everything else is of logits after that. ``images`` and ``source`` say what it
    was measured on. ``ece_before`` and ``ece_after`` are in per cent, the latter with the temperature of one half of
    the images on the other; None where the images have no two halves. ``reject`` has the least :func:`known_score` that
    is accepted by the rate of known images that are rejected (-inf: too few images for the rate, nothing is), ``sets``
    the q of :func:`prediction_sets` by their coverage.
    """

    temperature: float
    images: int
    source: str
    ece_before: float
    ece_after: float | None
    reject: dict[float, float]
    sets: dict[float, float]

    def to_json(self) -> dict[str, Any]:
        """Numbers, words and dicts that :mod:`json` writes as they are; -inf as None."""
        written = asdict(self)
        written["reject"] = {f"{rate:g}": None if t == -math.inf else t for rate, t in self.reject.items()}
        written["sets"] = {f"{coverage:g}": q for coverage, q in self.sets.items()}
        return written

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Calibration":
        """What :meth:`to_json` gave.

        Raises:
            ValueError: keys missing or unknown, or values that :func:`calibrate` cannot have given.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(written, Mapping) or sorted(written) != sorted(names):
            found = sorted(written) if isinstance(written, Mapping) else written
            raise ValueError(f"a calibration has the keys {names}, got {found!r}; calibrate again")
        try:
            made = cls(
                temperature=float(written["temperature"]),
                images=int(written["images"]),
                source=str(written["source"]),
                ece_before=float(written["ece_before"]),
                ece_after=None if written["ece_after"] is None else float(written["ece_after"]),
                reject={float(k): -math.inf if t is None else float(t) for k, t in written["reject"].items()},
                sets={float(k): float(q) for k, q in written["sets"].items()},
            )
        except (AttributeError, TypeError, ValueError) as e:
            raise ValueError(f"not a calibration: {e}; calibrate again") from e
        errors = [made.ece_before, 0.0 if made.ece_after is None else made.ece_after]
        if not (
            LEAST <= made.temperature <= MOST
            and made.images >= 1
            and made.source in SOURCES
            and all(0.0 <= error <= 100.0 for error in errors)
            and all(0.0 <= rate < 1.0 and -math.inf <= t < math.inf for rate, t in made.reject.items())
            and all(0.0 <= coverage < 1.0 and 0.0 <= q <= 1.0 for coverage, q in made.sets.items())
        ):
            raise ValueError(f"not a calibration: numbers out of range in {dict(written)}; calibrate again")
        return made


@torch.no_grad()
def calibrate(logits: Tensor, targets: Tensor, source: str) -> Calibration:
    """Temperature first (with one image of doubt, see :func:`fit_temperature`), then thresholds on logits / T.

    T and thresholds come from the same images. T is one number, and the thresholds' rates keep to what was asked for up
    to what it adapts to them, which is nothing next to their own chance of 1/√n.

    Args:
        logits: [N, C] of images that the classifier is not fitted to, before the temperature.
        targets: class indices [N].
        source: "validation" or "cross-fitted training images".

    Raises:
        ValueError: no images, targets outside the classes, logits that are not finite, another source.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
    logits_NC, targets_N = checked_rows("logits", logits, targets), targets.to(logits.device).long()
    T = fit_temperature(logits_NC, targets_N, doubt=1.0)
    calibrated = logits_NC / T
    p_NC, scores_N = calibrated.softmax(1), known_score(calibrated)
    return Calibration(
        temperature=T,
        images=len(logits_NC),
        source=source,
        ece_before=calibration_error(logits_NC.softmax(1), targets_N),
        ece_after=_error_after(logits_NC, targets_N),
        reject={rate: threshold(scores_N, rate) for rate in RATES},
        sets={coverage: set_threshold(p_NC, targets_N, coverage) for coverage in COVERAGES},
    )


def _error_after(logits_NC: Tensor, targets_N: Tensor) -> float | None:
    """Calibration error with the temperature of one half of the images on the other."""
    second_N = _second_halves(targets_N)
    if second_N.all() or not second_N.any():
        return None
    p_NC = torch.empty_like(logits_NC)
    for other_N in (second_N, ~second_N):
        T = fit_temperature(logits_NC[~other_N], targets_N[~other_N], doubt=1.0)
        p_NC[other_N] = (logits_NC[other_N] / T).softmax(1)
    return calibration_error(p_NC, targets_N)


def _second_halves(targets_N: Tensor) -> Tensor:
    """Bool [N]: the later half of each class, so that images that follow one another, often series of near-duplicates,
    are on one side. The middle one of an odd number goes to the second half of every other class."""
    order_N = targets_N.argsort(stable=True)
    counts_C = targets_N.bincount()
    first_C = counts_C.cumsum(0) - counts_C
    place_N = torch.empty_like(targets_N)
    place_N[order_N] = torch.arange(len(targets_N), device=targets_N.device) - first_C[targets_N[order_N]]
    return 2 * place_N + targets_N % 2 >= counts_C[targets_N]
