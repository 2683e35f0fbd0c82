"""Datasets: opened by timm, with the checks that must come before the first step."""

import argparse
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, MultiLabelTarget, add_img_extensions, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from timm_faim.data import OMNIGLOT242, omniglot242_root
from timm_faim.images.folders import HIDDEN, check_no_strays, check_one_level, check_same_classes, put_in_order
from timm_faim.images.pixels import InMode, read_image
from timm_faim.run.errors import RankError, UserError, did_you_mean, few

add_img_extensions((".webp", ".bmp", ".tif", ".tiff"))  # timm looks for PNG and JPEG only

UNREADABLE = -1  # target of a validation image that could not be read; with several labels every entry

# Types of --dataset, and the package that each needs beside timm.
PACKAGES = {"torch": None, "hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
FOLDER_NAMES = ("", "folder", "imagefolder", "image_folder")  # names without a slash that timm reads as a folder


def dataset_type(name: str) -> str:
    """What stands before the slash in --dataset: hfds, wds, torch and so on; empty for an image folder."""
    prefix, slash, _ = name.partition("/")
    return prefix.lower() if slash else ""


class CheckedImages(Dataset):
    """timm's `ImageDataset` without its silent replacement of unreadable images by their neighbours.

    An unreadable image is a `RankError` that names the file. With `skip` it is recorded in `unreadable`, a mask
    [N] in memory shared with the loader's workers. In training the next readable image takes its place (batches
    keep their size); in validation it comes out as a blank image with target `UNREADABLE`, to be left out.
    """

    def __init__(self, images: ImageDataset, *, skip: bool, is_training: bool) -> None:
        self.images = images
        self.skip = skip
        self.is_training = is_training
        self.unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    @property
    def transform(self) -> Any:
        """The image transform; `create_loader` sets it."""
        return self.images.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.images.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        encode = self.images.target_transform
        for i in range(index, index + len(self)):
            i %= len(self)
            image, target = self._read(i)
            if image is not None:
                return self.transform(image), target if encode is None else encode(target)
            if not self.is_training:
                blank = Image.new(self.images.input_img_mode, (64, 64))
                return self.transform(blank), UNREADABLE if encode is None else torch.full_like(encode([]), UNREADABLE)
        raise RankError(f"none of the {len(self)} images can be read. Check the files in the data folder")

    def _read(self, index: int) -> tuple[Image.Image | None, Any]:
        try:
            reader = self.images.reader
            if isinstance(reader, ReaderImageFolder) and not stat.S_ISREG(os.stat(reader.samples[index][0]).st_mode):
                raise OSError("no regular file")  # opening a pipe would wait for a writer
            stream, target = reader[index]
            with stream:
                return read_image(stream, self.images.input_img_mode), target
        except MemoryError:
            raise
        except Exception as e:  # Pillow's decoders raise TypeError, struct.error, ... on damaged files
            if not self.skip:
                reason = "not an image" if isinstance(e, UnidentifiedImageError) else " ".join(str(e).split())
                reason = reason or type(e).__name__
                raise RankError(
                    f"cannot read image {self._name(index)} ({reason}). Repair or remove the file, or go "
                    "on without such images with --skip-unreadable"
                ) from e
            self.unreadable[index] = True
            return None, UNREADABLE

    def _name(self, index: int) -> str:
        name = self.images.filename(index, absolute=True)  # inside of the archive for tar files, None for bare bytes
        if not name or isinstance(self.images.reader, ReaderImageFolder):
            return name or f"number {index}"
        return str(Path(getattr(self.images.reader, "root", None) or "", name))


@dataclass
class TrainingData:
    """Both datasets and what is known about their classes; `val` is None without validation."""

    train: Dataset
    val: Dataset | None
    num_classes: int
    label_names: list[str] | None  # in the order of the class indices, where every class of the model has one
    class_order: list[str] | None  # those of the data, in the same order; with --num-classes there may be fewer


def open_datasets(args: argparse.Namespace, in_chans: int) -> TrainingData:
    """Open the training data, unless under --eval-only, and the validation data, and check them against each other
    and against the options.

    Raises:
        UserError: data that cannot be found, no images, classes without images, splits that are the same data or have
            other classes, or more classes than --num-classes.
    """
    train = None if args.eval_only else open_split(args, True, in_chans)
    val = open_split(args, False, in_chans) if args.val_split else None
    splits = [
        (reader_of(dataset), split)
        for dataset, split in ((train, args.train_split), (val, args.val_split))
        if dataset is not None
    ]
    for reader, split in splits:
        check_no_strays(reader, split)
    if train is not None and val is not None:
        _check_splits_differ(args, train, val)
    for reader, split in splits:
        check_one_level(reader, split, allow_distinct=bool(args.class_map))
    for dataset in (train, val):
        _check_no_empty_class(args, dataset)

    classes, val_classes = _class_to_idx(train or val), _class_to_idx(val)
    if classes and val_classes and classes != val_classes:
        differ = sorted(str(name) for name in classes.keys() ^ val_classes.keys()) or ["the order of the classes"]
        raise UserError(
            f"training and validation data have different classes ({len(classes)} and {len(val_classes)}; "
            f"in one of them only: {few(differ)}). "
            "Give both the same class folders, or list the classes in a file with --class-map"
        )
    highest = max(classes.values()) if classes else None
    if args.num_classes is None and highest is None:
        raise UserError(f"the number of classes of --dataset {args.dataset} is not known: give --num-classes")
    if args.num_classes is not None and highest is not None and highest >= args.num_classes:
        raise UserError(
            f"the data have labels up to {highest}, outside the {args.num_classes} classes of "
            f"--num-classes {args.num_classes}. Give at least --num-classes {highest + 1}"
        )
    num_classes = highest + 1 if args.num_classes is None else args.num_classes
    for dataset in filter(None, (train, val)):
        set_targets(args, dataset, num_classes)
    names = _label_names(classes, args.num_classes)
    order = None if classes is None else [str(name) for name in sorted(classes, key=classes.get)]
    for process, others in enumerate(gather_object([order])):  # a collective call; the list alone without others
        check_same_classes(order, others, f"process {process}")
    return TrainingData(train, val, num_classes, names, order)


def set_targets(args: argparse.Namespace, dataset: Dataset, num_classes: int) -> None:
    """With --multi-label, make the dataset's targets dense [C]."""
    if args.multi_label:
        images = dataset.images if isinstance(dataset, CheckedImages) else dataset
        images.target_transform = MultiLabelTarget(num_classes, dense=args.target_format == "multihot")


def open_split(args: argparse.Namespace, is_training: bool, in_chans: int, in_order: bool = False) -> Dataset:
    """One split as a timm dataset, wrapped in `CheckedImages` where images can be read by their number.

    Args:
        args: the options.
        is_training: the training split instead of the validation split.
        in_chans: channels of the model's input.
        in_order: a streamed training split comes once and in order, instead of shuffled and for ever.

    Raises:
        UserError: unknown type, missing package, or whatever timm says about the data.
    """
    name, root = args.dataset, args.data_dir
    split = args.train_split if is_training else args.val_split
    _check_name(args)
    mode = args.input_img_mode or ("L" if in_chans == 1 else "RGB")
    as_stored = dataset_type(args.dataset) in ("hfids", "wds")  # these readers would convert, with clipping
    from_fields = {
        key: value
        for key, value in (
            ("input_key", args.input_key),
            ("target_key", args.target_key),
            ("target_format", args.target_format if args.multi_label else None),
        )
        if value is not None
    }
    try:
        if name == OMNIGLOT242:
            name, root = "", str(omniglot242_root())
        elif dataset_type(args.dataset) == "" and not Path(root or "").exists():
            raise UserError(f"--data-dir {root} does not exist. Give a folder with train/ and val/ in it")
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training and not in_order,
            class_map=args.class_map,
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            repeats=args.epoch_repeats,
            input_img_mode="" if as_stored else mode,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
            **from_fields,
        )
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, OSError, ImportError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"cannot open the {split} data of {args.dataset or root}: {reason}") from e
    put_in_order(getattr(dataset, "reader", None), bool(args.class_map))
    if dataset_type(args.dataset) == "hfds":
        _check_fields(args, dataset.reader)
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset, skip=args.skip_unreadable, is_training=is_training)
    if as_stored:
        dataset.reader = InMode(dataset.reader, mode)
    return dataset


