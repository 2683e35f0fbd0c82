"""JSON and YAML files that others have written: one line says what is wrong with one, however wrong it is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SAID = 600  # characters of a message, however long the value that it names


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
        raise ValueError(one_line(e)) from e


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
        raise ValueError(one_line(e)) from e


def one_line(said: object) -> str:
    """A message in one line that a person can read; a long one keeps its beginning and its end, the mend."""
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= _SAID else f"{text[: _SAID // 2]} ... {text[-_SAID // 2 :]}"


@contextmanager
def short_errors() -> Iterator[None]:
    """Within it, or in a function that it decorates, ValueError and TypeError say what they say in `one_line`."""
    try:
        yield
    except (ValueError, TypeError) as e:
        raise type(e)(one_line(e)) from e
