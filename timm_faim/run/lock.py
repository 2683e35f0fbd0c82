"""One run writes to a run folder at a time: a lock that the system takes back when its process ends."""

import os
import shutil
from pathlib import Path
from typing import IO

from timm_faim.run.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
_held: list[IO] = []


def lock_run_folder(folder: Path) -> None:
    """Claim a run folder for this process and clear what killed runs have left half-written in it.

    Raises:
        UserError: another process has it.
    """
    if fcntl is not None:
        stream = (folder / LOCK).open("a+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            owner = stream.read().strip()
            stream.close()
            whose = f" (process {owner})" if owner else ""
            raise UserError(
                f"another run writes to {folder}{whose}. Wait for it or end it, or choose another --experiment"
            ) from None
        except OSError:  # a file system without locks
            pass
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        _held.append(stream)
    for place in (folder, folder / "checkpoints", folder / "top", folder / "eval"):
        for left_over in place.glob(".*.tmp"):
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()


def release_locks() -> None:
    """Give back what this process has claimed."""
    while _held:
        _held.pop().close()


if fcntl is not None:  # a forked loader worker has the open file too, and may live on for a while after its parent;
    os.register_at_fork(after_in_child=release_locks)  # closing the worker's leaves the parent's lock as it is
