"""Several processes of one command: `--num-processes N` starts it again under torch's launcher."""

import os
import sys
from collections.abc import Sequence

from timm_faim.run.errors import UserError

FLAG = "--num-processes"
_MOST = 1024


def take_processes(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number of processes that a command line asks for (1 without), and its other words.

    Raises:
        UserError: no number, or one out of 1..1024.
    """
    count, rest, it = "1", [], iter(words)
    for word in it:
        if word == FLAG:
            count = next(it, "")
        elif word.startswith(f"{FLAG}="):
            count = word.partition("=")[2]
        else:
            rest.append(word)
    if not (count.isdecimal() and 1 <= int(count) <= _MOST):
        raise UserError(f"{FLAG} must be a whole number in 1..{_MOST}, got {count or 'nothing'}")
    return int(count), rest


def start_processes(count: int, words: Sequence[str]) -> int:
    """Run `timm-faim` with these words in `count` processes of this machine; the exit status.

    On GPUs each process has one; on a machine without GPUs they share the cores.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # without it Accelerate takes processes on the CPU for one
    elif (there := torch.cuda.device_count()) < count:
        raise UserError(f"{FLAG} {count} needs as many GPUs, and there are {there}")
    # torchrun would leave one thread a process; what shares the cores out is told by nothing
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = ["--standalone", "--nproc-per-node", str(count), "-m", "timm_faim", *words]
    try:
        run(get_args_parser().parse_args(launch))
    except ChildFailedError as e:  # the process has said why
        return max(1, *(failure.exitcode for failure in e.failures.values()))
    except SignalException as e:  # Ctrl-C too
        print("stopped", file=sys.stderr)
        return 128 + e.sigval
    return 0
