"""Prototypes that follow unlabelled images, and the check that decides whether they may."""

from .check import Check
from .prototypes import ASSUMPTION, REJECTED, adapt_, evidence

__all__ = ["ASSUMPTION", "REJECTED", "Check", "adapt_", "evidence"]
