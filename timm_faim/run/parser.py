"""Command lines with errors of one line, numbers with ranges, and switches that a recipe can turn either way."""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from timm_faim.run.errors import UserError
from timm_faim.run.numbers import Number


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing the whole usage before the message; numbers are values however written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+).*?: (must be .*)", message, re.DOTALL):
            raise UserError(" ".join(match.groups()))
        raise UserError(f"{message} (--help-all lists every option)")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults, where there is one, and ranges after each help text."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = str(action.default) not in ("None", "False", "", "[]", "{}")
        text = super()._get_help_string(action) if has_default else action.help
        return f"{text} [{action.type}]" if isinstance(action.type, Number) else text


class Flag(argparse.BooleanOptionalAction):
    """`--x` and `--no-x`, so that the command line can switch off what a recipe switches on."""


class Off(argparse.Action):
    """timm's flags `--no-x`, and `--x` to take one back that a recipe gives. The destination is `no_x`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        (flag,) = option_strings
        super().__init__([flag, flag.replace("--no-", "--")], dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, str(option_string).startswith("--no-"))


def switch(action: argparse.Action, value: bool) -> str | None:
    """The word that gives a flag without a value the value `value`; None for its default."""
    name = action.dest.replace("_", "-")
    if value:
        return f"--{name}"
    return f"--no-{name}" if isinstance(action, Flag) else None
