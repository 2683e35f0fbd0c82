"""``faim_cfg``: the JSON-able head options of a model, checked against the signature of FAIMHead."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from timm_faim.head import FAIMHead

PREFIX = "faim_"  # of the twins' names
_GIVEN_BY_MODEL = ("self", "in_features", "num_classes", "device", "dtype")


def nearest(name: str, known: Iterable[str]) -> Optional[str]:
    """The known name that comes nearest to a wrong one; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def head_options() -> dict[str, Any]:
    """Every ``faim_cfg`` key with its default."""
    parameters = inspect.signature(FAIMHead.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in _GIVEN_BY_MODEL}


def resolve_faim_cfg(faim_cfg: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """``faim_cfg`` completed with the defaults, so that a saved config does not depend on later ones.

    Raises:
        TypeError: not a mapping, or a value of another type than the default's.
        ValueError: an unknown key; the message names the nearest known one.
    """
    options = head_options()
    if faim_cfg is None:
        return options
    if not isinstance(faim_cfg, Mapping):
        raise TypeError(f"faim_cfg must be a dict of head options, got {type(faim_cfg).__name__}")
    for key, value in faim_cfg.items():
        if key not in options:
            near = nearest(key, options)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"unknown faim_cfg key {key!r}; {hint}known keys: {', '.join(options)}")
        options[key] = _checked(key, value, options[key])
    return options


def _checked(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError(f"faim_cfg[{key!r}] must be {type(default).__name__} (default {default!r}), got {value!r}")
    return value
