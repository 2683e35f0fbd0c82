"""Options as fields of dataclasses: each module declares its own, and the command line and recipes follow from them.

Each number states its range where it is declared; it is checked here alone.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NoReturn, TypeVar

from timm_faim.run.errors import UserError

Group = TypeVar("Group")
AUTO = "auto"  # of options that the data may choose
MANY = 1_000_000  # epochs, updates, images: more than any run has, little enough to count to


@dataclass(frozen=True)
class Number:
    """The `type` of an option: a whole or real number within a range; NaN and infinity are in none.

    `above` and `below` leave out the least and the largest value themselves.
    """

    kind: type
    least: float
    most: float
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> float:
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if (
            not (self.least <= value <= self.most)
            or (self.above and value == self.least)
            or (self.below and value == self.most)
        ):
            raise argparse.ArgumentTypeError(f"must be {self}, got {text}")
        return value

    def __str__(self) -> str:
        what = "a whole number" if self.kind is int else "a number"
        if self.above or self.below:
            return (
                f"{what} {'>' if self.above else '>='} {self.least:g} and {'<' if self.below else '<='} {self.most:g}"
            )
        return f"{what} in {self._short(self.least)}..{self._short(self.most)}"

    @staticmethod
    def _short(value: float) -> str:
        return str(value) if isinstance(value, int) else f"{value:g}"


def whole(least: int, most: int = MANY) -> Number:
    """A whole number in least..most."""
    return Number(int, least, most)


def real(least: float, most: float) -> Number:
    """A number in least..most."""
    return Number(float, least, most)


def above(least: float, most: float) -> Number:
    """A number greater than `least` and at most `most`."""
    return Number(float, least, most, above=True)


SHARE = real(0, 1)

MARKS = {
    "usual",  # --help lists it; --help-all lists every option
    "faim",  # for FAIM models; a recipe may carry it while the command line picks a plain timm model as a baseline
    "launch",  # of one launch: a run that is resumed by its folder alone takes the others from its args.yaml
    "training",  # not taken over by an evaluation of a run: it does nothing there, or needs a training
    "runtime",  # may differ between the parts of one run
}


def option(
    help: str,
    default: Any = None,
    type: Callable | None = None,
    metavar: str | tuple[str, ...] | None = None,
    *,
    alias: str = "",
    marks: str = "",
    **argument: Any,
) -> Any:
    """A field that is an option with a value.

    Args:
        help: one line.
        default: the value without the option.
        type: what makes a value of a word; a `Number` for numbers.
        metavar: stands for the value in the help.
        alias: a second flag.
        marks: words of `MARKS`.
        **argument: further arguments of argparse's `add_argument`.
    """
    argument |= {"help": help, "type": type, "metavar": metavar}
    return _field(default, alias, marks, {key: value for key, value in argument.items() if value is not None})


def flag(help: str, default: bool = False, *, marks: str = "") -> Any:
    """A field that is an option without a value: `--x` and `--no-x`, whichever of the two its name is."""
    return _field(default, "", marks, {"help": help})


def _field(default: Any, alias: str, marks: str, argument: dict[str, Any]) -> Any:
    metadata = {"alias": alias, "marks": frozenset(marks.split()), "argument": argument}
    assert metadata["marks"] <= MARKS, marks
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(copy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


def marked(groups: Iterable[Any], mark: str) -> list[str]:
    """Names of the options of groups, or of their classes, with a mark."""
    return [declared.name for group in groups for declared in fields(group) if mark in declared.metadata["marks"]]


def reset(groups: Iterable[Any], names: Iterable[str]) -> None:
    """Put the named options back to their defaults."""
    names = set(names)
    for group in groups:
        fresh = vars(group.__class__())
        vars(group).update((name, fresh[name]) for name in names & fresh.keys())


def add_groups(parser: argparse.ArgumentParser, groups: Iterable[type]) -> None:
    """Add the options of these classes to a parser, each class as a group titled by its docstring."""
    for group in groups:
        add = parser.add_argument_group(group.__doc__.splitlines()[0].removesuffix(".")).add_argument
        for declared in fields(group):
            argument = dict(declared.metadata["argument"], default=getattr(group(), declared.name))
            if declared.type is bool:
                argument["action"] = Off if declared.name.startswith("no_") else Flag
            names = [f"--{declared.name.replace('_', '-')}", declared.metadata["alias"]]
            add(*sorted(filter(None, names), key=lambda name: name.startswith("--")), **argument).is_usual = (
                "usual" in declared.metadata["marks"]
            )


def taken_from(group: type[Group], namespace: argparse.Namespace) -> Group:
    """The group of options with the values of a namespace."""
    return group(**{declared.name: getattr(namespace, declared.name) for declared in fields(group)})


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


class ShowHelp(argparse._HelpAction):
    """`--help` shows the usual options, `--help-all` every one."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        if self.dest == "help_all":
            super().__call__(parser, *args, **kwargs)
        formatter = parser._get_formatter()
        formatter.add_usage(parser.usage, (), ())
        formatter.add_text(parser.description)
        formatter.add_arguments(action for action in parser._actions if getattr(action, "is_usual", True))
        print(formatter.format_help(), end="")
        parser.exit()


class Flag(argparse.BooleanOptionalAction):
    """`--x` and `--no-x`, so that the command line can switch off what a recipe switches on."""


class Off(argparse.Action):
    """timm's flags `--no-x`, and `--x` to take one back that a recipe gives. The destination is `no_x`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        (name,) = option_strings
        super().__init__([name, name.replace("--no-", "--")], dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, str(option_string).startswith("--no-"))
