"""What options mean together: their values by themselves, and those that need or exclude each other."""

import argparse
from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DynamoBackend
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from timm_faim.images.datasets import dataset_type
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.training.contrastive import parse_losses

STREAMED = ("hfids", "wds", "tfds")  # types of --dataset that can only be read from the beginning
MODES = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "YCbCr": 3, "HSV": 3, "LAB": 3}  # Pillow's, with 8 bits
WITH_FIELDS = ("hfds", *STREAMED)  # types of --dataset whose samples have named fields


def is_faim(model_name: str) -> bool:
    """Whether a name may have a FAIM head: a faim_ twin, or a saved model whose architecture is not known yet."""
    return model_name.startswith("faim_") or ":" in model_name


def mixes_images(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on, so that targets are soft."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def loss_name(args: argparse.Namespace) -> str:
    """The loss by timm's name, whichever flag chose it."""
    return args.loss or (
        "bce" if args.bce_loss or args.multi_label and not args.jsd_loss else "jsd" if args.jsd_loss else "ce"
    )


def without_refit(args: argparse.Namespace) -> list[str]:
    """What among the options --head-refit does not go with."""
    return [
        flag
        for flag, on in (
            ("--multi-label", args.multi_label),
            ("--cache-features", args.cache_features),
            ("--fsdp", args.fsdp),
            ("--aug-splits", args.aug_splits),
            ("--epochs 0, whose heads --head-init data fits", not args.epochs),
            (f"--dataset {args.dataset}", dataset_type(args.dataset) in STREAMED),
        )
        if on
    ]


def evaluator_of(args: argparse.Namespace) -> type[ClassificationEvaluator]:
    return MultiLabelClassificationEvaluator if args.multi_label else ClassificationEvaluator


def check_values(args: argparse.Namespace) -> None:
    """Each value by itself."""
    for key in ("scale", "ratio", "lr_noise", "decay_milestones"):
        values = getattr(args, key) or []
        if list(values) != sorted(values):
            raise UserError(f"{flag_of(key)} takes numbers in rising order, got {join(values)}")
    if args.affine and (max(args.affine[1:3]) > 1 or args.affine[2] == 1 or args.affine[3] >= 90):
        raise UserError(
            "--affine takes DEG in 0..180, TRANSLATE in 0..1, SCALE below 1 and SHEAR below 90, got "
            f"{join(args.affine)}"
        )
    if args.aug_splits == 1:
        raise UserError(f"--aug-splits must be 0 or at least 2, got {args.aug_splits}")
    if args.cutmix_minmax and not (len(args.cutmix_minmax) == 2 and args.cutmix_minmax[0] < args.cutmix_minmax[1]):
        raise UserError(f"--cutmix-minmax takes MIN < MAX in 0..1, got {join(args.cutmix_minmax)}")
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UserError(f"--lr-noise takes one or two shares of the run, got {join(args.lr_noise)}")
    _check_channels(args)
    parse_losses(args.contrastive or ())
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves none of the {args.epochs} epochs. Raise --epochs")
    if args.torchcompile and args.torchcompile.upper() not in DynamoBackend.__members__:
        raise UserError(
            f"unknown --torchcompile {args.torchcompile}."
            f"{did_you_mean(args.torchcompile, [b.lower() for b in DynamoBackend.__members__])}"
        )
    metrics = evaluator_of(args).metric_names
    if args.eval_metric not in metrics:
        raise UserError(f"--eval-metric {args.eval_metric} is not computed. Choose one of {', '.join(metrics)}")
    for name in args.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"unknown --log-with {name}.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)} "
                f"Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
    if not (args.data_dir or args.dataset):
        raise UserError(f"no data: give --data-dir or --dataset, on the command line or in {args.config or 'a recipe'}")


def _check_channels(args: argparse.Namespace) -> None:
    """The model's input has the channels of the images' mode."""
    chans = args.input_size[0] if args.input_size else args.in_chans
    mode = args.input_img_mode or ("L" if chans == 1 else "RGB")
    if mode not in MODES:
        raise UserError(f"unknown --input-img-mode {mode}.{did_you_mean(mode, MODES)} Modes are {', '.join(MODES)}")
    if chans is not None and chans != MODES[mode]:
        fitting = " or ".join(name for name, count in MODES.items() if count == chans)
        mend = f"Give --input-img-mode {fitting}" if fitting else "Images have 1 to 4 channels"
        raise UserError(
            f"--{'input-size' if args.input_size else 'in-chans'} {chans}: images of mode {mode} have "
            f"{MODES[mode]} channels. {mend}"
        )


def check_combinations(args: argparse.Namespace) -> None:
    """Options that need or exclude each other; the first rule that is broken is the error."""
    loss, mixes, splits = loss_name(args), mixes_images(args), args.aug_splits > 1
    kind = dataset_type(args.dataset)
    chosen = [
        flag for flag, on in (("--loss", args.loss), ("--bce-loss", args.bce_loss), ("--jsd-loss", args.jsd_loss)) if on
    ]
    partly = [
        flag
        for flag, on in (
            ("--freeze", args.freeze),
            ("--head-only", args.head_only),
            ("--train-last", args.train_last is not None),
        )
        if on
    ]
    of_bce = [
        flag
        for flag, on in (
            ("--bce-sum", args.bce_sum),
            ("--bce-target-thresh", args.bce_target_thresh),
            ("--bce-pos-weight", args.bce_pos_weight),
        )
        if on
    ]
    of_wandb = [
        flag
        for flag, on in (
            ("--wandb-project", args.wandb_project),
            ("--wandb-tags", args.wandb_tags),
            ("--wandb-resume-id", args.wandb_resume_id),
        )
        if on
    ]
    of_teacher = [
        flag
        for flag, on in (
            ("--distill-loss-weight", args.distill_loss_weight is not None),
            ("--task-loss-weight", args.task_loss_weight is not None),
        )
        if on
    ]
    uncached = [
        flag
        for flag, on in (
            ("--mixup and --cutmix", mixes),
            ("--aug-splits", splits),
            ("--kd-model-name", args.kd_model_name),
            ("--fsdp", args.fsdp),
            ("--contrastive", args.contrastive),
            ("--views", args.views > 1),
            ("--samples-per-class", args.samples_per_class),
            (f"--dataset {args.dataset}", kind in STREAMED),
        )
        if on
    ]
    not_contrastive = [
        flag
        for flag, on in (
            ("--mixup and --cutmix", mixes),
            ("--multi-label", args.multi_label),
            ("--kd-model-name", args.kd_model_name),
            ("--aug-splits", splits),
            ("--fsdp", args.fsdp),
        )
        if on
    ]
    not_refit = without_refit(args)
    rules = (
        # data
        (
            args.multi_label and kind not in WITH_FIELDS,
            "--multi-label needs a data set whose images have several labels: --dataset hfds/, hfids/, wds/ or tfds/",
        ),
        (args.target_format != "indices" and not args.multi_label, "--target-format is for --multi-label"),
        (
            (args.input_key or args.target_key) and kind not in WITH_FIELDS,
            "--input-key and --target-key are for --dataset hfds/, hfids/, wds/ and tfds/. Leave them out",
        ),
        (
            (args.train_num_samples or args.val_num_samples) and kind not in STREAMED,
            "--train-num-samples and --val-num-samples are for streamed data (hfids/, wds/, tfds/). Leave them out",
        ),
        (
            args.skip_unreadable and kind not in ("", "hfds"),
            "--skip-unreadable is for images that are read one by one (folders, tar files, hfds/), not for --dataset "
            f"{args.dataset}. Leave it out",
        ),
        (
            args.epoch_repeats and kind not in ("hfids", "tfds"),
            "--epoch-repeats is for hfids/ and tfds/ data. Raise --epochs instead",
        ),
        (
            not args.epochs and args.head_init != "data" and not args.eval_only,
            "--epochs 0 trains nothing: give --head-init data, which fits the FAIM heads in closed form, or more "
            "epochs",
        ),
        (
            args.warmup_epochs >= args.epochs > 0
            and args.warmup_epochs
            and args.sched not in ("none", "plateau")
            and not args.warmup_prefix
            and not args.eval_only,
            f"--warmup-epochs {args.warmup_epochs} leaves none of the {args.epochs} epochs at the full rate. Give "
            f"at most {args.epochs - 1}, or --warmup-prefix",
        ),
        (not args.val_split and args.eval_only, "--eval-only needs validation data: give --val-split"),
        (
            not args.val_split and args.sched == "plateau",
            "--sched plateau follows the validation: give --val-split or choose another --sched",
        ),
        # mixing and splitting
        (
            mixes and args.batch_size % 2,
            f"--mixup and --cutmix pair up images: --batch-size must be even, got {args.batch_size}",
        ),
        (mixes and splits, "--mixup and --cutmix do not go with --aug-splits. Choose one"),
        (mixes and loss == "jsd", "--mixup and --cutmix do not go with the jsd loss. Choose one"),
        (loss == "jsd" and not splits, "the jsd loss compares views of an image: give --aug-splits 2 or more"),
        (splits and args.no_aug, "--aug-splits needs augmentation: leave --no-aug out"),
        (splits and kind in STREAMED, f"--aug-splits does not go with streamed data (--dataset {args.dataset})"),
        (args.aug_repeats and kind in STREAMED, f"--aug-repeats does not go with streamed data ({args.dataset})"),
        (
            args.split_bn and not (splits or args.resplit),
            "--split-bn needs a split batch: give --aug-splits 2 or more, or --resplit",
        ),
        (args.split_bn and args.sync_bn, "--split-bn and --sync-bn exclude each other"),
        (
            args.split_bn and not splits and args.batch_size % 2,
            f"--split-bn halves the batch: --batch-size must be even, got {args.batch_size}",
        ),
        (args.mixup_off_epoch and not mixes, "--mixup-off-epoch needs --mixup or --cutmix"),
        # loss
        (len(chosen) > 1, f"{' and '.join(chosen)} exclude each other"),
        (of_bce and loss != "bce", f"{join(of_bce[:1])} is an option of the bce loss: give --loss bce"),
        (loss in ("twoway", "zlpr") and not args.multi_label, f"--loss {loss} needs --multi-label"),
        (
            loss in ("twoway", "zlpr") and (args.smoothing or mixes),
            f"--loss {loss} takes targets 0 and 1: no --smoothing, --mixup or --cutmix",
        ),
        (loss == "asl" and mixes and not args.multi_label, "--loss asl does not go with --mixup and --cutmix"),
        (loss in ("ce", "jsd") and args.multi_label, f"--multi-label does not go with the {loss} loss"),
        (args.head_init == "data" and args.multi_label, "--head-init data does not go with --multi-label"),
        (args.head_refit is not None and not_refit, f"--head-refit does not go with {join(not_refit[:1])}"),
        (args.kd_model_name and args.multi_label, "--kd-model-name does not go with --multi-label"),
        (of_teacher and not args.kd_model_name, f"{join(of_teacher[:1])} needs a teacher: give --kd-model-name"),
        # contrastive losses
        (args.contrastive and not_contrastive, f"--contrastive does not go with {join(not_contrastive[:1])}"),
        (
            args.contrastive and args.views == 1 and args.samples_per_class < 2,
            "--contrastive needs several images of a class in a batch: give --samples-per-class 4, or --views 2",
        ),
        (args.views > 1 and splits, "--views and --aug-splits exclude each other"),
        (args.views > 1 and mixes, "--views does not go with --mixup and --cutmix"),
        (
            args.samples_per_class and kind in STREAMED,
            f"--samples-per-class does not go with streamed data (--dataset {args.dataset})",
        ),
        (args.samples_per_class and args.multi_label, "--samples-per-class does not go with --multi-label"),
        (args.samples_per_class and args.aug_repeats, "--samples-per-class and --aug-repeats exclude each other"),
        # what learns
        (len(partly) > 1, f"{' and '.join(partly)} exclude each other"),
        (args.cache_features and not args.head_only, "--cache-features needs a backbone that stays: give --head-only"),
        (args.cache_views and not args.cache_features, "--cache-views needs --cache-features"),
        (args.cache_features and uncached, f"--cache-features does not go with {join(uncached[:1])}"),
        # precision and processes
        (
            args.amp and args.model_dtype not in (None, "float32"),
            f"--amp needs weights in float32: leave --model-dtype {args.model_dtype} out",
        ),
        (args.torchcompile_mode and not args.torchcompile, "--torchcompile-mode needs --torchcompile"),
        (args.fsdp and args.model_ema, "--model-ema does not work under --fsdp. Leave one of them out"),
        # logging
        (of_wandb and not (args.log_wandb or "wandb" in args.log_with), f"{join(of_wandb[:1])} needs --log-wandb"),
        (args.wandb_resume_id and not args.resume, "--wandb-resume-id needs --resume"),
        (
            (args.hub_private or args.hub_license) and not args.push_to_hub,
            "--hub-private and --hub-license need --push-to-hub",
        ),
    )
    for broken, message in rules:
        if broken:
            raise UserError(message)


def flag_of(key: str) -> str:
    return "--" + key.replace("_", "-")


def join(values: Sequence[Any]) -> str:
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
