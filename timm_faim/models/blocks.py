"""FAIM blocks inside a timm model: charts around its last blocks, which keep their weights' names.

Blocks are what the model's own ``group_matcher`` names. A block qualifies if it is called once, with one tensor, and
gives one of the same shape; which ones do is seen on a copy of the model on the meta device, without arithmetic.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import FeatureGraphNet, get_model_input_config, model_entrypoint
from torch import Tensor, nn

from timm_faim.block import FAIMChart
from timm_faim.metric import FAIMMetric

from .attach import reduce_by_base, subclass
from .config import PREFIX, block_options

_OF_NO_PLACE = ("features_only", "out_indices", "feature_cls", "device", "dtype")  # arguments that move no block
INNER = ("model", "body")  # where timm's feature extractors keep a whole model
_ROWS = (nn.Sequential, nn.ModuleList)
_NORM = re.compile("(Batch|Group|Layer|Rms|Simple)Norm")  # of torch and timm
_FIRST = re.compile("2d|BatchNorm")  # those with features at dimension 1


class ChartedMixin:
    """A block that works in the coordinates of its ``faim_chart``."""

    name_prefix = "Charted"

    def forward(self, x, *args, **kwargs):
        w, p, frame = self.faim_chart(x)
        return self.faim_chart(super().forward(w, *args, **kwargs), p, frame)

    def __reduce_ex__(self, protocol):
        return reduce_by_base(self)


@dataclass
class Place:
    """A block that can have a chart."""

    name: str
    dim: int
    channels_first: bool


def insert_charts(model: nn.Module, arch: str, faim_cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    """Put charts around the last ``faim_cfg['blocks']`` blocks of a model, in place; they start as the identity.

    Args:
        model: made by timm's entry of ``arch``, possibly with ``features_only``.
        arch: timm's name.
        faim_cfg: resolved options.
        arguments: what the model was made with; ``out_indices`` may leave some of the blocks out.

    Returns:
        The model.

    Raises:
        ValueError: fewer such blocks than asked for.
    """
    count = faim_cfg["blocks"]
    if count == 0:
        return model
    if isinstance(model, FeatureGraphNet):
        raise ValueError(f"faim_cfg blocks={count}: feature_cls='fx' takes a model apart before blocks are put in; "
                         "give another feature_cls, such as 'hook' or 'getter'")  # fmt: skip
    if hasattr(model, "faim_cfg"):  # a converted head's
        model.faim_cfg.update((key, faim_cfg[key]) for key in block_options())
    places = block_places(arch, arguments)
    if count > len(places):
        have = f"{len(places)}: {', '.join(place.name for place in places)}" if places else "none"
        raise ValueError(f"faim_cfg blocks={count}: blocks that take and give one tensor of one shape, {PREFIX}{arch} "
                         f"has {have}. Ask for {'no more than that' if places else 'blocks=0'}")  # fmt: skip
    shared: FAIMMetric | None = None
    for place in places[len(places) - count :]:
        block = _find(model, place.name)
        if block is None:  # in a stage that out_indices leave out
            continue
        like = next(block.parameters())
        options = {"full_sigma": faim_cfg["block_full_sigma"], "symmetric": faim_cfg["block_symmetric"]}
        if shared is not None and shared.in_features != place.dim:
            raise ValueError(f"faim_cfg block_shared=True: the last {count} blocks of {PREFIX}{arch} have different "
                             "widths. Ask for fewer blocks, or leave block_shared out")  # fmt: skip
        block.faim_chart = FAIMChart(place.dim, shared, base=faim_cfg["block_base"], device=like.device,
                                     dtype=like.dtype, channels_first=place.channels_first, **options)  # fmt: skip
        block.faim_chart.train(block.training)
        block.__class__ = subclass(type(block), ChartedMixin)
        if faim_cfg["block_shared"] and shared is None:
            shared = block.faim_chart.metric
    return model


def block_places(arch: str, arguments: Mapping[str, Any]) -> list[Place]:
    """The blocks of a timm architecture that can have a chart, in order.

    Args:
        arch: timm's name.
        arguments: what the model is to be made with (``img_size``, ``in_chans``, ...).
    """
    model = meta_copy(arch, arguments)
    calls = {name: _Calls(block) for name, block in candidates(model).items()}
    meta_pass(model)
    default = 1 if str(getattr(model, "output_fmt", "NCHW")) == "NCHW" else 3
    places = (seen.place(name, default) for name, seen in calls.items())
    return [place for place in places if place is not None]


def meta_copy(arch: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model of an architecture on the meta device, in eval mode; arguments that move no block are left out."""
    arguments = {key: value for key, value in arguments.items() if key not in _OF_NO_PLACE}
    with torch.device("meta"):
        return model_entrypoint(arch)(pretrained=False, **arguments).eval()


