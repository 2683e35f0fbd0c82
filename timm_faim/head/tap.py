"""What enters a model's classifiers, or any other layers: the one place where it is captured.

Shapes: B images, D features, N tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Tap:
    """Keeps the first input of some layers during the forward passes made inside ``with tap:``.

    The layers are hooked once, here, so that a tap can be opened in every step of a compiled model. A copy of the
    model (the average of its weights) has the same tap.

    Args:
        layers: by the names under which :meth:`take` gives their inputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._is_open = False
        self._inputs: dict[str, Tensor] = {}
        self._handles = [layer.register_forward_pre_hook(_Keep(self, name)) for name, layer in layers.items()]

    def __enter__(self) -> "Tap":
        self._inputs.clear()
        self._is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self._is_open = False

    def keep(self, name: str, x: Tensor) -> None:
        """Called by the hooks."""
        if self._is_open:
            self._inputs[name] = x

    def take(self) -> dict[str, Tensor]:
        """The inputs of the last call of each layer that was reached since the tap was opened or emptied."""
        taken = dict(self._inputs)
        self._inputs.clear()
        return taken

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for handle in self._handles:
            handle.remove()


class _Keep:
    """The hook of one layer; an object, so that copies of the layer keep to the same tap."""

    def __init__(self, tap: Tap, name: str) -> None:
        self.tap, self.name = tap, name

    def __call__(self, layer: nn.Module, inputs: tuple) -> None:
        self.tap.keep(self.name, inputs[0])

    def __deepcopy__(self, memo: dict) -> "_Keep":
        return self


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and each back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def layer_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Any]],
    forward: Callable[[Tensor], Any] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """What enters ``layers`` for each batch, in eval mode and without gradients.

    Args:
        model: of the layers; left in its modes.
        layers: by name.
        batches: (images [B, ...], anything).
        forward: runs the model on images; by default as they are, moved to the model's device.

    Yields:
        The inputs by name, without the layers that this batch did not reach, and what came with the images.
    """
    device = next(model.parameters()).device
    tap = Tap(layers)
    try:
        with eval_mode(model):
            for images, rest in batches:
                with torch.no_grad(), tap:
                    model(images.to(device)) if forward is None else forward(images)
                yield tap.take(), rest
    finally:
        tap.remove()


def pooled(x: Tensor, in_features: int) -> Tensor:
    """A layer's input as one vector an image [B, D]: [B, D, H, W] and [B, ..., D] are averaged."""
    if x.dim() == 4 and x.shape[1] == in_features:
        return x.flatten(2).mean(-1)
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x
