"""FAIMClassifier: the closed form of a FAIM head as a scikit-learn estimator, for feature vectors.

γ changes probabilities and not predictions. Cross-fitting finds it: heads fitted without a part of the samples give
logits of that part, and the temperature of all these makes γ what it is (Guo et al. 2017).

Shapes: N samples, C classes, D features.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_faim.calibration import fit_temperature
from timm_faim.head import SPACES, FAIMHead
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.fit import fitted_features
from timm_faim.head.statistics import HeadStatistics
from timm_faim.metric import checked_number

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import gen_batches
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as e:
    raise ImportError("FAIMClassifier needs scikit-learn >= 1.6: pip install 'timm-faim[sklearn]'") from e

GAMMA = 16.0  # where there is nothing to find it from: that of a fresh head
FOLDS = 3
ROWS = 4096  # that become tensors at a time
_MOST_HELD_OUT = 20_000  # samples enough for one number
_INPUT = {"dtype": [np.float64, np.float32]}


class FAIMClassifier(ClassifierMixin, BaseEstimator):
    """Nearest class mean on the unit sphere of whitened features, see :class:`timm_faim.FAIMHead`; no gradient steps.

    Everything is computed in float64 on the CPU. ``fit`` costs O(N D² + D³) with full Σ, ``partial_fit`` O(N D²) of its
    own samples, and its state is that of one fit on all of them but for γ. A class without samples, which
    ``partial_fit`` alone can have, is never predicted.

    Args:
        shrinkage: of the covariance within classes, in (0, 1]; 1 takes Σ = I. Few samples a class need more.
        share: strength in [0, 100] at which prototypes of few samples are shared with look-alikes, see
            :func:`timm_faim.head.sharing.share_prototypes`.
        space: "indicatrix" (centred, whitened, cosine), "sphere" (cosine of the features as they are) or "flat"
            (distance in whitened features: with equal priors the classes of linear discriminant analysis).
        full_sigma: False takes variances alone, in O(N D).
        parts: widths of parts that lie side by side in the features, of sum D; each has a frame of its own.
        part_weights: of the parts' squared distances (default: alike).
        rank: directions of the Σ of all parts but the first.
        gamma: inverse temperature of the probabilities, > 0. "auto": ``fit`` finds it by cross-fitting in 3 folds, in
            four times the time; 16 where no class has two samples and where ``partial_fit`` has seen all samples.

    Attributes:
        classes_: class labels [C], sorted.
        n_features_in_: D.
        feature_names_in_: where the features have names.
        gamma_: γ in force.
        head_: the fitted :class:`timm_faim.FAIMHead` in float64, of the classes with samples; solved for on first use.
    """

    def __init__(
        self,
        *,
        shrinkage: float = 0.3,
        share: float = 0.0,
        space: str = "indicatrix",
        full_sigma: bool = True,
        parts: Sequence[int] | None = None,
        part_weights: Sequence[float] | None = None,
        rank: int = 256,
        gamma: float | str = "auto",
    ) -> None:
        self.shrinkage = shrinkage
        self.share = share
        self.space = space
        self.full_sigma = full_sigma
        self.parts = parts
        self.part_weights = part_weights
        self.rank = rank
        self.gamma = gamma

    def fit(self, X: Any, y: Any) -> "FAIMClassifier":
        """Fit to samples X [N, D] of classes y [N], from nothing.

        Raises:
            ValueError, TypeError: data that are not finite, or fewer than 2 samples; samples that are all equal; a
                parameter out of its range.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, ensure_min_samples=2, **_INPUT)
        check_classification_targets(y)
        classes, targets = np.unique(y, return_inverse=True)
        sums = self._summed(X, targets, len(classes))
        head = self._solved(sums)  # says what is wrong with the samples
        self._found = self._calibrated(X, targets) if self.gamma == "auto" else None
        self.classes_, self._statistics = classes, sums
        self._head = self._scaled(head)
        return self

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "FAIMClassifier":
        """Add samples X [N, D] of classes y [N] to those before.

        Args:
            X: samples.
            y: their classes.
            classes: all labels there will be; needed in the first call, where there was no ``fit``.

        Raises:
            ValueError: as in ``fit``, but for the number of samples; unknown classes.
        """
        self._check_parameters()
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit: all labels there will be")
        X, y = validate_data(self, X, y, reset=first, **_INPUT)
        check_classification_targets(y)
        known = np.unique(classes) if first else self.classes_
        if classes is not None and not np.array_equal(known, np.unique(classes)):
            raise ValueError(f"classes={classes!r} is not the same as on the last call to partial_fit: {known!r}")
        if unknown := sorted(set(np.unique(y)) - set(known)):
            raise ValueError(f"y has classes that partial_fit was not told of at first: {unknown[:3]}")
        before = None if first else self._statistics
        self._found = None if first else self._found
        self._statistics = self._summed(X, np.searchsorted(known, y), len(known), before)
        self.classes_, self._head = known, None
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits -γ d [N, C]; of two classes the second one's minus the first one's [N]."""
        logits = self._logits(X).numpy()
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [N, C], the softmax of the logits."""
        return self._logits(X).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels [N]; of equally near classes the first."""
        nearest = self._logits(X).numpy().argmax(1)
        return self.classes_[nearest]

    @property
    def head_(self) -> FAIMHead:
        check_is_fitted(self)
        if self._head is None:
            self._head = self._scaled(self._solved(self._statistics))
        return self._head

    @property
    def gamma_(self) -> float:
        return self.head_.gamma().item()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def _check_parameters(self) -> None:
        checked_number("shrinkage", self.shrinkage, most=1.0, above=True)
        checked_number("share", self.share, most=100.0)
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {SPACES}, got {self.space!r}")
        if not (isinstance(self.gamma, str) and self.gamma == "auto"):
            checked_number("gamma", self.gamma, above=True)

    def _new_head(self, num_classes: int) -> FAIMHead:
        return FAIMHead(
            self.n_features_in_,
            num_classes,
            space=self.space,
            full_sigma=self.full_sigma,
            parts=tuple(self.parts or ()),
            part_weights=tuple(self.part_weights or ()),
            rank=self.rank,
            scale_init=GAMMA,
            dtype=torch.float64,
        ).eval()

    def _summed(
        self, X: np.ndarray, targets: np.ndarray, num_classes: int, sums: HeadStatistics | None = None
    ) -> HeadStatistics:
        """Moments of samples, added to those that there are."""
        head = self._new_head(num_classes)
        sums = HeadStatistics(head) if sums is None else sums
        for rows in gen_batches(len(X), ROWS):
            with torch.no_grad():
                sums.update(fitted_features(head, _tensor(X[rows])), torch.tensor(targets[rows]))
        return sums

    def _solved(self, sums: HeadStatistics) -> FAIMHead:
        """The head of the classes that have samples."""
        seen = sums.counts_C > 0
        sums = copy.copy(sums)
        sums.counts_C, sums.sums_CD = sums.counts_C[seen], sums.sums_CD[seen]
        head = fit_from_statistics_(self._new_head(len(sums.counts_C)), sums, self.shrinkage, self.share)
        return head.requires_grad_(False)

    def _scaled(self, head: FAIMHead) -> FAIMHead:
        """The head with γ in force."""
        torch.nn.init.constant_(head.scale, (self._found or GAMMA) if self.gamma == "auto" else self.gamma)
        return head

    def _calibrated(self, X: np.ndarray, targets: np.ndarray) -> float | None:
        """γ from samples held out in turn; None where none can be."""
        fold, num_classes = _folds(targets), int(targets.max()) + 1
        logits, answers = [], []
        for k in range(FOLDS):
            held, rest = np.flatnonzero(fold == k), fold != k
            held = held[:: 1 + len(X) // _MOST_HELD_OUT]
            if not len(held):
                break
            try:
                head = self._solved(self._summed(X[rest], targets[rest], num_classes))
            except ValueError:  # what is left may all be equal
                return None
            logits += [head(_tensor(X[rows])) for rows in _batches(held)]
            answers.append(torch.tensor(targets[held]))
        # doubt, as where classes are told apart without an error nothing else bounds γ
        return GAMMA / fit_temperature(torch.cat(logits), torch.cat(answers), doubt=1.0) if logits else None

    def _logits(self, X: Any) -> Tensor:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, **_INPUT)
        head, seen = self.head_, self._statistics.counts_C > 0
        logits = torch.full((len(X), len(self.classes_)), -torch.inf, dtype=torch.float64)
        for rows in gen_batches(len(X), ROWS):
            logits[rows, seen] = head(_tensor(X[rows]))
        return logits


def _tensor(rows: np.ndarray) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def _batches(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[rows] for rows in gen_batches(len(numbers), ROWS)]


def _folds(targets: np.ndarray) -> np.ndarray:
    """The fold of each sample [N]: those of a class in turn, -1 (never held out) for the only one of its class."""
    counts = np.bincount(targets)
    order = np.argsort(targets, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[targets[order]]
    return np.where(counts[targets] > 1, place % FOLDS, -1)
