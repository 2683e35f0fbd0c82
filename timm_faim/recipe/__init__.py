"""Heads in closed form, chosen by held-out training images: parts, their weights, and sharing."""

from .choose import MOST, Chosen, HeldOut, choose, has_recipe, sample
from .plan import Plan

__all__ = ["MOST", "Chosen", "HeldOut", "Plan", "choose", "has_recipe", "sample"]
