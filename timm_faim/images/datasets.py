"""Datasets: opened by timm, with the checks that must come before the first step."""

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import gather_object
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from timm_faim.images.checked import reader_of
from timm_faim.images.folders import HIDDEN, check_no_strays, check_one_level, check_same_classes
from timm_faim.images.splits import DataOptions, open_split, set_targets
from timm_faim.run.common import RunOptions
from timm_faim.run.errors import UserError, few


@dataclass
class TrainingData:
    """Both datasets and what is known about their classes; `val` is None without validation."""

    train: Dataset
    val: Dataset | None
    num_classes: int
    label_names: list[str] | None  # in the order of the class indices, where every class of the model has one
    class_order: list[str] | None  # those of the data, in the same order; with --num-classes there may be fewer


def open_datasets(
    options: DataOptions, run: RunOptions, in_chans: int, num_classes: int | None = None, repeats: float = 0.0
) -> TrainingData:
    """Open the training data, unless under --eval-only, and the validation data, and check them against each other
    and against the options.

    Args:
        options: what to open.
        run: batch size and seed, for streams, and --eval-only.
        in_chans: channels of the model's input.
        num_classes: of the model, where that is not the number of classes of the data.
        repeats: passes per epoch of a stream.

    Raises:
        UserError: data that cannot be found, no images, classes without images, splits that are the same data or have
            other classes, or more classes than --num-classes.
    """
    train = None if run.eval_only else open_split(options, run, True, in_chans, repeats=repeats)
    val = open_split(options, run, False, in_chans, repeats=repeats) if options.val_split else None
    splits = [
        (reader_of(dataset), split)
        for dataset, split in ((train, options.train_split), (val, options.val_split))
        if dataset is not None
    ]
    for reader, split in splits:
        check_no_strays(reader, split)
    if train is not None and val is not None:
        _check_splits_differ(options, train, val)
    for reader, split in splits:
        check_one_level(reader, split, allow_distinct=bool(options.class_map))
    for dataset in (train, val):
        _check_no_empty_class(options, dataset)

    classes, val_classes = _class_to_idx(train or val), _class_to_idx(val)
    if classes and val_classes and classes != val_classes:
        differ = sorted(str(name) for name in classes.keys() ^ val_classes.keys()) or ["the order of the classes"]
        raise UserError(
            f"training and validation data have different classes ({len(classes)} and {len(val_classes)}; "
            f"in one of them only: {few(differ)}). "
            "Give both the same class folders, or list the classes in a file with --class-map"
        )
    highest = max(classes.values()) if classes else None
    if num_classes is None and highest is None:
        raise UserError(f"the number of classes of --dataset {options.dataset} is not known: give --num-classes")
    if num_classes is not None and highest is not None and highest >= num_classes:
        raise UserError(
            f"the data have labels up to {highest}, outside the {num_classes} classes of "
            f"--num-classes {num_classes}. Give at least --num-classes {highest + 1}"
        )
    names = _label_names(classes, num_classes)
    num_classes = highest + 1 if num_classes is None else num_classes
    for dataset in filter(None, (train, val)):
        set_targets(options, dataset, num_classes)
    order = None if classes is None else [str(name) for name in sorted(classes, key=classes.get)]
    for process, others in enumerate(gather_object([order])):  # a collective call; the list alone without others
        check_same_classes(order, others, f"process {process}")
    return TrainingData(train, val, num_classes, names, order)


def _check_splits_differ(options: DataOptions, train: Dataset, val: Dataset) -> None:
    """timm reads the whole data folder where it finds no folder of the split's name."""
    readers = reader_of(train), reader_of(val)
    if not all(isinstance(reader, (ReaderImageFolder, ReaderImageInTar)) for reader in readers):
        return
    roots = [Path(reader.root).resolve() for reader in readers]
    overlap = roots[0].is_relative_to(roots[1]) or roots[1].is_relative_to(roots[0])
    if overlap and options.train_split != options.val_split:
        raise UserError(
            f"training would read {roots[0]} and validation {roots[1]}: the same images. Make folders "
            "train/ and val/ in --data-dir, or name the folders with --train-split and --val-split"
        )


def _check_no_empty_class(options: DataOptions, dataset: Dataset | None) -> None:
    """timm leaves a class folder without images out, and numbers the classes without it."""
    reader = reader_of(dataset)
    if isinstance(reader, ReaderImageFolder):
        used = {os.path.dirname(path) for path, _ in reader.samples}
        empty = []
        for folder, children, _ in os.walk(reader.root, followlinks=True):
            children[:] = [name for name in children if not name.startswith(HIDDEN)]
            listed = not options.class_map or os.path.basename(folder) in reader.class_to_idx
            if not children and folder not in used and folder != reader.root and listed:
                empty.append(os.path.relpath(folder, reader.root))
        if empty:
            raise UserError(
                f"{len(empty)} class folders of {reader.root} hold no images: {few(sorted(empty))}. Fill or remove them"
            )
    if getattr(dataset, "is_training", False) and isinstance(reader, (ReaderImageFolder, ReaderImageInTar)):
        targets = set(targets_of(dataset))
        without = [str(name) for name, index in _class_to_idx(dataset).items() if index not in targets]
        if without:
            raise UserError(
                f"{len(without)} classes have no training image: {few(without)}. "
                "Take them out of --class-map or add images"
            )


def targets_of(dataset: Dataset | None) -> list[int] | None:
    """The class of each image, as far as the data tell it without being read one by one."""
    reader = reader_of(dataset)
    if isinstance(reader, ReaderImageFolder):
        return [int(target) for _, target in reader.samples]
    column = getattr(reader, "label_key", None)
    targets = reader.dataset[column] if column and hasattr(reader, "dataset") else getattr(reader, "targets", None)
    try:
        return None if targets is None else [int(target) for target in targets]
    except (TypeError, ValueError):  # lists or names
        return None


def _class_to_idx(dataset: Dataset | None) -> dict[str, int] | None:
    reader = reader_of(dataset)
    return getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or None


def _label_names(classes: dict[str, int] | None, num_classes: int | None) -> list[str] | None:
    """Names in the order of their indices, where every index of the model has one."""
    count = len(classes or ()) if num_classes is None else num_classes
    if not classes or sorted(classes.values()) != list(range(count)):
        return None
    return [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])]
