"""The model of a run, made by timm from the options."""

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import load_checkpoint, resolve_model_input_args

from timm_faim import faim_heads
from timm_faim.models import may_be_converted
from timm_faim.run.errors import MODEL_ERRORS, UserError, did_you_mean
from timm_faim.training.rules import loss_name

# Options that are arguments of timm's models by another name; None stays the model's own default.
ARGUMENTS = {
    "gp": "global_pool",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
}


def check_model_name(name: str) -> None:
    """Raise `UserError` with the nearest names when timm knows no such model."""
    if ":" in name or timm.is_model(name.split(".")[0]):
        return
    raise UserError(
        f"unknown model {name!r}.{did_you_mean(name.split('.')[0], timm.list_models())}"
        " timm.list_models('faim_*') lists them all"
    )


def input_channels(args: argparse.Namespace) -> int:
    """Number of image channels that the options ask for."""
    return args.input_size[0] if args.input_size else args.in_chans or 3


def build_model(args: argparse.Namespace, num_classes: int) -> torch.nn.Module:
    """The model on the CPU, in float32 or --model-dtype.

    Raises:
        UserError: whatever timm or the head says about the name, the head's options or the model's arguments.
    """
    check_model_name(args.model)
    for flag, path in (("--initial-checkpoint", args.initial_checkpoint), ("--pretrained-path", args.pretrained_path)):
        if path and not Path(path).is_file():
            raise UserError(f"{flag} {path} is no file")
    set_fast_norm(args.fast_norm)
    given = dict(args.model_kwargs, num_classes=num_classes, faim_cfg=_faim_options(args))
    if args.pretrained_head != "keep":
        given["pretrained_head"] = args.pretrained_head
    given.update((key, getattr(args, option)) for option, key in ARGUMENTS.items() if getattr(args, option) is not None)
    if args.pretrained_path:  # -1 classes: the classifier is left out unless it fits, as with timm's own weights
        given["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}
    try:
        sized = resolve_model_input_args(args.model, vars(args), **given)
        # Only the input arguments: the name stays as given, with its pretrained tag or its folder.
        given.update({key: sized[key] for key in ("in_chans", "img_size") if key in sized})
        model = timm.create_model(args.model, pretrained=args.pretrained or bool(args.pretrained_path), **given)
        if args.initial_checkpoint:
            load_checkpoint(model, args.initial_checkpoint)
    except MODEL_ERRORS as e:
        reason = " ".join(str(e).split())
        for option, key in ARGUMENTS.items():
            if f"unexpected keyword argument '{key}'" in reason:
                flag = option.replace("_", "-")
                raise UserError(f"{args.model} does not take --{flag}. Leave it out, or choose another model") from e
        raise UserError(f"cannot create {args.model}: {reason}") from e
    _init_linear_head(args, model)
    if compares_with_zero(args):
        _centre_logits(args, model)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.model_dtype:
        model = model.to(getattr(torch, args.model_dtype))
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def compares_with_zero(args: argparse.Namespace) -> bool:
    """Whether the loss takes each logit by itself, so that a class counts as present where its logit is positive."""
    return not args.eval_only and (args.multi_label or loss_name(args) in ("bce", "asl"))


def _faim_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """--faim-cfg and --faim-blocks; a loss that compares logits with 0 needs the class prior, since -γ d alone is
    never positive."""
    given = args.faim_cfg
    if args.faim_blocks is not None:
        if ":" in args.model and given is None:
            raise UserError(
                f"--faim-blocks with the saved model {args.model} would put the other options of its head "
                "back to their defaults. Give them all: --faim-cfg KEY=VALUE ... and --faim-blocks"
            )
        given = {**(given or {}), "blocks": args.faim_blocks}
    if not compares_with_zero(args) or not args.model.startswith("faim_"):
        return given
    options = {"prior": True, **(given or {})}
    if not options["prior"]:
        raise UserError(
            f"--faim-cfg prior=False does not go with the {loss_name(args)} loss: logits -γ d are never "
            "above 0, and no class would be predicted. Leave it out"
        )
    return options


@torch.no_grad()
def _centre_logits(args: argparse.Namespace, model: torch.nn.Module) -> None:
    """Start fresh priors where a class at the mean distance has the probability 1/C."""
    for head in faim_heads(model).values():
        if head.prior is None:
            raise UserError(
                f"the FAIM head of {args.model} has no class prior, which the {loss_name(args)} loss "
                "needs: logits -γ d are never above 0. Train a new one with prior=True, or use --loss ce"
            )
        converted = may_be_converted(model.faim_cfg) and "lambda_init" not in (args.faim_cfg or {})
        if ":" not in args.model and converted and head.prior.any():
            raise UserError(
                f"{args.model}: its weights' own classifier became the head, which keeps the differences "
                f"between logits but not their signs, as the {loss_name(args)} loss needs them. Use --loss "
                "ce, or start a fresh head with --pretrained-head fresh"
            )
        if not head.prior.any():
            head.prior.fill_(float(head.gamma()) * head.initial_distance() - math.log(max(1, head.num_classes - 1)))


def sync_batch_norm(args: argparse.Namespace, model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """The model with batch norm over all processes under --sync-bn; --dist-bn has nothing left to do then.

    Raises:
        UserError: several processes on the CPU, which PyTorch's synchronised batch norm does not support.
    """
    if not args.sync_bn or accelerator.num_processes == 1:
        return model
    if accelerator.device.type == "cpu":
        raise UserError("--sync-bn works on GPUs only. Leave it out: --dist-bn reduce averages the statistics")
    args.dist_bn = ""
    return convert_sync_batchnorm(model)


def _init_linear_head(args: argparse.Namespace, model: torch.nn.Module) -> None:
    flags = [
        flag
        for flag, value in (("--head-init-scale", args.head_init_scale), ("--head-init-bias", args.head_init_bias))
        if value is not None
    ]
    if not flags:
        return
    if faim_heads(model):
        raise UserError(
            f"{flags[0]} is for linear classifiers, and {args.model} has a FAIM head. Leave it out; "
            "--faim-cfg scale_init=... sets the size of the logits"
        )
    classifiers = model.get_classifier()
    for layer in classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]:
        with torch.no_grad():
            if args.head_init_scale is not None:
                for parameter in layer.parameters():
                    parameter.mul_(args.head_init_scale)
            if args.head_init_bias is not None and layer.bias is not None:
                layer.bias.fill_(args.head_init_bias)


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
