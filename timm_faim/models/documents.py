"""JSON and YAML files that others have written: one line says what is wrong with one, however wrong it is."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as e:
        raise ValueError(_one_line(e)) from e


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, plain types only.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not YAML, not UTF-8, nested too deeply, or has values that YAML's types do not hold.
    """
    import yaml  # not needed where no such files are

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as e:  # as dates and huge numbers do
        raise ValueError(_one_line(e)) from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
