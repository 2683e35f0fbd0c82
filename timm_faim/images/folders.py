"""Image folders and tar files as timm reads them, in one total order, with what is no class left out or refused.

timm sorts class names from a `set` by a key under which `1` and `01`, or `acer` and `Acer`, are equal: their order then
depends on the hash seed of the process. Here ties are broken by the plain name.
"""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import numpy as np
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key

from timm_faim.run.errors import UserError, few

HIDDEN = (".", "__MACOSX", "__pycache__")  # beginnings of names that no person gives a class or an image


def total_order(name: str) -> tuple[list, str]:
    """Key of timm's natural order, and the name itself where that leaves two names equal."""
    return natural_key(name), name


def put_in_order(reader: Any, has_class_map: bool) -> None:
    """Give timm's reader of a folder or of tar files one order of classes and images, without hidden ones, in place.

    Args:
        reader: of any kind; others than these two have orders of their own.
        has_class_map: the classes come from a file and stay as they are.

    Raises:
        UserError: nothing but hidden images.
    """
    is_tar = isinstance(reader, ReaderImageInTar)
    if not is_tar and not isinstance(reader, ReaderImageFolder):
        return
    paths = [sample[0].path if is_tar else sample[0] for sample in reader.samples]
    order = sorted(
        (i for i, place in enumerate(_places(reader)) if not _is_hidden(place)), key=lambda i: total_order(paths[i])
    )
    if not order:
        raise UserError(f"{reader.root} holds hidden images only. Give it one folder of images per class")
    targets = [int(reader.targets[i] if is_tar else reader.samples[i][1]) for i in order]
    classes = reader.class_name_to_idx if is_tar else reader.class_to_idx
    if not has_class_map:
        numbers = _renumbered(classes, targets)
        targets = [numbers[k] for k in targets]
        classes = {name: numbers[k] for name, k in classes.items() if k in numbers}
    if is_tar:
        reader.samples, reader.targets, reader.class_name_to_idx = reader.samples[order], np.array(targets), classes
        reader.class_idx_to_name = {k: name for name, k in classes.items()}
    else:
        reader.samples, reader.class_to_idx = [(paths[i], k) for i, k in zip(order, targets, strict=True)], classes


def check_no_strays(reader: Any, split: str) -> None:
    """Refuse images that lie beside the class folders: timm makes them a class without a name.

    Raises:
        UserError: names one of them.
    """
    stray = [place for place in _places(reader) if len(place.parts) == 1]
    if stray:
        all_of_them = "" if len(stray) < len(reader.samples) else ", and there are no class folders"
        raise UserError(
            f"{len(stray)} images of the {split} data lie directly in {reader.root} "
            f"({stray[0]}){all_of_them}. Put each class into a folder of its own"
        )


def check_one_level(reader: Any, split: str, allow_distinct: bool = False) -> None:
    """Refuse folders within class folders: timm names a class by its innermost folder alone, so that `dog/young` and
    `cat/young` are one class.

    Args:
        reader: timm's.
        split: what the data are called.
        allow_distinct: deeper folders are fine as long as no two have the same name; in tar files they always are,
            which often hold one folder around all others.

    Raises:
        UserError: names the folders.
    """
    folders = {place.parent for place in _places(reader)}
    counts = Counter(folder.name for folder in folders)
    shared = sorted(str(folder) for folder in folders if counts[folder.name] > 1)
    nested = sorted(str(folder) for folder in folders if len(folder.parts) > 1)
    if shared:
        raise UserError(
            f"the {split} data in {reader.root} have folders of the same name in different places "
            f"({few(shared)}), and the innermost folder is the class: they would be one. Give each class "
            "one folder of its own name"
        )
    if nested and not allow_distinct and isinstance(reader, ReaderImageFolder):
        raise UserError(
            f"the {split} data in {reader.root} have folders within folders ({few(nested)}); the "
            "innermost would be the class. Make one folder a class, or list the innermost ones with "
            "--class-map"
        )


def _renumbered(classes: dict[str, int], used: Iterable[int]) -> dict[int, int]:
    """New class numbers by the old ones, of the classes in use."""
    used = set(used)
    names = sorted((name for name, k in classes.items() if k in used), key=total_order)
    return {classes[name]: number for number, name in enumerate(names)}


def _places(reader: Any) -> list[PurePath]:
    """Where each image lies below the folder or in the tar file; the name of a tar file in that one stands for the
    folder of the images right in it. Nothing for readers of other kinds."""
    if isinstance(reader, ReaderImageFolder):
        return [PurePath(os.path.relpath(path, reader.root)) for path, _ in reader.samples]
    places = []
    for image, _, inner in reader.samples if isinstance(reader, ReaderImageInTar) else ():
        is_named_by_tar = inner is not None and "/" not in image.path  # of ./x.png timm makes the class "."
        places.append(PurePath(PurePath(inner.name).stem if is_named_by_tar else "", image.path))
    return places


def _is_hidden(place: PurePath) -> bool:
    return any(part.startswith(HIDDEN) for part in place.parts)


def check_same_classes(names: list[str] | None, others: list[str] | None, whose: str) -> None:
    """Refuse another list of classes than this one, in another order too.

    Args:
        names: of this process, in the order of their numbers; None where the data name none.
        others: those to compare with.
        whose: whose they are.

    Raises:
        UserError: shows both from the first difference on.
    """
    if names is None or others is None or names == others:
        return
    differing = (i for i, pair in enumerate(zip(names, others, strict=False)) if pair[0] != pair[1])
    first = next(differing, min(len(names), len(others)))
    raise UserError(
        f"class {first} is {_from(names, first)} here and {_from(others, first)} in {whose} ({len(names)} "
        f"and {len(others)} classes): the same number would mean different classes. Give both the same "
        "class folders, or the order in a file with --class-map"
    )


def _from(names: list[str], first: int) -> str:
    return few([repr(name) for name in names[first:]]) or "not there"
