"""The FAIM head, its margin at the loss, its closed-form start from data and from a linear layer."""

from .convert import agreement, from_linear
from .fit import fit_
from .folded import FoldedHead
from .head import SPACES, FAIMHead
from .margin import TargetMargin, faim_heads
from .presets import DEFAULT_PRESET, PRESETS
from .to_linear import to_linear

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "SPACES",
    "FAIMHead",
    "FoldedHead",
    "TargetMargin",
    "agreement",
    "faim_heads",
    "fit_",
    "from_linear",
    "to_linear",
]
