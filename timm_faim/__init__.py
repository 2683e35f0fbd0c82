"""FAIM heads for timm: prototypes under a Finsler metric, for fine-grained image classification.

Importing this package registers a ``faim_`` twin of every timm classification architecture:

    import timm, timm_faim
    model = timm.create_model("faim_vit_base_patch16_224", pretrained=True, num_classes=200)
"""

from importlib import import_module

from . import commands

commands.answer_help()  # where the command line asks for nothing else: the imports below take seconds

from .block import FAIMBlock, FAIMChart, exp_map, log_map
from .head import PRESETS, FAIMHead, FoldedHead, TargetMargin, agreement, faim_heads, fit_, from_linear, to_linear
from .losses import FAIMInfoNCELoss, FAIMMarginLoss, FAIMNPairLoss, FAIMTripletLoss
from .metric import FAIMMetric, faim_distance
from .models import convert_, register_twins
from .version import __version__

__all__ = [
    "PRESETS",
    "FAIMBlock",
    "FAIMChart",
    "FAIMClassifier",
    "FAIMDistance",
    "FAIMHead",
    "FAIMInfoNCELoss",
    "FAIMMarginLoss",
    "FAIMMetric",
    "FAIMNPairLoss",
    "FAIMTripletLoss",
    "FoldedHead",
    "TargetMargin",
    "__version__",
    "add_classes",
    "agreement",
    "convert_",
    "exp_map",
    "faim_distance",
    "faim_heads",
    "fit_",
    "from_linear",
    "load",
    "log_map",
    "merge_classes",
    "remove_classes",
    "rename_classes",
    "save_model",
    "to_linear",
]

register_twins()
del register_twins

_ON_DEMAND = {  # what imports more than the rest: what is optional; yaml and the Hub's client
    "FAIMClassifier": "timm_faim.estimator",  # scikit-learn
    "FAIMDistance": "timm_faim.losses.distance",  # pytorch-metric-learning
    "add_classes": "timm_faim.classes",
    "load": "timm_faim.classifier",
    "merge_classes": "timm_faim.classes",
    "remove_classes": "timm_faim.classes",
    "rename_classes": "timm_faim.classes",
    "save_model": "timm_faim.hub",
}


def __getattr__(name: str) -> object:
    if name in _ON_DEMAND:
        return getattr(import_module(_ON_DEMAND[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
