"""Numbers of the command line and of recipes: each option states its range where it is declared, checked here alone."""

import argparse
import math
from dataclasses import dataclass

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
