"""The FAIM block: log map, any module in the tangent space, exp map."""

from .block import FAIMBlock
from .chart import FAIMChart
from .maps import exp_map, log_map

__all__ = ["FAIMBlock", "FAIMChart", "exp_map", "log_map"]
