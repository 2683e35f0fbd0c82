"""Heads in closed form, chosen by held-out training images: parts, their weights, and sharing."""

from .choose import MOST, Chosen, HeldOut, choose, sample
from .plan import Plan

__all__ = ["MOST", "Chosen", "HeldOut", "Plan", "choose", "sample"]
