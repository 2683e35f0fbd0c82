"""Predictions as rows: for a table program, for a program, for a person, and on disk while they are made.

A row is {"file", "prediction", "known", "top": [{"class", "probability", "distance"}], ...}, or {"file", "error"}.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from timm_faim.classifier.prediction import Prediction
from timm_faim.run.csv_file import write_csv
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write

Row = dict[str, Any]
FORMATS = ("csv", "jsonl", "table")
_WIDTH = 44  # characters of a file's name in a table


def row_of(file: str, prediction: Prediction) -> Row:
    """The row of an image."""
    distances = prediction.distances or [None] * len(prediction.classes)
    told = zip(prediction.classes, prediction.probabilities, distances, strict=True)
    top = [{"class": name, "probability": round(p, 6)} | ({} if d is None else {"distance": round(d, 6)})
           for name, p, d in told]  # fmt: skip
    row: Row = {"file": file, "prediction": prediction.name, "known": prediction.known, "top": top}
    if prediction.candidates is not None:
        row["candidates"] = prediction.candidates
    if prediction.neighbours:
        row["neighbours"] = [{"file": name, "distance": round(d, 6)} for name, d in prediction.neighbours]
    return row


def write_rows(path: Path, rows: Sequence[Row], kind: str) -> None:
    """Write rows as csv or jsonl, whole or not at all."""
    if kind == "csv":
        write_csv(path, _csv_rows(rows))
        return
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv_rows(rows: Sequence[Row]) -> Iterator[list]:
    K = max((len(row["top"]) for row in rows if "top" in row), default=1)
    further = [key for key in ("candidates", "neighbours") if any(key in row for row in rows)]
    yield [
        "file",
        "prediction",
        "confidence",
        "distance",
        "known",
        *(f"{key}_{k}" for k in range(2, K + 1) for key in ("class", "probability", "distance")),
        *further,
        "error",
    ]
    for row in rows:
        top = row.get("top") or [{}]
        known = {True: "yes", False: "no"}.get(row.get("known"), "")
        cells = [
            row["file"],
            row.get("prediction", ""),
            top[0].get("probability", ""),
            top[0].get("distance", ""),
            known,
        ]
        for k in range(1, K):
            entry = top[k] if k < len(top) else {}
            cells += [entry.get(key, "") for key in ("class", "probability", "distance")]
        names = {"candidates": row.get("candidates", ()), "neighbours": [n["file"] for n in row.get("neighbours", ())]}
        yield [*cells, *("; ".join(names[key]) for key in further), row.get("error", "")]


def line_of(row: Row) -> str:
    """A row for the terminal."""
    file = row["file"] if len(row["file"]) <= _WIDTH else f"…{row['file'][1 - _WIDTH :]}"
    if "error" in row:
        return f"{file:<{_WIDTH}}  cannot be read: {row['error']}"
    first, *others = row["top"]
    rest = ", ".join(f"{entry['class']} {100 * entry['probability']:.1f} %" for entry in others[:2])
    what = row["prediction"] if row["known"] is not False else f"{row['prediction']} (nearest: {first['class']})"
    line = f"{file:<{_WIDTH}}  {what}  {100 * first['probability']:.1f} %" + (f"   ({rest})" if rest else "")
    if "candidates" in row:
        line += f"   one of: {', '.join(row['candidates'])}"
    return line + "".join(f"\n{'':<{_WIDTH}}    like {n['file']}" for n in row.get("neighbours", ()))


class Journal:
    """Rows on disk while they are made, so that a killed prediction goes on where it was.

    The file lies beside the result under a hidden name: the settings in the first line, in each further one a row with
    size and time of its image. One of other settings is begun anew; images that have changed since, or could not be
    read, are looked at again.

    Args:
        result: the file that the rows are for.
        settings: what the rows depend on.
    """

    def __init__(self, result: Path, settings: dict[str, Any]) -> None:
        self.path = result.with_name(f".{result.name}.part")
        self.rows: list[Row] = []
        head = json.dumps(settings, sort_keys=True)
        try:
            before = self._read(head)
            self._stream: IO = self.path.open("r+" if before else "w", encoding="utf-8", errors="surrogateescape")
            if before:
                self._stream.truncate(before)
                self._stream.seek(before)
            else:
                self._stream.write(head + "\n")
                self._stream.flush()
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}. Choose another --output") from e

    def _read(self, head: str) -> int:
        """Take over the rows of before; bytes up to the end of the last whole one, 0 where there are none."""
        if not self.path.is_file():
            return 0
        good = 0
        with self.path.open("rb") as stream:
            for number, line in enumerate(stream):
                text = line.decode("utf-8", "surrogateescape")
                if not text.endswith("\n") or (number == 0 and text != head + "\n"):
                    break
                if number and not self._take(text):
                    break
                good += len(line)
        return good

    def _take(self, text: str) -> bool:
        """Take a row over if its image is still the same; False if the line is none."""
        try:
            entry = json.loads(text)
            row, stamp = entry["row"], entry["stamp"]
            if "error" not in row and stamp == _stamp(row["file"]):
                self.rows.append(row)
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; they are in the file when this returns."""
        rows = list(rows)
        self._stream.writelines(json.dumps({"row": row, "stamp": _stamp(row["file"])}) + "\n" for row in rows)
        self._stream.flush()
        self.rows += rows

    def close(self) -> None:
        """Leave the file for the next time."""
        self._stream.close()

    def remove(self) -> None:
        """The result is written."""
        self.close()
        self.path.unlink(missing_ok=True)


def _stamp(file: str) -> list[int]:
    """Changes when a file does; empty where it is gone."""
    try:
        status = os.stat(file)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
