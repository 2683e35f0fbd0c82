"""Errors that a person can mend, shown as one line instead of a traceback."""
import difflib
import os
import sys
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The message is one line that names the value and what to do about it."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises a worker's exception again with the worker's whole traceback as its message;
        # what the worker said is the end of it.
        super().__init__(message.rsplit("Error: ", 1)[-1].strip() if "Traceback" in message else message)


class RankError(UserError):
    """A `UserError` that one process alone may have met, so that one reports it whatever its rank."""


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase with the nearest known names, or an empty string when nothing comes near."""
    nearest = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(nearest)}?" if nearest else ""


def report(error: UserError) -> None:
    """Print the error to stderr, once per machine unless it belongs to a single process."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    if isinstance(error, RankError) or local_rank == "0":
        where = f" (process {rank})" if isinstance(error, RankError) and "RANK" in os.environ else ""
        print(f"train_faim: error{where}: {error}", file=sys.stderr, flush=True)
