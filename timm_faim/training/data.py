"""Loaders: timm's own, over the datasets of `datasets.py`.

timm's loaders shard and prefetch by themselves and must not go through `Accelerator.prepare`, which would shard
them a second time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, RandomResizedCropAndInterpolation, create_loader
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from timm_faim.images.checked import CheckedImages, layers_of, reader_of
from timm_faim.images.datasets import TrainingData
from timm_faim.images.splits import DataOptions, open_split, set_targets
from timm_faim.run.errors import UserError
from timm_faim.run.options import SHARE, above, flag, option, real, whole
from timm_faim.training.contrastive import Views
from timm_faim.training.launch import DeviceOptions
from timm_faim.training.sampling import SeededSamples

if TYPE_CHECKING:
    from timm_faim.training.options import Options


@dataclass
class AugmentationOptions:
    """Augmentation."""

    no_aug: bool = flag("resize and crop only (--affine still applies)")
    train_crop_mode: str | None = option(
        "random crop (default: rrc, random resized crop; squash: the same of the image squashed to a square)",
        choices=("rrc", "rkrc", "rkrr", "squash"),
    )
    scale: list[float] = option("share of area kept by crop", [0.08, 1.0], above(0, 1), ("MIN", "MAX"), nargs=2)
    ratio: list[float] = option("aspect ratio of the crop", [3 / 4, 4 / 3], above(0, 100), ("MIN", "MAX"), nargs=2)
    hflip: float = option("horizontal flip", 0.5, SHARE, "P")
    vflip: float = option("vertical flip", 0.0, SHARE, "P")
    color_jitter: float = option("colour jitter; 0 is off", 0.4, real(0, 10), "F")
    color_jitter_prob: float | None = option("probability of colour jitter (default: always)", None, SHARE, "P")
    grayscale_prob: float | None = option("probability of a grey image", None, SHARE, "P")
    gaussian_blur_prob: float | None = option("probability of blur", None, SHARE, "P")
    aa: str | None = option(
        "AutoAugment, RandAugment or AugMix policy, for example rand-m9-mstd0.5", metavar="POLICY", marks="usual"
    )
    affine: list[float] | None = option(
        "random affine map before the crop: rotation up to DEG degrees, shift up to a "
        "share TRANSLATE of the size, scale within 1 -+ SCALE, shear up to SHEAR degrees",
        None,
        real(0, 180),
        ("DEG", "TRANSLATE", "SCALE", "SHEAR"),
        nargs=4,
    )
    affine_fill: int | None = option(
        "grey value 0..255 outside the image (default: the mean)", None, whole(0, 255), "V"
    )
    reprob: float = option("random erasing", 0.0, SHARE, "P")
    remode: str = option("random erasing mode", "pixel", choices=("pixel", "rand", "const"))
    recount: int = option("random erasing count", 1, whole(1, 1000), "N")
    resplit: bool = flag("no random erasing in the first split, or half, of the batch", marks="training")
    aug_repeats: float = option(
        "augmented copies of each image over the processes (several processes only)",
        0,
        real(0, 100),
        "N",
        marks="training",
    )
    aug_splits: int = option(
        "views per image, the first one clean; 0 or at least 2", 0, whole(0, 100), "N", marks="training"
    )
    epoch_repeats: float = option("passes per epoch over hfids/ or tfds/ data", 0.0, real(0, 10_000), "N")


def build_loaders(
    options: "Options", data: TrainingData, data_config: dict[str, Any], accelerator: Accelerator
) -> tuple[Any, Any]:
    """timm's training and validation loaders for this process; None without such data.

    A training dataset that can be read by number is wrapped in `SeededSamples`, the outermost layer.

    Raises:
        UserError: fewer training images than one batch (timm drops incomplete training batches), fewer shards than
            processes, or repeated augmentation with one process.
    """
    processes, augmentation = accelerator.num_processes, options.augmentation
    if data.train is None:
        return None, build_clean_loader(options, data.val, data_config, accelerator)
    if augmentation.aug_repeats and processes == 1:
        raise UserError(
            "--aug-repeats gives the copies of an image to different processes, and there is one. Start "
            "several with accelerate launch --num_processes, or leave --aug-repeats out"
        )
    dataset = data.train
    if not isinstance(dataset, IterableDataset):
        if augmentation.aug_splits:
            dataset = AugMixDataset(dataset, num_splits=augmentation.aug_splits)
        dataset = SeededSamples(dataset)
    interpolation = data_config["interpolation"] if augmentation.no_aug else options.input.train_interpolation
    train = _create_loader(
        dataset,
        batch_size=options.run.batch_size,
        is_training=True,
        no_aug=augmentation.no_aug,
        train_crop_mode=None if augmentation.train_crop_mode == "squash" else augmentation.train_crop_mode,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter or None,
        color_jitter_prob=augmentation.color_jitter_prob,
        grayscale_prob=augmentation.grayscale_prob or 0.0,
        gaussian_blur_prob=augmentation.gaussian_blur_prob or 0.0,
        auto_augment=augmentation.aa,
        re_prob=augmentation.reprob,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        re_split=augmentation.resplit,
        num_aug_repeats=augmentation.aug_repeats,
        num_aug_splits=augmentation.aug_splits,
        interpolation=interpolation or data_config["interpolation"],
        num_workers=_workers(options.data, data.train, processes),
        distributed=processes > 1,
        **_common(options.device, data_config, accelerator),
    )
    if len(train) == 0:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--batch-size {options.run.batch_size} is larger than the training data "
            f"({len(data.train)} images{each}). Choose a smaller --batch-size"
        )
    if augmentation.train_crop_mode == "squash":
        steps = train.dataset.transform.transforms
        steps[0] = _squashed(steps[0], data_config["input_size"][1:])
    if augmentation.affine:
        grey = augmentation.affine_fill
        fill = [255 * m for m in data_config["mean"]] if grey is None else [grey]
        train.dataset.transform.transforms.insert(0, random_affine(augmentation.affine, [round(v) for v in fill]))
    if options.contrastive.views > 1:
        train.dataset.transform = Views(train.dataset.transform, options.contrastive.views)
    if data.val is None:
        return train, None
    return train, build_clean_loader(options, data.val, data_config, accelerator)


class SquashedCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop as of the image squashed to a square: `ratio` is relative to that of its sides."""

    def get_params(self, img: Any, scale: Sequence[float], ratio: Sequence[float]) -> Any:
        """Top, left, height and width of a crop."""
        width, height = img.size
        return super().get_params(img, scale, [r * width / height for r in ratio])


