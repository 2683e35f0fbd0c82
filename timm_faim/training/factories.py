"""Model, loss, mixing, optimiser and schedule, all made by timm's factories from the options."""
import argparse
import os
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.loss import create_classification_loss
from timm.models import load_checkpoint, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_faim import TargetMargin, faim_heads, fit_heads
from timm_faim.training.errors import UserError, did_you_mean

# timm's rule: optimisers with per-parameter step sizes scale their rate with the root of the batch.
ADAPTIVE = ("ada", "lamb")


def share_out_cores(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """On the CPU, give each process its share of the cores.

    `accelerate launch` sets one thread a process unless told otherwise; a number that a person chose stands.
    """
    if accelerator.device.type != "cpu":
        return
    chosen = args.cpu_threads
    if chosen is None and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        chosen = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    if chosen is not None:
        torch.set_num_threads(chosen)


def check_model_name(name: str) -> None:
    """Raise `UserError` with the nearest names when timm knows no such model."""
    if ":" in name or timm.is_model(name.split(".")[0]):
        return
    raise UserError(f"unknown model {name!r}.{did_you_mean(name.split('.')[0], timm.list_models())}"
                    " timm.list_models('faim_*') lists them all")


def input_channels(args: argparse.Namespace) -> int:
    """Number of image channels that the options ask for."""
    return args.input_size[0] if args.input_size else args.in_chans or 3


def build_model(args: argparse.Namespace, num_classes: int) -> torch.nn.Module:
    """The model in float32 on the CPU.

    Raises:
        UserError: whatever timm or the head says about the name, the head's options or the model's arguments.
    """
    check_model_name(args.model)
    if args.initial_checkpoint and not Path(args.initial_checkpoint).is_file():
        raise UserError(f"--initial-checkpoint {args.initial_checkpoint} is no file")
    given = dict(
        args.model_kwargs, num_classes=num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
        faim_cfg=args.faim_cfg,
    )
    try:
        sized = resolve_model_input_args(args.model, vars(args), **given)
        # Only the input arguments: the name stays as given, with its pretrained tag or its folder.
        given.update({key: sized[key] for key in ("in_chans", "img_size") if key in sized})
        model = timm.create_model(args.model, pretrained=args.pretrained, **given)
        if args.initial_checkpoint:
            load_checkpoint(model, args.initial_checkpoint)
    except (ValueError, TypeError, RuntimeError, OSError, AssertionError) as e:
        raise UserError(f"cannot create {args.model}: {' '.join(str(e).split())}") from e
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def build_data_config(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """Preprocessing, with one mean and one standard deviation per channel."""
    try:
        config = resolve_data_config(vars(args), model=model)
    except AssertionError as e:
        raise UserError(f"--mean and --std need one number, or one per channel ({input_channels(args)})") from e
    channels = input_channels(args)
    config["input_size"] = (channels, *config["input_size"][1:])
    config["mean"], config["std"] = (tuple(adapt_to_chs(config[key], channels)) for key in ("mean", "std"))
    return config


def fit_heads_to(model: torch.nn.Module, batches: Any, accelerator: Accelerator) -> None:
    """Closed-form start of the heads from the training images.

    Raises:
        UserError: what the fit says of the features (NaN, all equal).
    """
    try:
        fit_heads(model, batches, device=accelerator.device)
    except ValueError as e:
        raise UserError(f"--head-init data: {e}") from e


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup/cutmix, or None when both are off."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=num_classes,
    )


def build_criterion(args: argparse.Namespace, model: torch.nn.Module) -> torch.nn.Module:
    """Training loss of (logits [B, C], target [B] or [B, C]), with the margin of the model's FAIM heads."""
    criterion = create_classification_loss(
        "bce" if args.bce_loss else "ce", smoothing=args.smoothing, soft_targets=bool(args.mixup or args.cutmix),
    )
    return TargetMargin(criterion, model) if faim_heads(model) else criterion


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module, processes: int) -> torch.optim.Optimizer:
    """timm's optimiser; without --lr the rate follows the global batch as in timm."""
    if args.lr is None:
        ratio = args.batch_size * args.grad_accum_steps * processes / args.lr_base_size
        rule = args.lr_base_scale or ("sqrt" if any(name in args.opt.lower() for name in ADAPTIVE) else "linear")
        args.lr = args.lr_base * (ratio**0.5 if rule == "sqrt" else ratio)
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(args))
    except ValueError as e:
        if args.opt not in list_optimizers():
            raise UserError(f"unknown --opt {args.opt}.{did_you_mean(args.opt, list_optimizers())}") from e
        raise UserError(f"--opt {args.opt}: {e}") from e


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches: int) -> tuple[Any, int]:
    """timm's schedule (None for --sched none) and the number of epochs with warm-up and cool-down.

    `batches` is the number of training batches an epoch in this process.
    """
    updates = -(-batches // args.grad_accum_steps)
    return create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
