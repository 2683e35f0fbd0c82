"""TEMPORARY."""

import math
from dataclasses import dataclass

import torch
from timm.models import get_model_input_config, model_entrypoint

from .blocks import _OF_NO_PLACE, _candidates


@dataclass(frozen=True)
class Stage:
    name: str
    channels: int
    channels_last: bool
    prefix: int


def find_stage(arch, arguments, wanted=None):
    arguments = {key: value for key, value in arguments.items() if key not in _OF_NO_PLACE}
    with torch.device("meta"):
        model = model_entrypoint(arch)(pretrained=False, **arguments).eval()
    seen = {}
    for name, block in _candidates(model).items():
        block.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    size = get_model_input_config(model)["input_size"]
    with torch.no_grad():
        model(torch.zeros(2, *size, device="meta"))
    if wanted:
        names = [n for n in seen if n == wanted or n.startswith(wanted + ".")]
        if not names:
            raise ValueError(f"no stage {wanted}")
        name = names[-1]
    else:
        strides = {n: size[1] / (o.shape[2] if o.dim() == 4 else math.sqrt(o.shape[1])) for n, o in seen.items()}
        if len({round(v) for v in strides.values()}) == 1:
            names = list(seen)
            name = names[math.ceil(2 * len(names) / 3) - 1]
        else:
            name = [n for n, v in strides.items() if v == 16][-1]
    o = seen[name]
    return Stage(
        name,
        o.shape[1] if o.dim() == 4 else o.shape[2],
        False,
        getattr(model, "num_prefix_tokens", 0) if o.dim() == 3 else 0,
    )
