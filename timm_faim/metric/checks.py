"""Numbers that a person gives: each has a kind and a range, and one error that names both."""

import math
from numbers import Integral, Real


def checked_count(name: str, value: object, hint: str = "") -> int:
    """A whole number >= 1.

    Raises:
        TypeError: another kind of value.
        ValueError: less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}{hint}")
    return int(value)


def checked_number(
    name: str, value: object, least: float = 0.0, most: float | None = None, *, above: bool = False, hint: str = ""
) -> float:
    """A finite number in [least, most], with ``above`` greater than ``least``.

    Raises:
        TypeError: another kind of value.
        ValueError: outside the range, NaN or infinite.
    """
    bound = f"> {least:g}" if above else f">= {least:g}"
    wanted = f"a finite number {bound}" if most is None else f"a number in [{least:g}, {most:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not (math.isfinite(value) and (value > least or (value == least and not above)) and value <= (most or math.inf)):
        raise ValueError(f"{name} must be {wanted}, got {value}{hint}")
    return float(value)
