"""What every table says first: machine, versions, command."""

import platform

import timm
import torch

import timm_faim


def headline(command: str, cuda: bool) -> str:
    """One line about this machine and the command that a table came from."""
    name = torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return f"{name}; {versions}, timm_faim {timm_faim.__version__}; command: `{command}`"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"
