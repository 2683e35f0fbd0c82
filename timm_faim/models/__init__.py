"""FAIM twins of timm's architectures."""

from .attach import attach_heads
from .config import block_options, head_options, may_be_converted
from .convert import convert_
from .faim import has_classifier, register_twins

__all__ = [
    "attach_heads",
    "block_options",
    "convert_",
    "has_classifier",
    "head_options",
    "may_be_converted",
    "register_twins",
]
