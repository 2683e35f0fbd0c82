"""Datasets and loaders: timm's own, with the checks that must come before the first step.

timm's loaders shard and prefetch by themselves and must not go through `Accelerator.prepare`, which would shard
them a second time.
"""
import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, create_loader
from torch.utils.data import Dataset
from torchvision import transforms

from timm_faim.data import OMNIGLOT242, omniglot242_root
from timm_faim.training.errors import RankError, UserError

UNREADABLE = -1  # target of a validation image that could not be read


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

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for i in range(index, index + len(self)):
            i %= len(self)
            image, target = self._read(i)
            if image is not None:
                return self.transform(image), target
            if not self.is_training:
                return self.transform(Image.new(self.images.input_img_mode, (64, 64))), UNREADABLE
        raise RankError(f"none of the {len(self)} images can be read. Check the files in the data folder")

    def _read(self, index: int) -> tuple[Image.Image | None, int]:
        try:
            stream, target = self.images.reader[index]
            with stream:
                return Image.open(stream).convert(self.images.input_img_mode), target
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # PIL's ways to say it
            if not self.skip:
                name = self.images.filename(index, absolute=True)
                reason = "not an image" if isinstance(e, UnidentifiedImageError) else " ".join(str(e).split())
                raise RankError(f"cannot read image {name} ({reason}). Repair or remove the file, or go on without "
                                "such images with --skip-unreadable") from e
            self.unreadable[index] = True
            return None, UNREADABLE


@dataclass
class TrainingData:
    """Both datasets and what is known about their classes."""

    train: Dataset
    val: Dataset
    num_classes: int
    label_names: list[str] | None  # in the order of the class indices


def open_datasets(args: argparse.Namespace, in_chans: int) -> TrainingData:
    """Open the training and validation data and check that they agree with each other and with the options.

    Raises:
        UserError: data that cannot be found, no images, splits that are the same folder or have other classes,
            or more classes than --num-classes.
    """
    train, val = (open_split(args, is_training, in_chans) for is_training in (True, False))
    roots = [Path(_reader(d).root).resolve() for d in (train, val) if getattr(_reader(d), "root", None)]
    # timm reads the whole data folder where it finds no folder of the split's name.
    overlap = len(roots) == 2 and (roots[0].is_relative_to(roots[1]) or roots[1].is_relative_to(roots[0]))
    if overlap and args.train_split != args.val_split:
        raise UserError(f"training would read {roots[0]} and validation {roots[1]}: the same images. Make folders "
                        "train/ and val/ in --data-dir, or name the folders with --train-split and --val-split")

    classes, val_classes = _class_to_idx(train), _class_to_idx(val)
    if classes and val_classes and classes != val_classes:
        differ = sorted(str(name) for name in classes.keys() ^ val_classes.keys()) or ["the order of the classes"]
        raise UserError(f"training and validation data have different classes ({len(classes)} and {len(val_classes)}; "
                        f"in one of them only: {', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}). "
                        "Give both the same class folders, or list the classes in a file with --class-map")
    highest = max(classes.values()) if classes else None
    if args.num_classes is None and highest is None:
        raise UserError(f"the number of classes of --dataset {args.dataset} is not known: give --num-classes")
    if args.num_classes is not None and highest is not None and highest >= args.num_classes:
        raise UserError(f"the data have labels up to {highest}, outside the {args.num_classes} classes of "
                        f"--num-classes {args.num_classes}. Give at least --num-classes {highest + 1}")
    return TrainingData(
        train, val,
        num_classes=highest + 1 if args.num_classes is None else args.num_classes,
        label_names=_label_names(classes, args.num_classes),
    )


def open_split(args: argparse.Namespace, is_training: bool, in_chans: int) -> Dataset:
    """One split as a timm dataset, wrapped in `CheckedImages` where it has files."""
    name, root = args.dataset, args.data_dir
    split = args.train_split if is_training else args.val_split
    try:
        if name == OMNIGLOT242:
            name, root = "", str(omniglot242_root())
        elif "/" not in name and not Path(root or "").exists():
            raise UserError(f"--data-dir {root} does not exist. Give a folder with train/ and val/ in it")
        dataset = create_dataset(
            name, root=root, split=split, is_training=is_training, class_map=args.class_map,
            download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
            input_img_mode=args.input_img_mode or ("L" if in_chans == 1 else "RGB"),
        )
    except (RuntimeError, AssertionError, ValueError, OSError, ImportError) as e:
        raise UserError(f"cannot open the {split} data of {args.dataset or root}: {e or type(e).__name__}") from e
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset, skip=args.skip_unreadable, is_training=is_training)
    return dataset


