"""Prototypes that follow unlabelled images, and the check that decides whether they may."""

from .check import Check
from .prototypes import ASSUMPTION, adapt_, evidence

__all__ = ["ASSUMPTION", "Check", "adapt_", "evidence"]
