"""Checkpoints of a run folder: which there are, and which of them are whole."""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_faim.run.errors import UserError
from timm_faim.run.options import flag, option, whole

FOLDER, MANIFEST = "checkpoints", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)-(\d+)")


@dataclass
class CheckpointOptions:
    """Checkpoints."""

    resume: str = option(
        "go on from a run folder or one of its checkpoints; without --config its args.yaml is the recipe. auto: from "
        "the unfinished run with these options, if there is one",
        "",
        metavar="PATH",
        marks="usual launch",
    )
    no_resume_opt: bool = flag("resume without the state of the optimiser", marks="launch")
    start_epoch: int | None = option(
        "number of the first epoch, from 0 (default: 0, or as resumed)", None, whole(0), "N", marks="launch"
    )
    stop_epoch: int | None = option(
        "stop when N epochs are done, to be resumed later", None, whole(1), "N", marks="launch"
    )
    recovery_interval: int = option("updates between checkpoints within an epoch", 0, whole(0), "N", marks="runtime")
    checkpoint_hist: int = option("number of best epochs whose weights are kept", 10, whole(1), "N", marks="runtime")


def find_checkpoint(folder: Path, accelerator: Accelerator, log: Any) -> Path | None:
    """The newest whole checkpoint of a run folder; damaged ones are named and passed over. A collective call.

    Returns:
        None where there is no checkpoint.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    found: list[Any] = [None, 0]
    if accelerator.is_main_process:
        paths = newest_first(folder / FOLDER)
        found[1] = len(paths)
        for path in paths:
            damage = _damage(path)
            if damage is None:
                found[0] = str(path)
                break
            log(f"checkpoint {path} is damaged ({damage}); trying the one before")
    path, count = broadcast_object_list(found)
    if path is None and count:
        raise UserError(
            f"all {count} checkpoints in {folder / FOLDER} are damaged. Start anew with another "
            "--experiment, from its weights with --initial-checkpoint if you like, or remove the folder"
        )
    return None if path is None else Path(path)


def check_checkpoint(path: Path, accelerator: Accelerator) -> None:
    """Verify a checkpoint that a person named. A collective call.

    Raises:
        UserError: it is damaged; the message names the newest whole one of the same run.
    """
    problem = [None]
    if accelerator.is_main_process and (damage := _damage(path)) is not None:
        whole = [p for p in newest_first(path.parent) if p != path and _damage(p) is None]
        mend = f"Resume from {whole[0]}, which is whole" if whole else "There is no other whole one beside it"
        problem[0] = f"checkpoint {path} is damaged ({damage}). {mend}"
    if (message := broadcast_object_list(problem)[0]) is not None:
        raise UserError(message)


def is_checkpoint(path: Path) -> bool:
    """Whether a path has the name of a checkpoint."""
    return _NAME.fullmatch(path.name) is not None


def layout_of(path: Path) -> dict[str, int]:
    """Processes, batch_size, grad_accum_steps and training images of the run that wrote a checkpoint."""
    return read_manifest(path)["layout"]


def epochs_done(folder: Path) -> int:
    """Number of whole epochs of a run folder's newest readable checkpoint; 0 without one."""
    for path in newest_first(folder / FOLDER):
        try:
            return read_manifest(path)["progress"]["epoch"]
        except (OSError, ValueError, KeyError):
            continue
    return 0


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints by their position in the run; clocks are not asked."""
    paths = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(paths, key=position, reverse=True)


def position(path: Path) -> tuple[int, int]:
    epoch, images = _NAME.fullmatch(path.name).groups()
    return int(epoch), int(images)


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError, KeyError) as e:
        return f"{MANIFEST} cannot be read: {type(e).__name__}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} of {expected['bytes']} bytes"
        if crc32(file) != expected["crc32"]:
            return f"{name} has changed since it was written"
    return None


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            value = zlib.crc32(block, value)
    return value
