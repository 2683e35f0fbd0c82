"""What a run tells while it trains: args.yaml, summary.csv and one line an epoch."""

import csv
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from timm_faim import faim_heads
from timm_faim.run.csv_file import write_csv
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write


def save_recipe(recipe: dict[str, Any], path: Path) -> None:
    """Write the options as YAML: `--config args.yaml` with another --experiment repeats the run."""
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def head_metrics(model: torch.nn.Module) -> dict[str, float]:
    """λ and γ of every FAIM head, by column name; a collective call for a sharded model."""
    heads = faim_heads(model)
    metrics = {}
    for name, head in heads.items():
        suffix = f"_{name}" if len(heads) > 1 and name else ""
        # Effective values: the signs have no effect.
        metrics[f"lambda{suffix}"] = round(abs(_whole(head.metric.lmbda).item()), 5)
        metrics[f"gamma{suffix}"] = round(abs(_whole(head.scale).item()), 4)
    return metrics


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def append_summary(path: Path, epoch: int, train: dict[str, Any], val: dict[str, Any], lr: float | None = None) -> None:
    """Add a row after `epoch` epochs, 0 for the start, to summary.csv, with the columns of timm's `update_summary`.

    timm's function writes no header anew where a row has other columns: an epoch without validation leaves cells empty.
    """
    row = {"epoch": epoch, **{f"train_{k}": v for k, v in train.items()}, **{f"eval_{k}": v for k, v in val.items()}}
    _write_rows(path, [*read_summary(path), row | ({} if lr is None else {"lr": lr})])


def read_summary(path: Path) -> list[dict[str, str]]:
    """The rows of summary.csv, each with its epoch; none where there is no file.

    Raises:
        UserError: it cannot be read, or a row has no epoch.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"cannot read {path}: {e}. Mend it, or remove it and go on without") from e
    if not all(re.fullmatch("[0-9]{1,9}", row.get("epoch") or "") for row in rows):
        raise UserError(f"{path} is damaged: a row lacks its epoch. Mend it, or remove it and go on without")
    if rows and rows[0]["epoch"] == "0" and rows[0].get("train_loss"):  # earlier versions counted from 0
        for row in rows:
            row["epoch"] = str(int(row["epoch"]) + 1)
    return rows


def cut_summary(path: Path, epoch: int) -> None:
    """Remove the rows after `epoch`, which a resumed run will write again."""
    rows = read_summary(path)
    kept = [row for row in rows if int(row["epoch"]) <= epoch]
    if len(kept) < len(rows):
        _write_rows(path, kept)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    fullest = max(rows, key=len, default={})  # whose order of columns is kept
    columns = list(dict.fromkeys(key for row in (fullest, *rows) for key in row))
    write_csv(path, [columns, *([row.get(key, "") for key in columns] for row in rows)])


def epoch_line(epoch: int, epochs: int, train: dict[str, Any], val: dict[str, Any], is_best: bool) -> str:
    """One line for a person; `val` is empty in an epoch without validation."""
    return (
        f"epoch {epoch:3d}/{epochs}: training loss {train['loss']:.3f}, top-1 {train['top1']:5.1f} %"
        f"{' | ' if val else ''}{validation_line(val)} | {train['images_per_s']:.0f} images/s, "
        f"{train['seconds']:.1f} s{'  *' if is_best else ''}"
    )


def validation_line(val: dict[str, Any]) -> str:
    """The numbers of a validation; empty without one."""
    if "top1" in val:
        return (
            f"validation loss {val['loss']:.3f}, top-1 {val['top1']:5.1f} %, top-5 {val['top5']:5.1f} % of "
            f"{val['samples']} images"
        )
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in val.items() if key != "samples")
    return f"validation {numbers}" if val else ""
