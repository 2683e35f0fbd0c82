"""``faim_cfg``: the JSON-able options of a model's FAIM heads and blocks, checked against their defaults."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from timm_faim.block.chart import BASES
from timm_faim.head import FAIMHead

from .documents import short_errors

PREFIX = "faim_"  # of the twins' names
_BLOCK_OPTIONS = {"blocks": 0, "block_base": "learned", "block_full_sigma": False, "block_symmetric": True,
                  "block_shared": False}  # fmt: skip
# Values that differ from the arguments' defaults, by recipe. "indicatrix" is what benchmarks/accuracy found best.
RECIPES: dict[str, dict[str, Any]] = {
    "indicatrix": {"normalize": True, "indicatrix": True, "full_sigma": True, "learn_metric": False,
                   "lambda_init": 0.0, "scale_init": 16.0, "margin": 0.2},
    "plain": {},
    "seed": {"init": "seed"},
}  # fmt: skip
DEFAULT_RECIPE = "indicatrix"
_BEFORE_RECIPES = {"lambda_init", "scale_init", "full_sigma", "symmetric", "init", "normalize", "learn_scale",
                   "damping", "prior", "margin", "eps"}  # fmt: skip
_GIVEN_BY_MODEL = ("self", "in_features", "num_classes", "device", "dtype")


def nearest(name: str, known: Iterable[str]) -> Optional[str]:
    """The known name that comes nearest to a wrong one; None where none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def head_options() -> dict[str, Any]:
    """Every ``faim_cfg`` key of the heads with its default."""
    parameters = inspect.signature(FAIMHead.__init__).parameters
    return {name: p.default for name, p in parameters.items() if name not in _GIVEN_BY_MODEL}


def block_options() -> dict[str, Any]:
    """Every ``faim_cfg`` key of the blocks with its default."""
    return dict(_BLOCK_OPTIONS)


def of_heads(faim_cfg: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys of a ``faim_cfg`` that are arguments of FAIMHead."""
    return {key: value for key, value in (faim_cfg or {}).items() if key not in _BLOCK_OPTIONS and key != "recipe"}


def may_be_converted(faim_cfg: Mapping[str, Any]) -> bool:
    """Whether a resolved ``faim_cfg`` is one that :func:`timm_faim.convert` leaves: recipe "plain" with λ = 0."""
    return faim_cfg["recipe"] == "plain" and faim_cfg["lambda_init"] == 0


@short_errors()
def resolve_faim_cfg(faim_cfg: Optional[Mapping[str, Any]]) -> dict[str, Any]:
    """``faim_cfg`` completed with its recipe and the defaults, so that a saved config does not depend on later ones.

    ``recipe`` names a preset of :data:`RECIPES` (default "indicatrix"); other keys win over it.

    Raises:
        TypeError: not a mapping, or a value of another type than the default's.
        ValueError: an unknown key or recipe; the message names the nearest known one.
    """
    if isinstance(faim_cfg, Mapping) and "recipe" not in faim_cfg and faim_cfg.keys() >= _BEFORE_RECIPES:
        faim_cfg = {"recipe": "plain", **faim_cfg}  # a completed config that was saved before there were recipes
    options = {"recipe": DEFAULT_RECIPE} | head_options() | block_options()
    faim_cfg = {} if faim_cfg is None else faim_cfg
    if not isinstance(faim_cfg, Mapping):
        raise TypeError(f"faim_cfg must be a dict of options, got {type(faim_cfg).__name__}")
    for key, value in faim_cfg.items():
        if key not in options:
            near = nearest(key, options)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"unknown faim_cfg key {key!r}; {hint}known keys: {', '.join(options)}")
        options[key] = _checked(key, value, options[key])
    recipe = RECIPES.get(options["recipe"])
    if recipe is None:
        raise ValueError(f"faim_cfg['recipe'] must be one of {', '.join(RECIPES)}, got {options['recipe']!r}")
    options.update({key: value for key, value in recipe.items() if key not in faim_cfg})
    if not options["normalize"] and "indicatrix" not in faim_cfg:
        options["indicatrix"] = False
    if options["blocks"] < 0:
        raise ValueError(f"faim_cfg['blocks'] must be >= 0, got {options['blocks']}")
    if options["block_base"] not in BASES:
        raise ValueError(f"faim_cfg['block_base'] must be one of {BASES}, got {options['block_base']!r}")
    return options


def _checked(key: str, value: Any, default: Any) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise TypeError(f"faim_cfg[{key!r}] must be {type(default).__name__} (default {default!r}), got {value!r}")
    return value
