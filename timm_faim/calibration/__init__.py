"""Confidence that is accuracy, and "none of these": temperature, rejection and sets of classes with a known rate."""

from .calibration import COVERAGES, RATES, SOURCES, Calibration, calibrate
from .conformal import prediction_sets, set_threshold, threshold
from .cross_fit import FOLDS, cross_fitted_logits, lookalike_folds, same_image
from .error import BINS, calibration_error, reliability
from .score import known_score
from .temperature import apply_temperature_, fit_temperature

__all__ = [
    "BINS",
    "COVERAGES",
    "FOLDS",
    "RATES",
    "SOURCES",
    "Calibration",
    "apply_temperature_",
    "calibrate",
    "calibration_error",
    "cross_fitted_logits",
    "fit_temperature",
    "known_score",
    "lookalike_folds",
    "prediction_sets",
    "reliability",
    "same_image",
    "set_threshold",
    "threshold",
]