def _squashed(first: Any, size: Sequence[int]) -> Any:
    """The first of timm's training transforms, a random resized crop or under --no-aug a resize, of squashed images."""
    if isinstance(first, RandomResizedCropAndInterpolation):
        crop = SquashedCrop(first.size, first.scale, first.ratio)
        crop.interpolation = first.interpolation
        return crop
    return transforms.Resize(list(size), first.interpolation)


def build_fit_loader(
    options: "Options", data_config: dict[str, Any], accelerator: Accelerator, num_classes: int
) -> Any:
    """All training images once, without augmentation, in every process: for closed-form initialisation.

    Not sharded: a sharded loader repeats images at its end to make the processes even, and those would count twice.

    Raises:
        UserError: a stream with several processes, which timm's readers shard.
    """
    dataset = open_split(options.data, options.run, True, data_config["input_size"][0], in_order=True)
    set_targets(options.data, dataset, num_classes)
    if isinstance(dataset, IterableDataset) and accelerator.num_processes > 1:
        raise UserError(
            f"--head-init data reads all images in every process, and --dataset {options.data.dataset} is "
            "shared out. Leave --head-init out, or train with one process"
        )
    return _in_order(options, dataset, data_config, accelerator, distributed=False)


def build_clean_loader(
    options: "Options", dataset: Dataset, data_config: dict[str, Any], accelerator: Accelerator
) -> Any:
    """All images of a data set once, without augmentation, shared out over the processes (timm's loader repeats some at
    the end to make the processes even; `evaluation_sample_limit` tells how many count)."""
    return _in_order(options, dataset, data_config, accelerator, distributed=accelerator.num_processes > 1)


