"""The FAIM head, its margin at the loss, and its closed-form start from data."""

from .fit import fit_, fit_heads
from .head import FAIMHead, set_damping
from .margin import TargetMargin, faim_heads

__all__ = ["FAIMHead", "TargetMargin", "faim_heads", "fit_", "fit_heads", "set_damping"]
