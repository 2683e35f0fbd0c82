"""FAIM heads for timm: prototypes under a Finsler metric, for fine-grained image classification.

Importing this package registers a ``faim_`` twin of every timm classification architecture:

    import timm, timm_faim
    model = timm.create_model("faim_vit_base_patch16_224", pretrained=True, num_classes=200)
"""

from .block import FAIMBlock, FAIMChart, exp_map, log_map
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
from .models import block_options, convert, head_options, register_twins
from .version import __version__

__all__ = [  # and FAIMDistance, on demand
    "FAIMBlock",
    "FAIMChart",
    "FAIMHead",
    "FAIMInfoNCELoss",
    "FAIMMarginLoss",
    "FAIMMetric",
    "FAIMNPairLoss",
    "FAIMTripletLoss",
    "TargetMargin",
    "__version__",
    "agreement",
    "block_options",
    "convert",
    "exp_map",
    "faim_distance",
    "faim_heads",
    "fit_",
    "fit_heads",
    "from_linear",
    "head_options",
    "log_map",
    "set_damping",
    "to_linear",
]

register_twins()


def __getattr__(name: str) -> object:
    if name == "FAIMDistance":  # on demand: needs pytorch-metric-learning, which is optional and slow to import
        from .losses.distance import FAIMDistance

        return FAIMDistance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
