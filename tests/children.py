"""Training runs in child processes that start at once: a server has imported everything and forks."""

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["timm_faim.train"])
_launches: list["Launch"] = []


@atexit.register  # after multiprocessing's own, so it runs before that one waits for the children
def _end_all() -> None:
    """Kill what a failed test has left running."""
    for launch in _launches:
        launch.kill()


def start_server() -> None:
    """Return when the server has imported everything, so that launches after this one can be timed."""
    child = context.Process(target=time.sleep, args=(0,))
    child.start()
    child.join()


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(processes),
    }


def free_port() -> int:
    """A port below the range from which systems number connections: one of those may come before its use."""
    ports = random.SystemRandom()
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := ports.randrange(15000, 32000)))
            return port


def run_group(argv: list[str], environment: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
    """Run a command that starts others, such as a launcher, and leave none of them behind when it takes too long."""
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as e:
        kill_tree(process)
        raise AssertionError(f"no end within {timeout} s:\n{process.communicate()[1]}") from e
    return subprocess.CompletedProcess(argv, process.returncode, output, errors)


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started; launchers put what they start into sessions of its own."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def _in_group(function, rank: int, processes: int, port: int, arguments: tuple) -> None:
    os.environ.update(rank_environment(rank, processes, port), ACCELERATE_USE_CPU="true")
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    function(*arguments)
    torch.distributed.barrier()  # none leaves while another one still talks to it
    torch.distributed.destroy_process_group()


def in_group(function, *arguments, processes: int = 2) -> None:
    """Call a function in every process of a group on the CPU; an error in one is an error here."""
    port = free_port()
    children = [
        context.Process(target=_in_group, args=(function, rank, processes, port, arguments))
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + 120
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
        child.kill()
        child.join()
    statuses = [child.exitcode for child in children]
    assert statuses == [0] * processes


def _child(argv: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a process that a shell started
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    import torch

    from timm_faim.train import main

    torch.set_num_threads(1)
    main(argv, "train_faim.py")
    sys.stdout.flush()


class Launch:
    """One launch of a run, of one or two processes, with what they print in a file."""

    def __init__(self, argv, log: Path, processes: int = 1) -> None:
        environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        port = free_port()
        self.log, self.children = log, []
        for rank in range(processes):
            ranked = environment | (rank_environment(rank, processes, port) if processes > 1 else {})
            child = context.Process(target=_child, args=([str(w) for w in argv], ranked, str(log)))
            child.start()
            self.children.append(child)
        _launches.append(self)

    def is_alive(self) -> bool:
        return any(child.is_alive() for child in self.children)

    def signal_all(self, number: int) -> None:
        """Send a signal to the processes and their loader workers."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number) if number == signal.SIGKILL else os.kill(child.pid, number)

    def kill(self) -> None:
        """End at once what still runs, also a child that is not yet the leader of its group."""
        self.signal_all(signal.SIGKILL)
        for child in self.children:
            child.kill()
            child.join()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses; a run that hangs is killed and fails the test."""
        deadline = time.monotonic() + timeout
        for child in self.children:
            child.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive():
            self.kill()
            raise AssertionError(f"the run did not end within {timeout} s:\n{self.text()}")
        return [child.exitcode for child in self.children]

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Return when the run has printed the text."""
        deadline = time.monotonic() + timeout
        while text not in self.text():
            if time.monotonic() > deadline or not self.is_alive():
                self.kill()
                raise AssertionError(f"no {text!r} in\n{self.text()}")
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""
