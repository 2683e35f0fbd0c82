"""CSV files that a spreadsheet opens as what they say: text is never taken for a formula."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from timm_faim.run.files import atomic_write

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters that spreadsheets compute from


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows, whole or not at all; texts that begin like a formula get an apostrophe, numbers stay numbers.

    File names that are not valid UTF-8 keep their bytes.
    """
    with (
        atomic_write(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream,
    ):
        csv.writer(stream, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