def meta_pass(model: nn.Module) -> tuple[int, int, int]:
    """A forward pass of two images without arithmetic, for the hooks; the images' shape."""
    shape = get_model_input_config(model)["input_size"]
    with torch.no_grad():
        model(torch.zeros(2, *shape, device="meta"))
    return shape


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks of a model by name: what the patterns of its ``group_matcher`` name; of stages, their blocks."""
    named: dict[str, nn.Module] = {}
    for root in _matched_names(model) or (name for name, _ in model.named_children()):
        module = _find(model, root)
        if module is not None:
            named.update(_blocks_within(root, module))
    return named


def _matched_names(model: nn.Module) -> list[str]:
    """The beginnings of parameter names that timm's patterns for blocks match, such as ``stages.0.blocks.1``."""
    if not hasattr(model, "group_matcher"):
        return []
    patterns = model.group_matcher(coarse=False)
    patterns = patterns.get("blocks", ()) if isinstance(patterns, dict) else ()
    patterns = [patterns] if isinstance(patterns, str) else [pattern for pattern, *_ in patterns]
    matches = (re.match(pattern, name) for name, _ in model.named_parameters() for pattern in patterns)
    return list(dict.fromkeys(match.group(0).rstrip(".") for match in matches if match))


def _blocks_within(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module itself, or the blocks in it where it is a row of them or a stage with ``blocks``."""
    row = module if isinstance(module, _ROWS) else getattr(module, "blocks", None)
    if isinstance(row, _ROWS):
        inner = name if row is module else f"{name}.blocks"
        for key, child in row.named_children():
            yield from _blocks_within(f"{inner}.{key}", child)
    # layers of torch and timm (a norm, a downsampling) are no blocks
    elif not type(module).__module__.startswith(("torch.nn", "timm.layers")) and any(True for _ in module.parameters()):
        yield name, module


class _Calls:
    """What a block was called with, and which layers in it first."""

    def __init__(self, block: nn.Module) -> None:
        self.calls: list[tuple[Any, Any]] = []
        self.layers: list[tuple[nn.Module, torch.Size]] = []
        block.register_forward_hook(lambda _, inputs, output: self.calls.append((inputs, output)))
        for layer in block.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)) or _NORM.match(type(layer).__name__):
                layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(inputs[0], Tensor):
            self.layers.append((layer, inputs[0].shape))

    def place(self, name: str, default_axis: int) -> Place | None:
        """Where a block called once, with one tensor of its output's shape, has its features; None for others."""
        if len(self.calls) != 1 or not self.calls[0][0]:
            return None
        (x, *others), y = self.calls[0]
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dim() in (3, 4)):
            return None
        if any(isinstance(other, Tensor) and other.dim() == x.dim() and len(other) == len(x) for other in others):
            return None  # a second input, which would stay outside of the chart
        if x.dim() == 3:
            return Place(name, x.shape[-1], False)
        axis = self._axis(x, default_axis)
        return Place(name, x.shape[axis], axis == 1)

    def _axis(self, x: Tensor, default: int) -> int:
        """Where x has its features, [B, D, H, W] (1) or [B, H, W, D] (3): as the first layer has that gets x, or all of
        x in another shape."""
        for layer, shape in self.layers:
            if shape.numel() != x.numel():
                continue
            axis = 1 if isinstance(layer, (nn.Conv2d, nn.GroupNorm)) or _FIRST.search(type(layer).__name__) else -1
            if shape == x.shape:
                return axis % 4
            fits = [place for place in (1, 3) if x.shape[place] == shape[axis]]
            if len(fits) == 1:
                return fits[0]
        return default


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """A submodule by name, also in timm's feature extractors: behind one of INNER, or with stages_3 for stages.3."""
    if not hasattr(model, name.partition(".")[0]):
        model = next((getattr(model, inner) for inner in INNER if hasattr(model, inner)), model)
    first, _, rest = name.partition(".")
    if not hasattr(model, first):
        second, _, rest = rest.partition(".")
        name = f"{first}_{second}.{rest}" if rest else f"{first}_{second}"
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
