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
from .losses import FAIMInfoNCELoss, FAIMMarginLoss, FAIMNPairLoss, FAIMTripletLoss
from .metric import FAIMMetric, faim_distance
from .models import convert, head_options, register_twins
from .version import __version__

__all__ = [
    "FAIMDistance",
    "FAIMHead",
    "FAIMInfoNCELoss",
    "FAIMMarginLoss",
    "FAIMMetric",
    "FAIMNPairLoss",
    "FAIMTripletLoss",
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


def __getattr__(name: str) -> object:
    if name == "FAIMDistance":  # on demand: needs pytorch-metric-learning, which is optional and slow to import
        from .losses.distance import FAIMDistance

        return FAIMDistance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
