"""A trained classifier at work: images in, names, probabilities and distances out."""

from .classifier import Classifier, load
from .prediction import Prediction

__all__ = ["Classifier", "Prediction", "load"]
