"""What a saved or downloaded config.json says, checked before anything is built from it."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import timm
from timm.models import PretrainedCfg

from timm_faim.documents import short_errors

from .config import nearest, resolve_faim_cfg

SOURCES = ("hf-hub", "local-dir")  # of configs that came with their weights
_LARGEST, _LONGEST, _DEEPEST = 1_000_000, 100_000, 8
_DEEPEST_MODEL, _COUNTS = 1_000, re.compile("depth|layers|blocks|repeat")  # modules that are built one by one
_ELSEWHERE = ("url", "state_dict", "hf_hub_filename")  # ways to other weights than those beside the config


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no switch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list(value: Any, fits: Callable[[Any], bool], length: int = 0) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) in ((length,) if length else range(1, 1000))
        and all(map(fits, value))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and 1 <= value <= _LARGEST


def _is_word(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


_MODES, _CROPS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"), ("center", "squash", "border")
_INPUTS = (  # keys of a pretrained_cfg, what fits them, and in words
    (("input_size", "test_input_size", "min_input_size"), lambda v: _is_list(v, _is_count, 3),
     f"three whole numbers in 1..{_LARGEST}"),
    (("pool_size", "test_pool_size"), lambda v: _is_list(v, _is_count, 2), f"two whole numbers in 1..{_LARGEST}"),
    (("mean",), lambda v: _is_list(v, is_number), "a list of finite numbers"),
    (("std",), lambda v: _is_list(v, is_number) and min(v) > 0, "a list of finite numbers above 0"),
    (("crop_pct", "test_crop_pct"), lambda v: is_number(v) and 0.01 <= v <= 10, "a number in 0.01..10"),
    (("interpolation",), lambda v: v in _MODES, f"one of {', '.join(_MODES)}"),
    (("crop_mode",), lambda v: v in _CROPS, f"one of {', '.join(_CROPS)}"),
    (("fixed_input_size",), lambda v: isinstance(v, bool), "true or false"),
    (("first_conv", "classifier"), _is_word, "the name of a layer"),
)  # fmt: skip


@short_errors()
def check_source(name: str, source: PretrainedCfg, arguments: Mapping[str, Any]) -> None:
    """Refuse sizes and names that no model has, so that a wrong file costs neither memory nor time.

    Args:
        name: the architecture.
        source: the saved pretrained_cfg, of one of `SOURCES`.
        arguments: what the model would be built with, the saved model_args among them.

    Raises:
        ValueError: names the key, its value and the mend.
    """
    for key in _ELSEWHERE:
        if getattr(source, key):
            raise ValueError(f"the saved config of {name} points at other weights (pretrained_cfg.{key}); remove it")
    if source.custom_load:
        raise ValueError(f"the saved config of {name} asks for custom_load; FAIM checkpoints are plain safetensors")
    _check_count(name, "num_classes", source.num_classes, least=0)
    for key, value in arguments.items():
        if key == "num_classes":
            _check_count(name, key, value, least=0)
        elif key in ("in_chans", "img_size", "input_size"):
            for number in value if isinstance(value, (list, tuple)) else [value]:
                _check_count(name, key, number, least=1)
        else:
            _check_plain(name, key, value)
    check_inputs(name, vars(source))
    names = source.label_names
    if names is not None and len(names) != source.num_classes:
        raise ValueError(f"the saved config of {name} has {len(names)} label_names and {source.num_classes} classes")


def check_inputs(name: str, cfg: Mapping[str, Any]) -> None:
    """Refuse what a pretrained_cfg says of the images that no image can be; keys that are not there have defaults.

    Raises:
        ValueError: names the key, its value and what it must be.
    """
    for keys, fits, form in _INPUTS:
        for key in keys:
            may_be_none = getattr(PretrainedCfg, key) is None
            if key in cfg and not (cfg[key] is None and may_be_none) and not fits(cfg[key]):
                raise ValueError(f"{name}: {key} must be {form}, got {cfg[key]!r}")


@short_errors()
def check_config(config: Mapping[str, Any]) -> None:
    """Check a whole config.json before it is published or opened.

    Raises:
        ValueError: an unknown architecture or head option, by name; a size or a form that cannot be.
        TypeError: a head option of another type than its default.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config.json must be an object of keys and values, got {type(config).__name__}")
    for key, kind in (("architecture", str), ("pretrained_cfg", dict), ("num_classes", int)):
        if not isinstance(config.get(key), kind):
            raise ValueError(f"config.json: {key} must be {kind.__name__}, got {config.get(key)!r}")
    if not isinstance(config.get("model_args") or {}, dict):
        raise ValueError(f"config.json: model_args must be dict, got {str(config['model_args'])[:60]}")
    texts = config.get("label_descriptions") or {}
    if not (isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values())):
        raise ValueError("config.json: label_descriptions must map class names to texts")
    name, arguments = config["architecture"], dict(config.get("model_args") or {})
    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"config.json: unknown architecture {name!r}{hint}")
    resolve_faim_cfg(arguments.pop("faim_cfg", None))
    try:
        cfg = PretrainedCfg(**config["pretrained_cfg"], label_names=_names(config))
    except TypeError as e:
        raise ValueError(f"config.json: pretrained_cfg {str(e).rpartition('__init__() ')[2]}") from e
    check_source(name, cfg, arguments)


def _names(config: Mapping[str, Any]) -> tuple | None:
    names = config.get("label_names")
    if names is None:
        return None
    values = list(names.values()) if isinstance(names, dict) else names
    if not (isinstance(values, list) and all(isinstance(n, (str, int)) for n in values)):
        raise ValueError("config.json: label_names must be a list of names")
    return tuple(values)


def _check_count(name: str, key: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _LARGEST:
        raise ValueError(f"{name}: {key} must be a whole number in {least}..{_LARGEST}, got {str(value)[:60]!r}")


def _check_plain(name: str, key: str, value: Any, depth: int = 0) -> None:
    """Numbers, short texts and shallow lists: the arguments of timm's models are nothing else."""
    most = _DEEPEST_MODEL if _COUNTS.search(key) else _LARGEST
    if isinstance(value, (int, float)) and not abs(value) <= most:
        raise ValueError(f"{name}: {key} must not exceed {most}, got {value}")
    if isinstance(value, (str, list, tuple, dict)) and (len(value) > _LONGEST or depth > _DEEPEST):
        raise ValueError(f"{name}: {key} is too long or too deep to be an option of a model")
    if isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_plain(name, key, item, depth + 1)
