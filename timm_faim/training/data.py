"""Loaders: timm's own, over the datasets of `datasets.py`.

timm's loaders shard and prefetch by themselves and must not go through `Accelerator.prepare`, which would shard
them a second time.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import AugMixDataset, create_loader
from torch.utils.data import Dataset, IterableDataset
from torchvision import transforms

from timm_faim.images.datasets import (
    CheckedImages,
    TrainingData,
    dataset_type,
    layers_of,
    open_split,
    reader_of,
    set_targets,
)
from timm_faim.run.errors import UserError
from timm_faim.training.contrastive import Views
from timm_faim.training.sampling import SeededSamples


def build_loaders(
    args: argparse.Namespace, data: TrainingData, data_config: dict[str, Any], accelerator: Accelerator
) -> tuple[Any, Any]:
    """timm's training and validation loaders for this process; None without such data.

    A training dataset that can be read by number is wrapped in `SeededSamples`, the outermost layer.

    Raises:
        UserError: fewer training images than one batch (timm drops incomplete training batches), fewer shards than
            processes, or repeated augmentation with one process.
    """
    processes = accelerator.num_processes
    if data.train is None:
        return None, _in_order(args, data.val, data_config, accelerator, distributed=processes > 1)
    if args.aug_repeats and processes == 1:
        raise UserError(
            "--aug-repeats gives the copies of an image to different processes, and there is one. Start "
            "several with accelerate launch --num_processes, or leave --aug-repeats out"
        )
    dataset = data.train
    if not isinstance(dataset, IterableDataset):
        if args.aug_splits:
            dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
        dataset = SeededSamples(dataset)
    interpolation = data_config["interpolation"] if args.no_aug else args.train_interpolation
    train = _create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter or None,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=interpolation or data_config["interpolation"],
        num_workers=_workers(args, data.train, processes),
        distributed=processes > 1,
        **_common(args, data_config, accelerator),
    )
    if len(train) == 0:
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--batch-size {args.batch_size} is larger than the training data "
            f"({len(data.train)} images{each}). Choose a smaller --batch-size"
        )
    if args.affine:
        fill = [255 * m for m in data_config["mean"]] if args.affine_fill is None else [args.affine_fill]
        train.dataset.transform.transforms.insert(0, random_affine(args.affine, [round(v) for v in fill]))
    if args.views > 1:
        train.dataset.transform = Views(train.dataset.transform, args.views)
    if data.val is None:
        return train, None
    return train, _in_order(args, data.val, data_config, accelerator, distributed=processes > 1)


def build_fit_loader(
    args: argparse.Namespace, data_config: dict[str, Any], accelerator: Accelerator, num_classes: int
) -> Any:
    """All training images once, without augmentation, in every process: for closed-form initialisation.

    Not sharded: a sharded loader repeats images at its end to make the processes even, and those would count twice.

    Raises:
        UserError: a stream with several processes, which timm's readers shard.
    """
    dataset = open_split(args, True, data_config["input_size"][0], in_order=True)
    set_targets(args, dataset, num_classes)
    if isinstance(dataset, IterableDataset) and accelerator.num_processes > 1:
        raise UserError(
            f"--head-init data reads all images in every process, and --dataset {args.dataset} is shared "
            "out. Leave --head-init out, or train with one process"
        )
    return _in_order(args, dataset, data_config, accelerator, distributed=False)


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
    args: argparse.Namespace, dataset: Dataset, data_config: dict[str, Any], accelerator: Accelerator, distributed: bool
) -> Any:
    """A loader without augmentation."""
    workers = _workers(args, dataset, accelerator.num_processes if distributed else 1)
    if distributed and dataset_type(args.dataset) in ("wds", "tfds"):
        workers = min(2, workers)  # as timm: these readers round the share of every worker, the fewer the better
    return _create_loader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        interpolation=data_config["interpolation"],
        num_workers=workers,
        distributed=distributed,
        **_common(args, data_config, accelerator),
    )


def _workers(args: argparse.Namespace, dataset: Dataset, processes: int) -> int:
    """Loader workers: --workers, but no more than a wds/ data set has shards, as one without a shard has no images."""
    if dataset_type(args.dataset) != "wds":
        return args.workers
    names = reader_of(dataset).split_info.filenames
    if len(names) < processes:
        raise UserError(
            f"{processes} processes share the shards of --dataset {args.dataset}, and there are "
            f"{len(names)}: {', '.join(names)}. Split these data into more shards or start fewer processes"
        )
    return min(args.workers, len(names) // processes)


def _common(args: argparse.Namespace, data_config: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "pin_memory": accelerator.device.type == "cuda",
        "device": accelerator.device,
        "img_dtype": getattr(torch, args.model_dtype or "float32"),
    }
