"""FAIM heads for timm: prototypes under a Finsler metric, for fine-grained image classification.

Importing this package registers a ``faim_`` twin of every timm classification architecture:

    import timm, timm_faim
    model = timm.create_model("faim_vit_base_patch16_224", pretrained=True, num_classes=200)
"""

from .head import (
    FAIMHead,
    TargetMargin,
    agreement,
    faim_heads,
    fit_,
    fit_heads,
    from_linear,
    set_damping,
    to_linear,
)
from .metric import FAIMMetric, faim_distance
from .models import convert, head_options, register_twins
from .version import __version__

__all__ = [
    "FAIMHead",
    "FAIMMetric",
    "TargetMargin",
    "__version__",
    "agreement",
    "convert",
    "faim_distance",
    "faim_heads",
    "fit_",
    "fit_heads",
    "from_linear",
    "head_options",
    "set_damping",
    "to_linear",
]

register_twins()
