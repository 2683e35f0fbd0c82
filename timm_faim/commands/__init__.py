"""The command line `timm-faim`: one module a command, each light to import, so that help needs neither torch nor timm.

A command's module has its help line as the first line of its docstring, `add_arguments(parser)` and `run(args)`, which
imports what it works with and returns the exit status (None: 0).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from timm_faim.commands.launch import FLAG, start_processes, take_processes
from timm_faim.run.errors import UserError, did_you_mean, report
from timm_faim.run.options import Parser

COMMANDS = {  # in the order of the help
    "train": "train a model on images",
    "fit": "make a classifier of images in closed form, in one pass, without training",
    "predict": "classify images",
    "evaluate": "accuracy, confusions and calibration on images of known classes",
    "classes": "add, remove, merge and rename classes without training",
    "export": "write a model for onnxruntime, torch.export or TorchScript",
    "retrieve": "find like images: Recall@K, mAP@R and NMI of the distance",
    "hub": "publish runs on the Hugging Face Hub",
    "demo": "train on the bundled characters and show what comes out",
}
IN_PARALLEL = ("train", "fit", "predict", "evaluate")  # take --num-processes
PROGRAM = "timm-faim"
_INTERRUPTED, _PIPE = 130, 141  # exit statuses after Ctrl-C and a closed pipe, as shells give them


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point: a person's mistakes come out as one line and exit status 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    try:
        if name not in COMMANDS:
            sys.exit(_without_command(name))
        status = run_command(name, words[1:])
        _leave_group()
        sys.exit(status)
    except UserError as error:
        report(error, f"{PROGRAM} {name}" if name in COMMANDS else PROGRAM)
        sys.exit(1)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_PIPE)
    except KeyboardInterrupt:
        print(f"{PROGRAM} {name}: stopped", file=sys.stderr, flush=True)
        sys.exit(_INTERRUPTED)


def _leave_group() -> None:
    """End the process group of a command in several processes, which libraries warn of otherwise."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def answer_help() -> None:
    """End the process with the help that its command line asks for, if that needs nothing of the package.

    Called before the package is imported, which takes seconds.
    """
    started = sys.orig_argv
    if Path(sys.argv[0]).stem == PROGRAM:
        words = sys.argv[1:]
    elif sys.argv[0] == "-m" and "-m" in started and started[started.index("-m") + 1] == "timm_faim":
        words = started[started.index("-m") + 2 :]
    else:
        return
    asks = not words or bool({"-h", "--help", "--version"} & set(words))
    if asks and not (words and words[0] == "train"):  # whose options stand where they are used
        main(words)


def build_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    module = import_module(f"timm_faim.commands.{name}")
    parser = Parser(
        prog=f"{PROGRAM} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if name in IN_PARALLEL:
        parser.add_argument(FLAG, metavar="N", help="processes on this machine, each with a GPU of its own if there "
                            "are any (default: 1)")  # fmt: skip
    return parser


def run_command(name: str, words: list[str]) -> int | None:
    """One command with its words; the exit status.

    Raises:
        UserError: wrong input.
    """
    if name in IN_PARALLEL:
        processes, words = take_processes(words)
        if processes > 1:
            return start_processes(processes, [name, *words])
    module = import_module(f"timm_faim.commands.{name}")
    if not hasattr(module, "add_arguments"):
        return module.run(words)  # whose own parser reads them
    return module.run(build_parser(name).parse_args(words))


def _without_command(word: str) -> int:
    if word == "--version":
        from timm_faim.version import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if word not in ("-h", "--help"):
        raise UserError(f"unknown command {word}.{did_you_mean(word, COMMANDS)} {PROGRAM} --help lists all")
    print(f"usage: {PROGRAM} COMMAND ...\n\nFAIM heads for timm: fine-grained image classification.\n\ncommands:")
    for name, line in COMMANDS.items():
        print(f"  {name:<10}{line}")
    print(f"\n{PROGRAM} COMMAND --help says more.")
    return 0
