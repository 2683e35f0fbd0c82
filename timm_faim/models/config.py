"""``faim_cfg``: the JSON-able options of a model's FAIM heads and blocks, checked against their defaults."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from timm_faim.block.chart import BASES
from timm_faim.documents import short_errors
from timm_faim.head import DEFAULT_PRESET, PRESETS, FAIMHead
from timm_faim.metric import checked_count, checked_number

PREFIX = "faim_"  # of the twins' names
_BLOCK_OPTIONS = {"blocks": 0, "block_base": "learned", "block_full_sigma": False, "block_symmetric": True,
                  "block_shared": False}  # fmt: skip
_GIVEN_BY_MODEL = ("self", "in_features", "num_classes", "parts", "part_weights", "rank", "device", "dtype")
# of moments: stages by name (none: the architecture's own), d (0: the channels, at most 112), their share of the
# distance, and the directions of their Σ
_MOMENTS_OPTIONS: dict[str, Any] = {"stages": [], "components": 0, "weight": 0.75, "rank": 256}
# Of completed configs that were saved before `space`; "recipe" came later than the others.
_NOW = {"recipe": "preset", "normalize": "space", "indicatrix": "space"}
_EARLIER_KEYS = {"lambda_init", "scale_init", "full_sigma", "symmetric", "init", "normalize", "learn_scale", "damping",
                 "prior", "margin", "eps"}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that comes nearest to a wrong one; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def head_options() -> dict[str, Any]:
    """Every ``faim_cfg`` key of the heads with its default."""
    parameters = inspect.signature(FAIMHead.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in _GIVEN_BY_MODEL}


def block_options() -> dict[str, Any]:
    """Every ``faim_cfg`` key of the blocks with its default."""
    return dict(_BLOCK_OPTIONS)


def of_heads(faim_cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of a ``faim_cfg`` that are arguments of FAIMHead."""
    others = {"preset", "moments", *_BLOCK_OPTIONS}
    return {key: value for key, value in (faim_cfg or {}).items() if key not in others}


def may_be_converted(faim_cfg: Mapping[str, Any]) -> bool:
    """Whether a resolved ``faim_cfg`` is one that :func:`timm_faim.convert_` leaves: preset "flat" with λ = 0."""
    return faim_cfg["preset"] == "flat" and faim_cfg["lambda_init"] == 0


@short_errors()
def resolve_faim_cfg(faim_cfg: Mapping[str, Any] | None) -> dict[str, Any]:
    """``faim_cfg`` completed with its preset and the defaults, so that a saved config does not depend on later ones.

    ``preset`` names one of :data:`timm_faim.head.PRESETS` (default "indicatrix"); other keys win over it.

    Raises:
        TypeError: not a mapping, or a value of another type than the default's.
        ValueError: an unknown key or preset; the message names the nearest known one.
    """
    if faim_cfg is not None and not isinstance(faim_cfg, Mapping):
        raise TypeError(f"faim_cfg must be a dict of options, got {type(faim_cfg).__name__}")
    given = dict(faim_cfg or {})
    if given.keys() >= _EARLIER_KEYS:
        given = _modernised(given)
    options = {"preset": DEFAULT_PRESET} | head_options() | {"moments": False} | block_options()
    for key, value in given.items():
        if key not in options:
            near = _NOW.get(key) or nearest(key, options)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"unknown faim_cfg key {key!r}; {hint}known keys: {', '.join(options)}")
        options[key] = _checked_moments(value) if key == "moments" else _checked(key, value, options[key])
    if options["preset"] not in PRESETS:
        raise ValueError(f"faim_cfg['preset'] must be one of {', '.join(PRESETS)}, got {options['preset']!r}")
    options.update({key: value for key, value in PRESETS[options["preset"]].items() if key not in given})
    if options["blocks"] < 0:
        raise ValueError(f"faim_cfg['blocks'] must be >= 0, got {options['blocks']}")
    if options["block_base"] not in BASES:
        raise ValueError(f"faim_cfg['block_base'] must be one of {BASES}, got {options['block_base']!r}")
    return options


def _checked_moments(value: Any) -> dict[str, Any] | bool:
    """False, or the options of the moments, completed: True, the name of a stage, several, or a dict."""
    if value is False or value is None:
        return False
    given = {} if value is True else {"stages": value} if isinstance(value, (str, list, tuple)) else value
    if not isinstance(given, Mapping):
        raise TypeError(f"faim_cfg['moments'] must be True, False, the name of a stage, a list of names or a dict of "
                        f"{', '.join(_MOMENTS_OPTIONS)}, got {value!r}")  # fmt: skip
    options = dict(_MOMENTS_OPTIONS)
    for key, each in given.items():
        if key not in options:
            near = nearest(str(key), options)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"unknown key {key!r} in faim_cfg['moments']; {hint}known keys: {', '.join(options)}")
        if key == "stages":
            each = [each] if isinstance(each, str) else each
            if not (isinstance(each, (list, tuple)) and all(isinstance(name, str) and name for name in each)):
                raise TypeError(f"faim_cfg['moments']: stages must be names of modules, got {each!r}")
            if len(set(each)) < len(each):
                raise ValueError(f"faim_cfg['moments']: a stage is named twice in {list(each)}")
            options[key] = list(each)
        elif key == "weight":
            options[key] = checked_number("faim_cfg['moments']: weight", each, most=1.0, above=True)
        elif key == "rank" or each != 0 or isinstance(each, bool):
            options[key] = checked_count(f"faim_cfg['moments']: {key}", each)
    return options


def _modernised(saved: dict[str, Any]) -> dict[str, Any]:
    """A completed config that was saved with `normalize` and `indicatrix` in place of `space`."""
    now = {key: value for key, value in saved.items() if key not in ("recipe", "normalize", "indicatrix", "damping")}
    flat = not saved["normalize"]
    now["space"] = "flat" if flat else "indicatrix" if saved.get("indicatrix") else "sphere"
    if not flat and saved["init"] == "seed":
        now["init"] = "scaled"
    preset = {"seed": "founding", "plain": "flat"}.get(saved.get("recipe", "plain"), DEFAULT_PRESET)
    return {"preset": preset, "learn_metric": True} | now


def _checked(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError(f"faim_cfg[{key!r}] must be {type(default).__name__} (default {default!r}), got {value!r}")
    return value
