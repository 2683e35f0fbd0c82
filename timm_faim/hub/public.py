"""What of a run is known to say nothing of the machine or the people behind it. Nothing else is published.

Keys are published where they are known, numbers where they are finite, words where they are names: without a slash and
short, so that none of them is a place, a formula or markup.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from timm_faim.calibration import Calibration
from timm_faim.documents import read_json
from timm_faim.models.published import INPUT_KEYS
from timm_faim.models.saved import is_number
from timm_faim.run.errors import UserError
from timm_faim.run.record import KEY, images_of, record_of
from timm_faim.training.options import build_parser

# Options whose values are names of timm's or of ours, never a place on the machine that trained. Numbers, switches and
# options with choices are public too; anything else is not published.
_WORDS = (
    "model",
    "opt",
    "aa",
    "gp",
    "interpolation",
    "train_interpolation",
    "input_img_mode",
    "torchcompile",
    "eval_metric",
    "kd_model_name",
    "train_split",
    "val_split",
    "dataset",
)
_GROUPS = ("faim_cfg", "opt_kwargs", "model_kwargs", "contrastive", "freeze")
_CONFIG = ("architecture", "num_classes", "num_features", "global_pool")  # of config.json
_PRETRAINED = (
    "architecture",
    "num_classes",
    "test_input_size",
    "min_input_size",
    "test_crop_pct",
    "test_pool_size",
    *INPUT_KEYS,
)
_WORD = re.compile(r"(?:[\w*+:-][\w.*:+-]*)?")  # a name; with a slash it may be a relative path
_ELSEWHERE = ("local-dir:", "file:")
_DEEPEST = 8
_COLUMN = re.compile(r"(?:epoch|lr|train|eval)(?:_\w[\w.]{0,99})?")  # of summary.csv


def is_name(value: Any) -> bool:
    """Whether a value is a word that names something and is no place."""
    return (
        isinstance(value, str)
        and _WORD.fullmatch(value) is not None
        and len(value) <= 100
        and not value.startswith((".", *_ELSEWHERE))
    )


def public_part(value: Any, depth: int = 0) -> Any:
    """Of a nested value the finite numbers, switches and names; None where nothing is left of it."""
    if isinstance(value, (dict, list)) and depth > _DEEPEST:
        return None
    if isinstance(value, dict):
        return {key: public_part(item, depth + 1) for key, item in value.items() if is_name(key) and _stays(item)}
    if isinstance(value, list):
        return [public_part(item, depth + 1) for item in value if _stays(item)]
    return value if _stays(value) else None


def _stays(value: Any) -> bool:
    return value is None or isinstance(value, (bool, dict, list)) or is_number(value) or is_name(value)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checked config.json without the keys that a model does not need, and without those of its base model.

    Raises:
        UserError: an argument of the model is no name and no number, and could not be left out.
    """
    arguments = dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)  # transformers' wrapper of timm passes its own
    for key, value in arguments.items():
        if {key: value} != public_part({key: value}):
            raise UserError(
                f"config.json: model_args may hold names and numbers, got {key!r}: {value!r}. Save the model without it"
            )
    labels = {key: config[key] for key in ("label_names", "label_descriptions") if config.get(key)}
    cfg = _known(config["pretrained_cfg"], _PRETRAINED) | {"custom_load": False}
    record = public_record(config)
    labels |= {KEY: record} if record else {}
    return _known(config, _CONFIG) | labels | {"model_args": arguments, "pretrained_cfg": cfg}


def public_record(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a config says of its classes the images of each and the calibration, as far as they are what they should
    be."""
    found, record = record_of(config), {}
    if (images := images_of(found, config["num_classes"])) is not None:
        record["images"] = images
    with suppress(KeyError, ValueError):
        record["calibration"] = Calibration.from_json(found["calibration"]).to_json()
    return record


def _known(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return public_part({key: values[key] for key in keys if key in values})


def public_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's options the numbers and switches, and the words that are one of a few choices or names."""
    actions = {action.dest: action for action in build_parser()._actions}
    return {
        key: public_part(value)
        for key, value in args.items()
        if key in actions and _is_public_option(actions[key], value)
    }


def _is_public_option(action: argparse.Action, value: Any) -> bool:
    if action.dest in _GROUPS:
        return value is not None and _stays(value)
    if isinstance(value, str):
        return value in (action.choices or ()) or action.dest in _WORDS and is_name(value)
    return all(isinstance(item, bool) or is_number(item) for item in (value if isinstance(value, list) else [value]))


def read_evaluation(path: Path) -> dict[str, Any]:
    """Metrics (finite numbers), classes and versions in an eval.json; no metrics where there is no file.

    Raises:
        UserError: it cannot be read, or its metrics are not numbers by name.
    """
    if not path.is_file():
        return {"metrics": {}}
    try:
        facts = read_json(path)
        metrics = dict(facts["metrics"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise UserError(f"cannot read {path}: {e}. Evaluate the run again with --eval-only") from e
    versions, classes = facts.get("versions"), facts.get("num_classes")
    versions = versions if isinstance(versions, dict) else {}
    return {
        "metrics": {key: value for key, value in metrics.items() if is_name(key) and is_number(value)},
        **({"num_classes": classes} if is_number(classes) else {}),
        "versions": {key: value for key, value in versions.items() if is_name(key) and is_name(value)},
    }


def public_rows(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Rows of summary.csv with known columns; cells that are no finite number are empty."""
    columns = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if isinstance(key, str) and _COLUMN.fullmatch(key)
    ]
    return [{key: _cell((row.get(key) or "").strip()) for key in columns} for row in rows]


def _cell(text: str) -> str:
    try:
        return text if len(text) <= 40 and is_number(float(text)) else ""
    except ValueError:
        return ""
