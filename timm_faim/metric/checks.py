"""Numbers that a person gives: each has a kind and a range, and one error that names both."""

import math
from collections.abc import Sequence
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
    wanted = f"a finite number {bound}" if most is None else f"a number in {'(' if above else '['}{least:g}, {most:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if not (math.isfinite(value) and (value > least or (value == least and not above)) and value <= (most or math.inf)):
        raise ValueError(f"{name} must be {wanted}, got {value}{hint}")
    return float(value)


def checked_parts(in_features: int, parts: Sequence[int], weights: Sequence[float]) -> tuple[list[int], list[float]]:
    """Widths of the parts, [in_features] where none are given, and their weights, of sum 1.

    Raises:
        TypeError, ValueError: widths whose sum is not ``in_features``, or weights that do not go with them.
    """
    widths = [checked_count("a width in parts", width) for width in parts] or [in_features]
    if sum(widths) != in_features:
        raise ValueError(f"parts={widths} have {sum(widths)} features together, and in_features is {in_features}")
    values = [checked_number("a weight in part_weights", weight) for weight in weights] or [1.0] * len(widths)
    if len(values) != len(widths) or not 0 < math.fsum(values) < math.inf:
        raise ValueError(f"part_weights must be one number >= 0 for each of the {len(widths)} parts and not all 0, got "
                         f"{values}")  # fmt: skip
    return widths, [value / math.fsum(values) for value in values]
