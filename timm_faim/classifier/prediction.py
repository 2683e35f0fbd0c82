"""What a classifier says of an image.

Shapes: B images, C classes, K of them that are told.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from timm_faim.calibration import Calibration, known_score, prediction_sets

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first.

    Attributes:
        classes: K names.
        probabilities: of these, in 0..1.
        distances: from the image to the prototypes of these; None of a model without one FAIM head.
        known: whether the image is like those of the classes, at the rate that was asked for; None where nothing was
            held out to tell.
        candidates: the classes that hold the right one at the coverage that was asked for; None where it was not.
        neighbours: (training image, distance) of those that are most alike, nearest first; empty where it was not
            asked for.
    """

    classes: list[str]
    probabilities: list[float]
    distances: list[float] | None = None
    known: bool | None = None
    candidates: list[str] | None = None
    neighbours: Sequence[tuple[str, float]] = ()

    @property
    def name(self) -> str:
        """The best class, or "unknown"."""
        return UNKNOWN if self.known is False else self.classes[0]

    @property
    def confidence(self) -> float:
        """The probability of the best class."""
        return self.probabilities[0]


@dataclass(frozen=True)
class Judge:
    """Makes predictions of logits.

    Args:
        names: of the classes, in the order of the logits.
        top: K, at most C.
        gamma, prior: of the one FAIM head that gives the logits; None: there are no distances to tell.
        calibration: with the thresholds; None: nothing is rejected, and there are no candidates.
        rate: share of known images that may be rejected; 0 rejects nothing.
        coverage: of the candidates; None: none.

    Raises:
        ValueError: a rate or coverage that the calibration has no threshold for.
    """

    names: Sequence[str]
    top: int = 5
    gamma: float | None = None
    prior: Tensor | None = None
    calibration: Calibration | None = None
    rate: float = 0.0
    coverage: float | None = None

    def __post_init__(self) -> None:
        if self.coverage is not None and self.calibration is None:
            raise ValueError("sets of classes need a calibrated classifier: one whose training had validation images, "
                             "or that was fitted")  # fmt: skip
        if self.calibration is not None:
            if self.rate and self.calibration.reject and self.rate not in self.calibration.reject:
                raise ValueError(_no_threshold(self.rate, self.calibration.reject))
            if self.coverage is not None and self.coverage not in self.calibration.sets:
                raise ValueError(_no_threshold(self.coverage, self.calibration.sets))

    def __call__(self, logits_BC: Tensor) -> list[Prediction]:
        """Predictions of B images; the logits may lie on any device."""
        logits_BC = logits_BC.float()
        p_BC = logits_BC.softmax(1)
        K = min(self.top, len(self.names))
        # the order of equal logits is that of the classes, so that every run says the same
        order_BK = logits_BC.sort(dim=1, descending=True, stable=True).indices[:, :K]
        distances = [None] * len(logits_BC)
        if self.gamma is not None:
            d_BC = -logits_BC if self.prior is None else self.prior - logits_BC
            distances = (d_BC.gather(1, order_BK) / self.gamma).tolist()
        known = [None] * len(logits_BC)
        if self.calibration is not None and self.rate in self.calibration.reject:
            known = (known_score(logits_BC) >= self.calibration.reject[self.rate]).tolist()
        candidates = [None] * len(logits_BC)
        if self.coverage is not None and self.calibration is not None:
            sets_BC = prediction_sets(p_BC, self.calibration.sets[self.coverage])
            candidates = [[self.names[k] for k in row.nonzero().flatten().tolist()] for row in sets_BC.cpu()]
        rows = zip(order_BK.tolist(), p_BC.gather(1, order_BK).tolist(), distances, known, candidates, strict=True)
        return [Prediction([self.names[k] for k in order], p, d, is_known, c) for order, p, d, is_known, c in rows]


def _no_threshold(value: float, there: Iterable[float]) -> str:
    known = ", ".join(f"{each:g}" for each in there)
    return f"there is no threshold for {value:g}; the calibration has " + (known or "none since the classes changed")
