"""Errors that a person can mend, shown as one line instead of a traceback."""

import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from timm_faim.documents import one_line


class UserError(Exception):
    """Wrong input. The message is one line that names the value and what to do about it."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's exception again with the worker's whole traceback as its message;
        # what the worker said is the end of it.
        super().__init__(one_line(message.rsplit("Error: ", 1)[-1] if "Traceback" in message else message))


class RankError(UserError):
    """A `UserError` that one process alone may have met, so that one reports it whatever its rank."""


# The ways in which timm, torch and safetensors say that a name, its arguments or its weights do not do.
MODEL_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    AssertionError,
    LookupError,
    AttributeError,
    EOFError,
    RecursionError,
    UnpicklingError,
    SafetensorError,
)
LOST_PROCESS = (
    "another process of this run has ended; its own message says why. Without one it was killed, most "
    "often for want of memory. What was saved is kept; go on with --resume auto"
)
_LOST = (
    "onnection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "failed to recv",
    "remote process exited",
    "recvValue failed",
    "sendBytes failed",
)  # of gloo, NCCL and torch's store


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective call failed because another process of the group is gone."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


def lost_worker(error: BaseException) -> str | None:
    """Process numbers of loader workers that are gone; torch raises it wherever the main process happens to be."""
    found = re.search(r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)", str(error))
    return found[1].strip() if found and isinstance(error, RuntimeError) else None


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space."""
    return _is_of(error, errno.ENOSPC, errno.EDQUOT)


def _is_of(error: BaseException, *numbers: int) -> bool:
    """Whether an error has one of these numbers, or the words of one: libraries below wrap the system's errors."""
    return getattr(error, "errno", None) in numbers or any(os.strerror(number) in str(error) for number in numbers)


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase with the nearest known names, or an empty string when nothing comes near."""
    nearest = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def few(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def report(error: UserError, program: str) -> None:
    """Print the error of a program to stderr, once per machine unless it belongs to a single process."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, RankError) or local_rank == "0":
        where = f" (process {rank})" if isinstance(error, RankError) and "RANK" in os.environ else ""
        print(f"{program}: error{where}: {error}", file=sys.stderr, flush=True)


@contextmanager
def resource_advice(batch_size: int, grad_accum_steps: int, output: str) -> Iterator[None]:
    """Turn "out of memory" and "disk full" within the block into a `RankError` that says what to try."""
    from accelerate.utils.memory import should_reduce_batch_size  # which imports torch

    try:
        yield
    except (RuntimeError, ValueError) as e:
        if lost := lost_worker(e):
            raise RankError(
                f"loader worker {lost} was lost: killed, most often for want of memory or of space in "
                "/dev/shm. Try fewer --workers; what was saved is kept, go on with --resume auto"
            ) from e
        if "Expected more than 1 value per channel" in str(e):
            raise RankError(
                f"batch norm cannot train on one value: --batch-size {batch_size} is too small for "
                "this model and image size. Give at least --batch-size 2, or a larger --img-size"
            ) from e
        if isinstance(e, ValueError) or not should_reduce_batch_size(e):
            raise
        half, twice = max(1, batch_size // 2), 2 * grad_accum_steps
        raise RankError(
            f"out of memory with --batch-size {batch_size}. Try --batch-size {half} --grad-accum-steps {twice}, "
            "the same number of images an update, or --grad-checkpointing, --amp --amp-dtype bfloat16, or a smaller "
            "--img-size"
        ) from e
    except (OSError, SafetensorError) as e:
        if not _is_of(e, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        free = shutil.disk_usage(output if Path(output).exists() else ".").free / 2**20
        raise RankError(
            f"cannot write to the run folder: {' '.join(str(e).split())} ({free:.0f} MiB free in {output})."
            " What was saved before is kept; free some space and go on with --resume auto"
        ) from e
