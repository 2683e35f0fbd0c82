"""The precision policy's one switch: distances are not computed under autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def without_autocast(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``function(x, *args)`` with autocast off for the device of x."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return function(x, *args)
    with torch.autocast(device_type, enabled=False):
        return function(x, *args)
