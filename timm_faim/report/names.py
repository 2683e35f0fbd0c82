"""Names of classes, in full and as they fit into a picture."""

from collections.abc import Sequence


def class_name(label_names: Sequence[str] | None, k: int) -> str:
    """The name of class k, or its number."""
    return str(label_names[k]) if label_names is not None and k < len(label_names) else str(k)


def short_name(label_names: Sequence[str] | None, k: int, length: int = 24) -> str:
    """The name of class k for a picture: shortened in the middle, with matplotlib's formula sign escaped."""
    name = class_name(label_names, k)
    if len(name) > length:
        tail = length // 2  # the ends of names differ more often than their beginnings
        name = f"{name[: length - tail - 1]}…{name[-tail:]}"
    return name.replace("$", r"\$")
