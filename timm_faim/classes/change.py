"""Add, remove, merge and rename the classes of a model with FAIM heads, in place and without training.

Everything is checked before anything changes. Rows of classes that stay are the same bits; so are their logits up to
the rounding of a matrix product of another width. The parameters are new objects: make the optimiser afterwards.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from timm_faim.run.errors import few

from .features import Means, in_batches, mean_features
from .names import check_distinct, class_names, heads_of, numbers_of, set_names
from .prototypes import Source, counts_of, rebuild_, weights_of


def add_classes(
    model: nn.Module,
    images_by_name: Mapping[str, Tensor | Iterable[Tensor]],
    *,
    merge: bool = False,
    images: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> list[int] | None:
    """Add classes, behind the others, from a few images of each.

    Args:
        model: of timm, with FAIM heads; its device and modes stay.
        images_by_name: of each new class images [n, 3, H, W], transformed as the model takes them, or an iterable of
            such batches.
        merge: a name that the model has takes the images into that class.
        images: how many training images made each class of the model so far; they weigh its prototype where ``merge``
            adds to it (unknown: as much as the new images together).
        label_names: class names of a model that has none.

    Returns:
        How many images made each class now; None where ``images`` is.

    Raises:
        ValueError: no FAIM head, no class names, a name that the model has (without ``merge``), a class without
            images, images of another form, features that are not finite. The model is then as it was.
    """
    names = class_names(model, label_names)
    new = list(images_by_name)
    check_distinct(new)
    if not new:
        raise ValueError("no classes to add; give images by class name")
    if not merge and (known := [name for name in new if name in set(names)]):
        raise ValueError(f"the model has class {few(known)} already; to take the images into it give merge")
    return add_from_batches(model, in_batches(images_by_name), new, names, images)


def add_from_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    new: Sequence[str],
    names: Sequence[str],
    images: Sequence[int] | None,
) -> list[int] | None:
    """:func:`add_classes` from (images [B, 3, H, W], places of their classes in ``new`` [B]); others than these places
    are left out. ``names`` are those of the model's classes."""
    _check_images(images, names)
    means = mean_features(model, heads_of(model), batches, new)
    place = {name: i for i, name in enumerate(new)}
    sources = [Source(name, (k,), place.pop(name, None)) for k, name in enumerate(names)]
    return _apply(model, sources + [Source(name, (), i) for name, i in place.items()], images, means)


def remove_classes(
    model: nn.Module,
    names: Iterable[str],
    *,
    images: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> list[int] | None:
    """Remove classes by name; the others keep their order. Arguments, result and errors as of :func:`add_classes`.

    Raises:
        ValueError: also, a name that no class has; no class would remain.
    """
    before = class_names(model, label_names)
    _check_images(images, before)
    gone = set(numbers_of(before, _listed(names)))
    if len(gone) == len(before):
        raise ValueError(f"a classifier needs at least one class, and all {len(before)} would be removed")
    sources = [Source(name, (k,)) for k, name in enumerate(before) if k not in gone]
    return _apply(model, sources, images, None)


def merge_classes(
    model: nn.Module,
    merged: Mapping[str, Iterable[str]],
    *,
    images: Sequence[int] | None = None,
    label_names: Sequence[str] | None = None,
) -> list[int] | None:
    """Make one class of several, new name to old ones, in the place of the first of them.

    Its prototype is the mean of their points, weighted by ``images`` (unknown: alike). The new name may be one of the
    old ones. Arguments, result and errors as of :func:`add_classes`.

    Raises:
        ValueError: also, fewer than two classes to merge, a class in two merged ones.
    """
    before = class_names(model, label_names)
    _check_images(images, before)
    groups = {name: sorted(numbers_of(before, _listed(old))) for name, old in merged.items()}
    for name, group in groups.items():
        if len(group) < 2:
            raise ValueError(f"{name!r} is to be merged of {len(group)} classes; give two or more, or rename one")
    numbers_of(before, [before[k] for group in groups.values() for k in group])  # each once
    new = {group[0]: Source(name, tuple(group)) for name, group in groups.items()}
    gone = {k for group in groups.values() for k in group[1:]}
    sources = [new.get(k, Source(name, (k,))) for k, name in enumerate(before) if k not in gone]
    return _apply(model, sources, images, None)


def rename_classes(model: nn.Module, renamed: Mapping[str, str], *, label_names: Sequence[str] | None = None) -> None:
    """Give classes other names, old to new, all at once: names can be exchanged.

    Raises:
        ValueError: no class names, a name that no class has, two classes of one name.
    """
    before = class_names(model, label_names)
    numbers_of(before, renamed)
    names = [renamed.get(name, name) for name in before]
    check_distinct(names)
    set_names(model, names, renamed)


def _apply(
    model: nn.Module, sources: Sequence[Source], images: Sequence[int] | None, means: Means | None
) -> list[int] | None:
    """Change all heads, then names and numbers; the images of each class now."""
    names = [source.name for source in sources]
    check_distinct(names)
    weights = weights_of(sources, images, means)
    for name, head in heads_of(model).items():
        rebuild_(head, sources, weights, None if means is None else means.features[name])
    set_names(model, names)
    return counts_of(sources, images, means)


def _check_images(images: Sequence[int] | None, names: Sequence[str]) -> None:
    if images is not None and (len(images) != len(names) or not all(torch.tensor(images) >= 0)):
        raise ValueError(f"images must be a number >= 0 for each of the {len(names)} classes, got {list(images)[:5]}")


def _listed(names: Iterable[str]) -> list[str]:
    """Names in a list; a name alone is not taken for its letters."""
    return [names] if isinstance(names, str) else list(names)
