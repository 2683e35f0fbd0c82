"""Second moments inside a timm model: the maps of middle stages on their way to the heads.

The branch is a child of the model, ``faim_moments``. Hooks on the stages' modules hand it their outputs, and a hook on
each head has it put the moments beside the pooled features, so that timm's own ``forward`` stays as it is and whoever
looks at a head's input sees the whole.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from timm_faim.head import FAIMHead, faim_heads
from timm_faim.metric import traced_call
from timm_faim.moments import Moments

NAME = "faim_moments"  # of the branch in a model
COMPONENTS = 112  # at most, where the options say nothing: more gains little


@dataclass(frozen=True)
class Stage:
    """A module whose output is a map.

    ``channels_last``: [B, H, W, c], else [B, c, H, W]; tokens are [B, N, c] in either case. ``prefix``: leading tokens
    that are no positions. ``item``: which of several outputs it is; -1 where there is one. ``positions``: N of the
    model's own input size.
    """

    name: str
    channels: int
    channels_last: bool
    prefix: int
    item: int
    positions: int


class MomentsBranch(nn.ModuleList):
    """The :class:`timm_faim.moments.Moments` of some stages of a model, in the order of the further parts of its heads.

    Args:
        stages: where the maps are.
        components: d of each; 0 takes all channels, at most 112.
    """

    def __init__(self, stages: Sequence[Stage], components: int = 0, **factory: Any) -> None:
        super().__init__(
            Moments(stage.channels, components or min(stage.channels, COMPONENTS), channels_last=stage.channels_last,
                    prefix=stage.prefix, **factory) for stage in stages
        )  # fmt: skip
        self.stages = list(stages)
        self.heads = 0  # that read; without any, maps are not kept
        self.pooled: list[int] = []  # widths of their pooled features
        self._maps: dict[int, Tensor] = {}
        self._vectors: list[Tensor] = []
        self._reads = 0

    @property
    def widths(self) -> list[int]:
        """Features of each stage."""
        return [moments.out_features for moments in self]

    def keep(self, index: int, output: Tensor) -> None:
        """Called by the hooks of the stages."""
        if self.heads:
            self._maps[index] = output
            self._vectors, self._reads = [], 0

    def join(self, x: Any, head: FAIMHead) -> Any:
        """Pooled features with the moments of the forward pass beside them; features of a head's whole width as they
        are."""
        if isinstance(x, Proxy):
            with _named_by_itself(x.tracer):
                return traced_call(self, x, *self._of_this_pass(list))
        if x.shape[-1] == head.in_features or (x.dim() == 4 and x.shape[1] == head.in_features):
            return x
        return self(x)

    def forward(self, x: Tensor, *maps: Tensor) -> Tensor:
        """Features [B, ..., D] or [B, D, H, W] with the moments of each image as further ones.

        Args:
            x: what timm hands to the classifier.
            maps: of the stages; by default those of the forward pass.

        Raises:
            ValueError: no forward pass through the stages, or one of other images, came before.
        """
        vectors = self._of(list(maps)) if maps else self._of_this_pass(self._of)
        if any(v.shape[0] != x.shape[0] for v in vectors):  # no len(), which tracers take for a constant
            raise ValueError(f"features of {x.shape[0]} images and maps of {vectors[0].shape[0]}; call the whole model")
        # a model in half precision gives logits in it
        dtype = torch.promote_types(x.dtype, self[0].projection.dtype)
        vectors = [v.to(x.device, dtype) for v in vectors]
        if x.dim() == 4 and x.shape[3] not in self.pooled:  # before a 1×1 convolution
            return torch.cat([x, *(v[:, :, None, None].expand(-1, -1, *x.shape[2:]) for v in vectors)], 1)
        places = [x.shape[0], *[1] * (x.dim() - 2)]
        rows = [v.reshape(*places, v.shape[-1]).expand(*x.shape[:-1], v.shape[-1]) for v in vectors]
        return torch.cat([x, *rows], -1)

    def _of(self, maps: list[Tensor]) -> list[Tensor]:
        if len(maps) != len(self):
            names = ", ".join(stage.name for stage in self.stages)
            raise ValueError(f"the head needs the maps of {names} beside the pooled features; call the whole model, or "
                             "forward_features just before forward_head")  # fmt: skip
        return [moments(maps[i]) for i, moments in enumerate(self)]

    def _of_this_pass(self, make: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """What is made of the maps; several heads read the same."""
        vectors = self._vectors or make(self._take_maps())
        self._reads += 1
        self._vectors = vectors if self._reads < self.heads else []
        return vectors

    def _take_maps(self) -> list[Tensor]:
        maps = [self._maps[i] for i in sorted(self._maps)]
        self._maps.clear()
        return maps

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError("a model with second moments does not script, as hooks hand its maps on; trace it "
                                  "(torch.jit.trace), export it (torch.export) or compile it")  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        """Without what is left of a forward pass: it may be part of a graph, which no copy can be."""
        return self.__dict__ | {"_maps": {}, "_vectors": [], "_reads": 0}


@contextmanager
def _named_by_itself(tracer: Any) -> Iterator[None]:
    """torchvision's tracer would give a node that is made in the hook of a head the name of the head."""
    before = getattr(tracer, "current_module_qualname", None)
    tracer.current_module_qualname = NAME
    try:
        yield
    finally:
        tracer.current_module_qualname = before


class _Keep:
    """The hook of a stage."""

    def __init__(self, branch: MomentsBranch, index: int, item: int) -> None:
        self.branch, self.index, self.item = branch, index, item

    def __call__(self, stage: nn.Module, inputs: tuple, output: Any) -> None:
        if getattr(stage, "_is_replica", False):  # its hooks are those of the model itself, shared by all copies
            raise RuntimeError("models with moments do not go with nn.DataParallel; use DistributedDataParallel")
        self.branch.keep(self.index, output if self.item < 0 else output[self.item])


class _Join:
    """The hook of a head."""

    def __init__(self, branch: MomentsBranch) -> None:
        self.branch = branch

    def __call__(self, head: FAIMHead, inputs: tuple) -> tuple:
        return (self.branch.join(inputs[0], head), *inputs[1:])


def branch_of(model: nn.Module) -> MomentsBranch | None:
    """The branch of a model, None of one without moments."""
    return getattr(model, NAME, None)


def part_names(model: nn.Module) -> list[str]:
    """In words, the parts of the features that the heads of a model read."""
    branch = branch_of(model)
    return ["pooled features", *([] if branch is None else [stage.name for stage in branch.stages])]


def add_branch(model: nn.Module, stages: Sequence[Stage], components: int) -> None:
    """Give a model a branch, in place, that its heads read once they are there (:func:`connect_heads`).

    Args:
        model: without a branch.
        stages: of the model.
        components: d, as :class:`MomentsBranch` takes it.

    Raises:
        ValueError: more components than a stage has channels.
    """
    like = next(model.parameters())
    branch = MomentsBranch(stages, components, device=like.device, dtype=like.dtype)
    setattr(model, NAME, branch.train(model.training))
    for index, stage in enumerate(stages):
        model.get_submodule(stage.name).register_forward_hook(_Keep(branch, index, stage.item))


def connect_heads(model: nn.Module) -> None:
    """Have the heads of a model read its branch, if it has one."""
    branch, heads = branch_of(model), faim_heads(model).values()
    if branch is not None:
        branch.heads, branch.pooled = len(heads), [head.parts[0] for head in heads]
        for head in heads:
            if not any(isinstance(hook, _Join) for hook in head._forward_pre_hooks.values()):
                head.register_forward_pre_hook(_Join(branch))
