"""Confidence that is accuracy, and "none of these": temperature, rejection and sets of classes with a known rate."""

from .temperature import apply_temperature_, fit_temperature

__all__ = ["apply_temperature_", "fit_temperature"]
