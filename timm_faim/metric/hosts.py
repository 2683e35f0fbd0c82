"""What other libraries ask of a module: to be one node of a traced graph, and to fill what a checkpoint lacks."""

from typing import Any

from torch import nn
from torch.fx import Proxy


def traced_call(module: nn.Module, x: Any, *args: Any) -> Any:
    """The call ``module(x, *args)`` as one node of the graph that torch.fx is tracing, None where x is no part of one.

    Tracers without a list of leaves would go on into shapes and the control flow on them.
    """
    if not isinstance(x, Proxy):
        return None
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *args), {})


def is_filled(parameter: nn.Parameter) -> bool:
    """Whether transformers has filled a parameter from a checkpoint, and keeps ``nn.init`` away from it."""
    return getattr(parameter, "_is_hf_initialized", False)


class FillsMissing:
    """A module whose ``reset_parameters`` transformers calls for what a checkpoint lacks."""

    def init_non_persistent_buffers(self) -> None:
        """Reset inside of transformers' loading, which keeps ``nn.init`` away from what the checkpoint has filled.

        timm's own name for filling buffers that no checkpoint holds, called elsewhere after loading; there are none.
        """
        if nn.init.normal_.__module__.startswith("transformers"):
            self.reset_parameters()