class _OwnSession:
    """Start of a loader worker, in a session of its own.

    A signal to the group of processes (SIGTERM of a machine that is taken back, Ctrl-C) then reaches the training
    alone, which still needs its workers to get to the next update.
    """

    def __init__(self, start: Any) -> None:
        self.start = start

    def __call__(self, worker: int) -> None:
        if hasattr(os, "setsid"):
            os.setsid()
        self.start(worker)


def _create_loader(dataset: Dataset, **options: Any) -> Any:
    try:
        loader = create_loader(dataset, **options)
    except (AssertionError, LookupError, ValueError, TypeError) as e:
        raise UserError(
            f"timm cannot make the image transforms: {type(e).__name__} {' '.join(str(e).split())}. Check "
            "--aa, --interpolation, --train-interpolation, --scale, --ratio and --crop-pct"
        ) from e
    loader.loader.worker_init_fn = _OwnSession(loader.loader.worker_init_fn)
    return loader


def random_affine(ranges: Sequence[float], fill: Sequence[int]) -> transforms.RandomAffine:
    """`--affine DEG TRANSLATE SCALE SHEAR` as torchvision's transform of a PIL image.

    `fill` is one grey value 0..255 for all channels or one per channel.
    """
    degrees, translate, scale, shear = ranges
    try:
        return transforms.RandomAffine(
            degrees,
            translate=(translate, translate),
            scale=(1 - scale, 1 + scale),
            shear=shear,
            interpolation=transforms.InterpolationMode.BILINEAR,
            fill=fill[0] if len(fill) == 1 else list(fill),
        )
    except ValueError as e:
        raise UserError(f"--affine {' '.join(map(str, ranges))} does not do: {e}") from e


def count_unreadable(loaders: Sequence[Any], accelerator: Accelerator) -> int:
    """Number of distinct unreadable images that any process has met so far (a collective call)."""
    masks = [
        layer.unreadable
        for loader in loaders
        if loader is not None
        for layer in layers_of(loader.dataset)
        if isinstance(layer, CheckedImages)
    ]
    if not masks:
        return 0
    met = accelerator.reduce(torch.cat(masks).to(accelerator.device, torch.int32), "sum")
    return int((met > 0).sum())


def _in_order(
    options: "Options", dataset: Dataset, data_config: dict[str, Any], accelerator: Accelerator, distributed: bool
) -> Any:
    """A loader without augmentation."""
    workers = _workers(options.data, dataset, accelerator.num_processes if distributed else 1)
    if distributed and options.data.kind in ("wds", "tfds"):
        workers = min(2, workers)  # as timm: these readers round the share of every worker, the fewer the better
    return _create_loader(
        dataset,
        batch_size=options.run.validation_batch_size or options.run.batch_size,
        is_training=False,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        interpolation=data_config["interpolation"],
        num_workers=workers,
        distributed=distributed,
        **_common(options.device, data_config, accelerator),
    )


def _workers(options: DataOptions, dataset: Dataset, processes: int) -> int:
    """Loader workers: --workers, but no more than a wds/ data set has shards, as one without a shard has no images."""
    if options.kind != "wds":
        return options.workers
    names = reader_of(dataset).split_info.filenames
    if len(names) < processes:
        raise UserError(
            f"{processes} processes share the shards of --dataset {options.dataset}, and there are "
            f"{len(names)}: {', '.join(names)}. Split these data into more shards or start fewer processes"
        )
    return min(options.workers, len(names) // processes)


def _common(options: DeviceOptions, data_config: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "pin_memory": accelerator.device.type == "cuda",
        "device": accelerator.device,
        "img_dtype": getattr(torch, options.model_dtype or "float32"),
    }
