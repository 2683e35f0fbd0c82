"""FAIM blocks inside a timm model: charts around its last blocks, which keep their weights' names.

Blocks are what the model's own ``group_matcher`` tells apart. A block qualifies if it takes and gives one tensor of the
same shape; which ones do is seen on a copy of the model on the meta device, without arithmetic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Optional

import torch
from timm.data import resolve_input_data_config
from timm.models import group_parameters, model_entrypoint
from torch import Tensor, nn

from timm_faim.block import FAIMChart
from timm_faim.metric import FAIMMetric

from .attach import reduce_by_base, subclass
from .config import PREFIX


class ChartedMixin:
    """A block that works in the coordinates of its ``faim_chart``."""

    def forward(self, x, *args, **kwargs):
        p = self.faim_chart.base_point(x)
        return self.faim_chart.exp(super().forward(self.faim_chart.log(x, p), *args, **kwargs), p)

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
        arguments: what the model was made with.

    Returns:
        The model.

    Raises:
        ValueError: fewer such blocks than asked for.
    """
    count = faim_cfg["blocks"]
    if count == 0:
        return model
    places = block_places(arch, arguments)
    if count > len(places):
        have = f"{len(places)}: {', '.join(place.name for place in places)}" if places else "none"
        raise ValueError(f"faim_cfg blocks={count}: blocks that take and give one tensor of one shape, {PREFIX}{arch} "
                         f"has {have}. Ask for {'no more than that' if places else 'blocks=0'}")  # fmt: skip
    shared: Optional[FAIMMetric] = None
    for place in places[len(places) - count :]:
        block = _find(model, place.name)
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
    arguments = {key: value for key, value in arguments.items() if key not in ("features_only", "out_indices")}
    with torch.device("meta"):
        model = model_entrypoint(arch)(pretrained=False, **arguments).eval()
    candidates = _candidates(model)
    seen: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}
    for name, calls in seen.items():
        candidates[name].register_forward_hook(lambda _, inputs, output, calls=calls: calls.append((inputs, output)))
    with torch.no_grad():
        model(torch.zeros(2, *_input_size(model, arguments), device="meta"))
    places = (_place(name, candidates[name], calls) for name, calls in seen.items())
    return [place for place in places if place is not None]


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that make up timm's layer groups, by name."""
    if not hasattr(model, "group_matcher"):
        return {}
    groups = group_parameters(model, model.group_matcher(coarse=False))
    group_of = {name: number for number, names in groups.items() for name in names}
    kinds = set()
    for names in groups.values():
        name = commonprefix(names).rpartition(".")[0]  # the common characters, cut at a dot
        module = _find(model, name) if name else None
        if module is not None and len(list(module.parameters())) == len(names):
            kinds.add(type(module))
    # a group may hold a norm or a downsampling beside its block: blocks are known by the kinds of the others
    kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.nn")}
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) not in kinds or any(name.startswith(f"{outer}.") for outer in blocks):
            continue
        if len({group_of[f"{name}.{key}"] for key, _ in module.named_parameters()}) == 1:
            blocks[name] = module
    return blocks


def _place(name: str, block: nn.Module, calls: list[tuple[Any, Any]]) -> Optional[Place]:
    """Where a block called once, with one tensor of its output's shape, has its features."""
    if len(calls) != 1 or not calls[0][0]:
        return None
    x, y = calls[0][0][0], calls[0][1]
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and x.dim() in (3, 4)):
        return None
    if x.dim() == 3:
        return Place(name, x.shape[-1], False)
    widths = {len(parameter) for parameter in block.parameters() if parameter.dim() == 1}
    axes = [axis for axis in (1, 3) if x.shape[axis] in widths]
    if not axes:
        return None
    axis = max(axes, key=lambda axis: x.shape[axis])
    return Place(name, x.shape[axis], axis == 1)


def _input_size(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
    return resolve_input_data_config(model, {"img_size": arguments.get("img_size")})["input_size"]


def _find(model: nn.Module, name: str) -> nn.Module:
    """A submodule by name, also in timm's feature extractors: behind ``model.``, or with stages_3 for stages.3."""
    if hasattr(model, "model") and not hasattr(model, name.partition(".")[0]):
        model = model.model
    first, _, rest = name.partition(".")
    if not hasattr(model, first):
        second, _, rest = rest.partition(".")
        name = f"{first}_{second}.{rest}" if rest else f"{first}_{second}"
    return model.get_submodule(name)