def build_loaders(
        args: argparse.Namespace, data: TrainingData, data_config: dict[str, Any], accelerator: Accelerator,
) -> tuple[Any, Any]:
    """timm's training and validation loaders for this process.

    Raises:
        UserError: fewer training images than one batch (timm drops incomplete training batches).
    """
    common = _common(args, data_config, accelerator)
    train = create_loader(
        data.train, batch_size=args.batch_size, is_training=True, no_aug=args.no_aug,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, vflip=args.vflip,
        color_jitter=args.color_jitter or None, auto_augment=args.aa,
        re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        distributed=accelerator.num_processes > 1, **common,
    )
    if hasattr(data.train, "__getitem__") and len(train) == 0:
        each = f" for each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
        raise UserError(f"--batch-size {args.batch_size} is larger than the training data "
                        f"({len(data.train)} images{each}). Choose a smaller --batch-size")
    if args.affine:
        fill = [255 * m for m in data_config["mean"]] if args.affine_fill is None else [args.affine_fill]
        train.dataset.transform.transforms.insert(0, random_affine(args.affine, [round(v) for v in fill]))
    val = create_loader(
        data.val, batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"],
        distributed=accelerator.num_processes > 1, **common,
    )
    return train, val


def build_fit_loader(
        args: argparse.Namespace, data_config: dict[str, Any], accelerator: Accelerator,
) -> Any:
    """All training images once, without augmentation, in every process: for closed-form initialisation.

    Not sharded: a sharded loader repeats images at its end to make the processes even, and those would count twice.
    """
    dataset = open_split(args, True, data_config["input_size"][0])
    return create_loader(
        dataset, batch_size=args.validation_batch_size or args.batch_size, is_training=False,
        crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"], **_common(args, data_config, accelerator),
    )


def random_affine(ranges: Sequence[float], fill: Sequence[int]) -> transforms.RandomAffine:
    """`--affine DEG TRANSLATE SCALE SHEAR` as torchvision's transform of a PIL image.

    `fill` is one grey value 0..255 for all channels or one per channel.
    """
    degrees, translate, scale, shear = ranges
    try:
        return transforms.RandomAffine(
            degrees, translate=(translate, translate), scale=(1 - scale, 1 + scale), shear=shear,
            interpolation=transforms.InterpolationMode.BILINEAR, fill=fill[0] if len(fill) == 1 else list(fill),
        )
    except ValueError as e:
        raise UserError(f"--affine {' '.join(map(str, ranges))} does not do: {e}") from e


def set_epoch(loader: Any, epoch: int) -> None:
    """Give the sampler, or an iterable dataset, the epoch: without it every epoch has the same order."""
    for holder in (loader.dataset, loader.sampler):
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)


def count_unreadable(loaders: Sequence[Any], accelerator: Accelerator) -> int:
    """Number of distinct unreadable images that any process has met so far (a collective call)."""
    masks = [loader.dataset.unreadable for loader in loaders if isinstance(loader.dataset, CheckedImages)]
    if not masks:
        return 0
    met = accelerator.reduce(torch.cat(masks).to(accelerator.device, torch.int32), "sum")
    return int((met > 0).sum())


def _common(args: argparse.Namespace, data_config: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return {
        "input_size": data_config["input_size"], "interpolation": data_config["interpolation"],
        "mean": data_config["mean"], "std": data_config["std"], "num_workers": args.workers,
        "pin_memory": accelerator.device.type == "cuda", "device": accelerator.device,
    }


def _reader(dataset: Dataset) -> Any:
    images = dataset.images if isinstance(dataset, CheckedImages) else dataset
    return getattr(images, "reader", images)


def _class_to_idx(dataset: Dataset) -> dict[str, int] | None:
    return getattr(_reader(dataset), "class_to_idx", None) or None


def _label_names(classes: dict[str, int] | None, num_classes: int | None) -> list[str] | None:
    """Names in the order of their indices, where every index of the model has one."""
    count = len(classes or ()) if num_classes is None else num_classes
    if not classes or sorted(classes.values()) != list(range(count)):
        return None
    return [str(name) for name, _ in sorted(classes.items(), key=lambda item: item[1])]
