"""The model of a run, made by timm from the options."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import load_checkpoint, resolve_model_input_args
from timm.utils import ParseKwargs

from timm_faim import faim_heads
from timm_faim.models import may_be_converted
from timm_faim.run.errors import MODEL_ERRORS, UserError, did_you_mean
from timm_faim.run.options import AUTO, SHARE, above, flag, option, real, whole
from timm_faim.training.launch import DeviceOptions
from timm_faim.training.loss import loss_name

if TYPE_CHECKING:
    from timm_faim.training.options import Options

# Options that are arguments of timm's models by another name; None stays the model's own default.
ARGUMENTS = {
    "gp": "global_pool",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
}


@dataclass
class ModelOptions:
    """Model."""

    model: str = option(
        "a timm name with the prefix faim_, or without it", "faim_resnet50", metavar="NAME", marks="usual"
    )
    pretrained: bool = flag("start from timm's pretrained weights", marks="usual")
    pretrained_head: str = option(
        "what becomes of the classes of pretrained weights that have as many as the data: "
        "kept (a linear classifier is converted in closed form), or a fresh head (default: keep)",
        "keep",
        choices=("keep", "fresh"),
        marks="faim",
    )
    pretrained_path: str | None = option("start from this file as if it were the pretrained weights", metavar="FILE")
    initial_checkpoint: str = option("load these weights into the new model", "", metavar="FILE")
    num_classes: int | None = option("number of classes (default: that of the data)", None, whole(1, 10_000_000), "N")
    gp: str | None = option(
        "global pooling, for example avg, max, avgmax, catavgmax (default: the model's)", metavar="POOL"
    )
    drop: float | None = option("dropout before the classifier (default: the model's)", None, SHARE, "P")
    drop_path: float | None = option("stochastic depth", None, SHARE, "P")
    drop_block: float | None = option("DropBlock, for ResNet's family", None, SHARE, "P")
    bn_momentum: float | None = option("batch-norm momentum, for EfficientNet's family", None, SHARE, "M")
    bn_eps: float | None = option("batch-norm epsilon, for EfficientNet's family", None, above(0, 1), "EPS")
    head_init_scale: float | None = option("factor on a linear classifier's initial weights", None, real(0, 1e6), "F")
    head_init_bias: float | None = option("a linear classifier's initial bias", None, real(-1e6, 1e6), "B")
    model_kwargs: dict[str, Any] = option(
        "further arguments of timm.create_model", {}, metavar="KEY=VALUE", nargs="*", action=ParseKwargs
    )
    grad_checkpointing: bool = flag("recompute activations to save memory")
    channels_last: bool = flag("channels-last memory layout")
    fast_norm: bool = flag("norm layers in low precision under --amp")


@dataclass
class HeadOptions:
    """FAIM head."""

    faim_cfg: dict[str, Any] | None = option(
        "options of the head, for example space=sphere margin=0.2; replaces those of the recipe",
        metavar="KEY=VALUE",
        nargs="*",
        action=ParseKwargs,
        marks="usual faim",
    )
    faim_blocks: int | None = option(
        "log and exp maps around the last N blocks; the same as --faim-cfg blocks=N",
        None,
        whole(0, 10_000),
        "N",
        marks="faim",
    )
    head_init: str = option(
        "data: class means and within-class variance of the backbone's features, evaluated as epoch 0",
        "random",
        choices=("random", "data"),
        marks="usual faim training",
    )
    head_refit: int | None = option(
        "after the last epoch set centre, prototypes and Σ in closed form, from all training images and N augmented "
        "epochs; -1: not, where a recipe does",
        None,
        whole(-1, 10_000),
        "N",
        marks="usual faim training",
    )


@dataclass
class InputOptions:
    """Input size and normalisation (default: the model's)."""

    img_size: int | None = option("height and width in pixels", None, whole(1, 8192), "N", marks="usual")
    in_chans: int | None = option("input channels", None, whole(1, 4), "N")
    input_size: list[int] | None = option("channels, height and width", None, whole(1, 8192), ("C", "H", "W"), nargs=3)
    crop_pct: float | None = option("share of the resized image kept in validation", None, real(0.05, 2), "P")
    crop_mode: str | None = option(
        "of a validation image that is no square: its centre, all of it squashed, or all of it with a border; auto: "
        "what suits the training images under the pretrained backbone best, with --crop-pct",
        choices=(AUTO, "center", "squash", "border"),
    )
    mean: list[float] | None = option("mean of the pixels, per channel, in 0..1", None, SHARE, "M", nargs="+")
    std: list[float] | None = option(
        "standard deviation of the pixels, per channel", None, above(0, 10), "S", nargs="+"
    )
    interpolation: str = option("resize interpolation in validation", "")
    train_interpolation: str = option(
        "the same in training; empty: as in validation", "random", choices=("random", "bilinear", "bicubic", "")
    )


def check_model_name(name: str) -> None:
    """Raise `UserError` with the nearest names when timm knows no such model."""
    if ":" in name or timm.is_model(name.split(".")[0]):
        return
    raise UserError(
        f"unknown model {name!r}.{did_you_mean(name.split('.')[0], timm.list_models())}"
        " timm.list_models('faim_*') lists them all"
    )


def input_channels(options: InputOptions) -> int:
    """Number of image channels that the options ask for."""
    return options.input_size[0] if options.input_size else options.in_chans or 3


def build_model(options: "Options", num_classes: int) -> torch.nn.Module:
    """The model on the CPU, in float32 or --model-dtype.

    Raises:
        UserError: whatever timm or the head says about the name, the head's options or the model's arguments.
    """
    own = options.model
    check_model_name(own.model)
    for name, path in (("--initial-checkpoint", own.initial_checkpoint), ("--pretrained-path", own.pretrained_path)):
        if path and not Path(path).is_file():
            raise UserError(f"{name} {path} is no file")
    set_fast_norm(own.fast_norm)
    given = dict(own.model_kwargs, num_classes=num_classes, faim_cfg=_faim_options(options))
    if own.pretrained_head != "keep":
        given["pretrained_head"] = own.pretrained_head
    given.update((key, getattr(own, name)) for name, key in ARGUMENTS.items() if getattr(own, name) is not None)
    if own.pretrained_path:  # -1 classes: the classifier is left out unless it fits, as with timm's own weights
        given["pretrained_cfg_overlay"] = {"file": own.pretrained_path, "num_classes": -1}
    try:
        sized = resolve_model_input_args(own.model, vars(options.input), **given)
        # Only the input arguments: the name stays as given, with its pretrained tag or its folder.
        given.update({key: sized[key] for key in ("in_chans", "img_size") if key in sized})
        model = timm.create_model(own.model, pretrained=own.pretrained or bool(own.pretrained_path), **given)
        if own.initial_checkpoint:
            load_checkpoint(model, own.initial_checkpoint)
    except MODEL_ERRORS as e:
        reason = " ".join(str(e).split())
        for name, key in ARGUMENTS.items():
            if f"unexpected keyword argument '{key}'" in reason:
                raise UserError(
                    f"{own.model} does not take --{name.replace('_', '-')}. Leave it out, or choose another model"
                ) from e
        raise UserError(f"cannot create {own.model}: {reason}") from e
    _init_linear_head(options.model, model)
    if compares_with_zero(options):
        _centre_logits(options, model)
    if own.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if options.device.split_bn:
        model = convert_splitbn_model(model, max(options.augmentation.aug_splits, 2))
    if options.device.model_dtype:
        model = model.to(getattr(torch, options.device.model_dtype))
    if own.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def compares_with_zero(options: "Options") -> bool:
    """Whether the loss takes each logit by itself, so that a class counts as present where its logit is positive."""
    takes_each = options.data.multi_label or loss_name(options.loss, options.data) in ("bce", "asl")
    return takes_each and not options.run.eval_only


def _faim_options(options: "Options") -> dict[str, Any] | None:
    """--faim-cfg and --faim-blocks; a loss that compares logits with 0 needs the class prior, since -γ d alone is
    never positive."""
    given = options.head.faim_cfg
    if options.head.faim_blocks is not None:
        if ":" in options.model.model and given is None:
            raise UserError(
                f"--faim-blocks with the saved model {options.model.model} would put the other options of "
                "its head back to their defaults. Give them all: --faim-cfg KEY=VALUE ... and "
                "--faim-blocks"
            )
        given = {**(given or {}), "blocks": options.head.faim_blocks}
    if not compares_with_zero(options) or not options.model.model.startswith("faim_"):
        return given
    given = {"prior": True, **(given or {})}
    if not given["prior"]:
        raise UserError(
            f"--faim-cfg prior=False does not go with the {loss_name(options.loss, options.data)} loss: "
            "logits -γ d are never above 0, and no class would be predicted. Leave it out"
        )
    return given


@torch.no_grad()
def _centre_logits(options: "Options", model: torch.nn.Module) -> None:
    """Start fresh priors where a class at the mean distance has the probability 1/C."""
    name, loss = options.model.model, loss_name(options.loss, options.data)
    for head in faim_heads(model).values():
        if head.prior is None:
            raise UserError(
                f"the FAIM head of {name} has no class prior, which the {loss} loss "
                "needs: logits -γ d are never above 0. Train a new one with prior=True, or use --loss ce"
            )
        converted = may_be_converted(model.faim_cfg) and "lambda_init" not in (options.head.faim_cfg or {})
        if ":" not in name and converted and head.prior.any():
            raise UserError(
                f"{name}: its weights' own classifier became the head, which keeps the differences "
                f"between logits but not their signs, as the {loss} loss needs them. Use --loss "
                "ce, or start a fresh head with --pretrained-head fresh"
            )
        if not head.prior.any():
            head.prior.fill_(float(head.gamma()) * head.initial_distance() - math.log(max(1, head.num_classes - 1)))


def sync_batch_norm(options: DeviceOptions, model: torch.nn.Module, accelerator: Accelerator) -> torch.nn.Module:
    """The model with batch norm over all processes under --sync-bn; --dist-bn has nothing left to do then.

    Raises:
        UserError: several processes on the CPU, which PyTorch's synchronised batch norm does not support.
    """
    if not options.sync_bn or accelerator.num_processes == 1:
        return model
    if accelerator.device.type == "cpu":
        raise UserError("--sync-bn works on GPUs only. Leave it out: --dist-bn reduce averages the statistics")
    options.dist_bn = ""
    return convert_sync_batchnorm(model)


def _init_linear_head(options: ModelOptions, model: torch.nn.Module) -> None:
    given = [
        name
        for name, value in (
            ("--head-init-scale", options.head_init_scale),
            ("--head-init-bias", options.head_init_bias),
        )
        if value is not None
    ]
    if not given:
        return
    if faim_heads(model):
        raise UserError(
            f"{given[0]} is for linear classifiers, and {options.model} has a FAIM head. Leave it out; "
            "--faim-cfg scale_init=... sets the size of the logits"
        )
    classifiers = model.get_classifier()
    for layer in classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]:
        with torch.no_grad():
            if options.head_init_scale is not None:
                for parameter in layer.parameters():
                    parameter.mul_(options.head_init_scale)
            if options.head_init_bias is not None and layer.bias is not None:
                layer.bias.fill_(options.head_init_bias)


def build_data_config(options: InputOptions, model: torch.nn.Module) -> dict[str, Any]:
    """Preprocessing, with one mean and one standard deviation per channel."""
    try:
        config = resolve_data_config(vars(options), model=model)
    except AssertionError as e:
        raise UserError(f"--mean and --std need one number, or one per channel ({input_channels(options)})") from e
    channels = input_channels(options)
    config["input_size"] = (channels, *config["input_size"][1:])
    config["mean"], config["std"] = (tuple(adapt_to_chs(config[key], channels)) for key in ("mean", "std"))
    return config
