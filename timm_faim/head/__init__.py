"""The FAIM head, its margin at the loss, its closed-form start from data and from a linear layer."""

from .convert import agreement, from_linear, to_linear
from .fit import fit_, fit_heads
from .head import FAIMHead, set_damping
from .margin import TargetMargin, faim_heads

__all__ = [
    "FAIMHead",
    "TargetMargin",
    "agreement",
    "faim_heads",
    "fit_",
    "fit_heads",
    "from_linear",
    "set_damping",
    "to_linear",
]
