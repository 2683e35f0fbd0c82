"""What a classifier knows besides its weights: the object `classifier` of config.json, for a run and on the Hub alike.

    {"images": [training images of each class], "calibration": {...}}

Both may be missing: a model from elsewhere has none. It takes a few bytes a class and is read with the label names.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_faim.documents import read_json
from timm_faim.run.files import atomic_write

KEY = "classifier"


def record_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The record in a config; empty where there is none of its form."""
    record = config.get(KEY)
    return dict(record) if isinstance(record, dict) else {}


def images_of(record: Mapping[str, Any], num_classes: int) -> list[int] | None:
    """Training images of each class [C]; None where they are not known."""
    images = record.get("images")
    counts = isinstance(images, list) and all(type(count) is int and count >= 0 for count in images)
    return list(images) if counts and len(images) == num_classes else None


def write_record(path: Path, **entries: Any) -> None:
    """Put entries into the record of a config.json, whole or not at all; None takes one out.

    Raises:
        OSError, ValueError: there is no such file, or it is no config.
    """
    config = read_json(path)
    record = {key: value for key, value in (record_of(config) | entries).items() if value is not None}
    with atomic_write(path) as temporary:
        text = json.dumps(config | {KEY: record} if record else {k: v for k, v in config.items() if k != KEY}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
