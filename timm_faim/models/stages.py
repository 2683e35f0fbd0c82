"""Where in a timm model the map is whose second moments a head reads.

Networks whose resolution falls have it at stride 16, at the end of that stage; those of one resolution two thirds of
the way up. The blocks are those of :mod:`.blocks`, on a copy of the model on the meta device. The stage is a block,
never the row of blocks around it, which gradient checkpointing does not call.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import candidates, meta_copy, meta_pass
from .config import PREFIX, nearest
from .moments import Stage

STRIDE = 16
_ROWS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def find_stage(arch: str, arguments: Mapping[str, Any], wanted: str | None = None) -> Stage:
    """The stage of an architecture.

    Args:
        arch: timm's name.
        arguments: what the model is made with.
        wanted: a module by name, or a stage, of which the last block is taken; None leaves it to the rule.

    Raises:
        ValueError: no such module, or none that gives one map; with the nearest names.
    """
    seen = _Seen.of(arch, arguments, wanted)
    stages = seen.stages
    if wanted is None:
        if not seen.usable:
            raise ValueError(f"faim_cfg moments: no block of {PREFIX}{arch} gives one map or tokens; leave moments out")
        return seen.whole(_usual(seen.usable, seen.pixels))
    within = [stage for name, stage in stages.items() if name != wanted and name.startswith(f"{wanted}.")]
    whole = stages.get(wanted)
    if whole and not (within and (within[-1].channels, within[-1].positions) == (whole.channels, whole.positions)):
        return whole  # a block, or a stage that gives more than its last block
    if within:
        return within[-1]
    places = list(dict.fromkeys(part for name in stages for part in (name, name.rpartition(".")[0]) if part))
    near = nearest(wanted, places)
    hint = f"did you mean {near!r}? " if near else ""
    reason = "gives no map or tokens, or not once" if wanted in seen.modules else "is no module"
    raise ValueError(f"faim_cfg moments={wanted!r} {reason} of {PREFIX}{arch}; {hint}there are {', '.join(places[:40])}"
                     )  # fmt: skip


def offered_stages(arch: str, arguments: Mapping[str, Any]) -> list[str]:
    """Names of stages to choose among: the one of :func:`find_stage` first, then the ends of the two stages before it;
    in a network of one resolution blocks half as deep, and half of the way from there to the end. None where no block
    gives a map."""
    seen = _Seen.of(arch, arguments)
    if not (usable := seen.usable):
        return []
    usual = _usual(usable, seen.pixels)
    at = usable.index(usual)
    rows = [stage.name.rpartition(".")[0] for stage in usable]
    ends = [i for i in range(at) if rows[i] != rows[i + 1] and rows[i] != rows[at]]
    others = ends[-2:] or [i for i in (at // 2, (at + len(usable)) // 2) if i != at]
    return list(dict.fromkeys(seen.whole(stage).name for stage in (usual, *(usable[i] for i in others))))


@dataclass(frozen=True)
class _Seen:
    """What a forward pass shows of an architecture: modules that give one map, by name in the order of calls; the names
    of its blocks and of all modules; the pixels of its images."""

    stages: dict[str, Stage]
    blocks: set[str]
    modules: set[str]
    pixels: int

    @classmethod
    def of(cls, arch: str, arguments: Mapping[str, Any], wanted: str | None = None) -> "_Seen":
        model = meta_copy(arch, arguments)
        modules = dict(model.named_modules())
        blocks = candidates(model) or _named_features(model, modules)
        around = {
            name: modules[name] for block in blocks for name in _around(block) if type(modules[name]) not in _ROWS
        }
        asked = {wanted: modules[wanted]} if wanted in modules else {}
        watched = around | asked | blocks
        outputs: dict[str, list[Any]] = {}  # in the order of calls
        for name, module in watched.items():
            module.register_forward_hook(
                lambda _, inputs, output, name=name: outputs.setdefault(name, []).append(output)
            )
        size = meta_pass(model)[1:]
        found = {name: _stage(name, calls, model, size) for name, calls in outputs.items()}
        stages = {name: stage for name, stage in found.items() if stage is not None}
        return cls(stages, set(blocks), set(modules), math.prod(size))

    @property
    def usable(self) -> list[Stage]:
        """The blocks that give one map."""
        return [stage for name, stage in self.stages.items() if name in self.blocks]

    def whole(self, block: Stage) -> Stage:
        """The stage around a block, where that gives more than its last block."""
        wholes = [self.stages[name] for name in _around(block.name) if name in self.stages]
        return next((w for w in wholes if w.positions == block.positions and w.channels > block.channels), block)


def _around(name: str) -> list[str]:
    """The modules around one, from the outside in: of dense blocks the whole gives more than its last layer."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _named_features(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What timm names as a model's features, where its blocks have no names."""
    info = getattr(model, "feature_info", None)
    names = [each.get("module") for each in info] if isinstance(info, list) else []
    return {name: modules[name] for name in names if name in modules}


def _stage(name: str, calls: list[Any], model: nn.Module, size: tuple[int, int]) -> Stage | None:
    """A module's one output of one call as a stage."""
    if len(calls) != 1:
        return None
    outputs = dict(enumerate(calls[0])) if isinstance(calls[0], (tuple, list)) else {-1: calls[0]}
    maps = [(i, t) for i, t in outputs.items() if isinstance(t, Tensor) and t.dim() in (3, 4) and len(t) == 2]
    if len(maps) != 1:
        return None
    item, x = maps[0]
    if x.dim() == 3:
        prefix = _prefix(x.shape[1], getattr(model, "num_prefix_tokens", None) or 0, size)
        return Stage(name, x.shape[2], False, prefix, item, x.shape[1] - prefix)
    last = _is_channels_last(x, model, size)
    channels = x.shape[3] if last else x.shape[1]
    return Stage(name, channels, last, 0, item, x[0].numel() // channels)


def _is_channels_last(x: Tensor, model: nn.Module, size: tuple[int, int]) -> bool:
    """By which of the shapes has the images' proportions; where both have, as the model says of its output."""
    first, last = (_is_grid(*pair, size) for pair in (x.shape[2:], x.shape[1:3]))
    if first == last and first:
        return str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    return not first  # neither: tokens by window, [B, windows, N, c]


def _is_grid(height: int, width: int, size: tuple[int, int]) -> bool:
    """Whether a map has the images' proportions, up to rounding."""
    return abs(height - width * size[0] / size[1]) <= 1


def _prefix(tokens: int, said: int, size: tuple[int, int]) -> int:
    """Tokens that are left over beside a grid: as many as the model says, or the fewest that leave one."""
    for prefix in (said, *range(8)):
        left = tokens - prefix
        height = round(math.sqrt(max(left, 0) * size[0] / size[1]))
        if height > 0 and left % height == 0 and _is_grid(height, left // height, size):
            return prefix
    return said if said < tokens else 0


def _usual(stages: list[Stage], pixels: int) -> Stage:
    """By the rule; the larger stride of two that are as near."""
    stages = [stage for stage in stages if stage.positions > 1] or stages

    def distance(positions: int) -> tuple[float, int]:
        return round(abs(math.log2(math.sqrt(pixels / positions) / STRIDE)), 3), positions

    positions = min({stage.positions for stage in stages}, key=distance)
    two_thirds = math.ceil(2 * len(stages) / 3) - 1
    same = [i for i, stage in enumerate(stages) if stage.positions == positions]
    if same[-1] == len(stages) - 1:  # no coarser stage follows
        same = [i for i in same if i <= two_thirds] or same[:1]
    return stages[same[-1]]
