"""The run folder and whole-or-nothing writes into it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from timm.models import safe_model_name
from timm.utils import get_outdir

from timm_faim.run.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` once the block has ended without an error.

    A reader sees the old file or the new one, and an interrupted run leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make private files
        flush_to_disk(temporary)
        rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Return when the file's bytes are on disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def rename(source: Path, path: Path) -> None:
    """Rename at once, replacing a file of that name; durable when this returns."""
    os.replace(source, path)
    _sync_folder(path.parent)


def link_as(source: Path, path: Path) -> None:
    """Make `path` a second name of `source`, at once (a copy where the file system has no hard links)."""
    with atomic_write(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)


def create_run_folder(output: str, experiment: str, model_name: str, img_size: int) -> Path:
    """Make the folder of this run: `output/experiment`, or a name of time, model and image size.

    Raises:
        UserError: the folder holds files already, or cannot be written.
    """
    name = experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(model_name)}-{img_size}"
    folder = Path(output, name)
    try:
        if experiment and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"run folder {folder} is not empty. Choose another --experiment, or remove the folder")
        folder = Path(get_outdir(output, name, inc=not experiment))
    except OSError as e:
        raise UserError(f"cannot write to run folder {folder}: {e.strerror}. Choose another --output") from e
    return check_writable(folder)


def check_writable(folder: Path) -> Path:
    """The folder, when files can be made in it.

    Raises:
        UserError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as e:
        raise UserError(f"cannot write to run folder {folder}: {e.strerror}. Choose another --output") from e


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; where folders cannot be opened (Windows) renames need no such help."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
