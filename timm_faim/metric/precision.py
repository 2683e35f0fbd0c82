"""How a call runs: without autocast, and whether hand-written autograd nodes may serve it."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_COMPILES_NODES = torch.__version__ >= (2, 11)  # 2.6 fails on them where a size is not fixed; between, nobody tried


def without_autocast(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """``function(x, *args)`` with autocast off for the device of x."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return function(x, *args)
    with torch.autocast(device_type, enabled=False):
        return function(x, *args)


def backward_without_autocast(backward: Callable) -> Callable:
    """Keep the precision of the forward pass when ``backward()`` is called inside an autocast region."""

    @wraps(backward)
    def run(ctx, G):
        return without_autocast(partial(backward, ctx), G)

    return run


def needs_plain_ops(*tensors: Tensor, compiled: bool = True) -> bool:
    """Whether only differentiable PyTorch operations will do: for export and torch.jit.trace, the transforms of
    torch.func (grad, vmap, jvp, ...), forward-mode differentiation, DTensors and other kinds of tensors and, with
    ``compiled``, torch.compile."""
    if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return True
    if torch.compiler.is_compiling():  # export traces by itself, without dynamo
        return compiled or not (_COMPILES_NODES and torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling())
    return (
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )
