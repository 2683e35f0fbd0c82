"""Metric learning under a FAIM metric: contrastive losses, and the distance for pytorch-metric-learning."""

from .contrastive import FAIMInfoNCELoss, FAIMNPairLoss
from .margin import FAIMMarginLoss
from .triplet import FAIMTripletLoss

__all__ = ["FAIMInfoNCELoss", "FAIMMarginLoss", "FAIMNPairLoss", "FAIMTripletLoss"]