def reader_of(dataset: Dataset) -> Any:
    """timm's reader of a dataset; the dataset itself for torchvision's."""
    images = dataset.images if isinstance(dataset, CheckedImages) else dataset
    return getattr(images, "reader", images)


def layers_of(dataset: Any) -> Iterator[Any]:
    """A dataset and those that it wraps, from the outside in."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)


def _check_name(args: argparse.Namespace) -> None:
    name, kind = args.dataset, dataset_type(args.dataset)
    if kind == "" and name.lower() not in (*FOLDER_NAMES, OMNIGLOT242):
        near = did_you_mean(name, [OMNIGLOT242]) or f" For one of torchvision's: torch/{name}"
        raise UserError(f"unknown --dataset {name}.{near}. Leave it out for an image folder")
    if name.lower() in {f"torch/{folder}" for folder in FOLDER_NAMES}:
        raise UserError(f"--dataset {name}: image folders are read by timm. Leave --dataset out")
    if kind and kind not in PACKAGES:
        raise UserError(
            f"unknown type of --dataset {name}.{did_you_mean(kind, PACKAGES)} Types are "
            f"{'/, '.join(PACKAGES)}/ and, without --dataset, an image folder"
        )
    package = PACKAGES.get(kind)
    if package and find_spec(package) is None:
        also = " tensorflow" if kind == "tfds" else ""
        raise UserError(f"--dataset {name} needs the package {package}: pip install {package.replace('_', '-')}{also}")
    if kind in ("torch", "wds", "tfds") and not args.data_dir:
        raise UserError(f"--dataset {name} needs --data-dir, the folder where the data are or are to be kept")


def _check_fields(args: argparse.Namespace, reader: Any) -> None:
    """Read the first sample: timm takes a field that is not there for an empty one."""
    try:
        reader[0][0].close()
    except (LookupError, TypeError) as e:
        fields = ", ".join(name for name in reader.dataset.column_names if name != args.input_key)
        raise UserError(
            f"--dataset {args.dataset}: no image in field {reader.image_key} or no label in field "
            f"{reader.label_key}. Choose from {fields} with --input-key and --target-key"
        ) from e


def _check_splits_differ(args: argparse.Namespace, train: Dataset, val: Dataset) -> None:
    """timm reads the whole data folder where it finds no folder of the split's name."""
    readers = reader_of(train), reader_of(val)
    if not all(isinstance(reader, (ReaderImageFolder, ReaderImageInTar)) for reader in readers):
        return
    roots = [Path(reader.root).resolve() for reader in readers]
    overlap = roots[0].is_relative_to(roots[1]) or roots[1].is_relative_to(roots[0])
    if overlap and args.train_split != args.val_split:
        raise UserError(
            f"training would read {roots[0]} and validation {roots[1]}: the same images. Make folders "
            "train/ and val/ in --data-dir, or name the folders with --train-split and --val-split"
        )


def _check_no_empty_class(args: argparse.Namespace, dataset: Dataset | None) -> None:
    """timm leaves a class folder without images out, and numbers the classes without it."""
    reader = reader_of(dataset)
    if isinstance(reader, ReaderImageFolder):
        used = {os.path.dirname(path) for path, _ in reader.samples}
        empty = []
        for folder, children, _ in os.walk(reader.root, followlinks=True):
            children[:] = [name for name in children if not name.startswith(HIDDEN)]
            listed = not args.class_map or os.path.basename(folder) in reader.class_to_idx
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
