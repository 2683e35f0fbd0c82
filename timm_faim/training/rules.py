"""What options may be: each value by itself, and which need or exclude each other."""

from collections.abc import Sequence
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DynamoBackend
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from timm_faim.images.pixels import mode_of
from timm_faim.images.splits import DataOptions
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import AUTO
from timm_faim.training.contrastive import parse_losses
from timm_faim.training.loss import loss_name, mixes_images
from timm_faim.training.model import InputOptions
from timm_faim.training.options import Options
from timm_faim.training.rare_classes import asked

STREAMED = ("hfids", "wds", "tfds")  # types of --dataset that can only be read from the beginning
WITH_FIELDS = ("hfds", *STREAMED)  # types of --dataset whose samples have named fields
MODES = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "YCbCr": 3, "HSV": 3, "LAB": 3}  # Pillow's, with 8 bits


def evaluator_of(data: DataOptions) -> type[ClassificationEvaluator]:
    """timm's evaluator of the task."""
    return MultiLabelClassificationEvaluator if data.multi_label else ClassificationEvaluator


def without_refit(options: Options) -> list[str]:
    """What among the options --head-refit does not go with."""
    data = options.data
    return [
        flag
        for flag, on in (
            ("--multi-label", data.multi_label),
            ("--cache-features", options.learning.cache_features),
            ("--fsdp", options.device.fsdp),
            ("--aug-splits", options.augmentation.aug_splits),
            ("--epochs 0, whose heads --head-init data fits", not options.schedule.epochs),
            (f"--dataset {data.dataset}", data.kind in STREAMED),
        )
        if on
    ]


def check_values(options: Options) -> None:
    """Each value by itself."""
    augmentation, schedule, run = options.augmentation, options.schedule, options.run
    for name, values in (
        ("scale", augmentation.scale),
        ("ratio", augmentation.ratio),
        ("lr-noise", schedule.lr_noise or []),
        ("decay-milestones", schedule.decay_milestones),
    ):
        if list(values) != sorted(values):
            raise UserError(f"--{name} takes numbers in rising order, got {_join(values)}")
    affine, sides = augmentation.affine, options.mixing.cutmix_minmax
    if affine and (max(affine[1:3]) > 1 or affine[2] == 1 or affine[3] >= 90):
        raise UserError(
            f"--affine takes DEG in 0..180, TRANSLATE in 0..1, SCALE below 1 and SHEAR below 90, got {_join(affine)}"
        )
    if augmentation.aug_splits == 1:
        raise UserError(f"--aug-splits must be 0 or at least 2, got {augmentation.aug_splits}")
    if sides and not (len(sides) == 2 and sides[0] < sides[1]):
        raise UserError(f"--cutmix-minmax takes MIN < MAX in 0..1, got {_join(sides)}")
    if schedule.lr_noise and len(schedule.lr_noise) > 2:
        raise UserError(f"--lr-noise takes one or two shares of the run, got {_join(schedule.lr_noise)}")
    _check_channels(options.input, options.data.input_img_mode)
    parse_losses(options.contrastive.contrastive or ())
    start, backend = options.checkpoints.start_epoch, options.device.torchcompile
    if start is not None and start >= schedule.epochs:
        raise UserError(f"--start-epoch {start} leaves none of the {schedule.epochs} epochs. Raise --epochs")
    if backend and backend.upper() not in DynamoBackend.__members__:
        raise UserError(
            f"unknown --torchcompile {backend}.{did_you_mean(backend, [b.lower() for b in DynamoBackend.__members__])}"
        )
    metrics = evaluator_of(options.data).metric_names
    if run.eval_metric not in metrics:
        raise UserError(f"--eval-metric {run.eval_metric} is not computed. Choose one of {', '.join(metrics)}")
    for name in options.logging.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(
                f"unknown --log-with {name}.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)} "
                f"Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
    if not (options.data.data_dir or options.data.dataset):
        raise UserError(
            f"no data: give --data-dir or --dataset, on the command line or in {options.config or 'a recipe'}"
        )


def _check_channels(options: InputOptions, mode: str | None) -> None:
    """The model's input has the channels of the images' mode."""
    chans = options.input_size[0] if options.input_size else options.in_chans
    mode = mode or mode_of(chans)
    if mode not in MODES:
        raise UserError(f"unknown --input-img-mode {mode}.{did_you_mean(mode, MODES)} Modes are {', '.join(MODES)}")
    if chans is not None and chans != MODES[mode]:
        fitting = " or ".join(name for name, count in MODES.items() if count == chans)
        mend = f"Give --input-img-mode {fitting}" if fitting else "Images have 1 to 4 channels"
        raise UserError(
            f"--{'input-size' if options.input_size else 'in-chans'} {chans}: images of mode {mode} have "
            f"{MODES[mode]} channels. {mend}"
        )


def check_combinations(options: Options) -> None:
    """Options that need or exclude each other; the first rule that is broken is the error."""
    data, aug, losses, learning, device = (
        options.data,
        options.augmentation,
        options.loss,
        options.learning,
        options.device,
    )
    contrastive, kd, schedule, run, logging = (
        options.contrastive,
        options.distillation,
        options.schedule,
        options.run,
        options.logging,
    )
    teacher, epochs, warmup = kd.kd_model_name, schedule.epochs, schedule.warmup_epochs
    loss, mixes, splits, kind = loss_name(losses, data), mixes_images(options.mixing), aug.aug_splits > 1, data.kind
    chosen = [
        flag
        for flag, on in (("--loss", losses.loss), ("--bce-loss", losses.bce_loss), ("--jsd-loss", losses.jsd_loss))
        if on
    ]
    partly = [
        flag
        for flag, on in (
            ("--freeze", learning.freeze),
            ("--head-only", learning.head_only),
            ("--train-last", learning.train_last is not None),
        )
        if on
    ]
    of_bce = [
        flag
        for flag, on in (
            ("--bce-sum", losses.bce_sum),
            ("--bce-target-thresh", losses.bce_target_thresh),
            ("--bce-pos-weight", losses.bce_pos_weight),
        )
        if on
    ]
    of_wandb = [
        flag
        for flag, on in (
            ("--wandb-project", logging.wandb_project),
            ("--wandb-tags", logging.wandb_tags),
            ("--wandb-resume-id", logging.wandb_resume_id),
        )
        if on
    ]
    of_teacher = [
        flag
        for flag, on in (
            ("--distill-loss-weight", kd.distill_loss_weight is not None),
            ("--task-loss-weight", kd.task_loss_weight is not None),
        )
        if on
    ]
    uncached = [
        flag
        for flag, on in (
            ("--mixup and --cutmix", mixes),
            ("--aug-splits", splits),
            ("--kd-model-name", teacher),
            ("--fsdp", device.fsdp),
            ("--contrastive", contrastive.contrastive),
            ("--views", contrastive.views > 1),
            ("--samples-per-class", contrastive.samples_per_class),
            ("--val-flip", run.val_flip),
            (f"--dataset {data.dataset}", kind in STREAMED),
        )
        if on
    ]
    not_contrastive = [
        flag
        for flag, on in (
            ("--mixup and --cutmix", mixes),
            ("--multi-label", data.multi_label),
            ("--kd-model-name", teacher),
            ("--aug-splits", splits),
            ("--fsdp", device.fsdp),
        )
        if on
    ]
    for_rare = asked(options.rare_classes)
    not_for_rare = [
        flag
        for flag, on in (
            ("--multi-label", data.multi_label),
            ("--mixup and --cutmix, whose targets belong to several classes", mixes),
            (f"the {loss} loss", loss != "ce"),
        )
        if on
    ]
    not_refit, near, model = without_refit(options), options.start.flags, options.model
    chooses, recipe = options.input.crop_mode == AUTO, options.head_recipe.head_recipe == AUTO
    rules = (
        # data
        (
            data.multi_label and kind not in WITH_FIELDS,
            "--multi-label needs a data set whose images have several labels: --dataset hfds/, hfids/, wds/ or tfds/",
        ),
        (data.target_format != "indices" and not data.multi_label, "--target-format is for --multi-label"),
        (
            (data.input_key or data.target_key) and kind not in WITH_FIELDS,
            "--input-key and --target-key are for --dataset hfds/, hfids/, wds/ and tfds/. Leave them out",
        ),
        (
            (data.train_num_samples or data.val_num_samples) and kind not in STREAMED,
            "--train-num-samples and --val-num-samples are for streamed data (hfids/, wds/, tfds/). Leave them out",
        ),
        (
            data.skip_unreadable and kind not in ("", "hfds"),
            "--skip-unreadable is for images that are read one by one (folders, tar files, hfds/), not for --dataset "
            f"{data.dataset}. Leave it out",
        ),
        (
            aug.epoch_repeats and kind not in ("hfids", "tfds"),
            "--epoch-repeats is for hfids/ and tfds/ data. Raise --epochs instead",
        ),
        (
            not epochs and options.head.head_init != "data" and not run.eval_only,
            "--epochs 0 trains nothing: give --head-init data, which fits the FAIM heads in closed form, or more "
            "epochs",
        ),
        (
            warmup >= epochs > 0
            and warmup
            and schedule.sched not in ("none", "plateau")
            and not schedule.warmup_prefix
            and not run.eval_only,
            f"--warmup-epochs {warmup} leaves none of the {epochs} epochs at the full rate. Give at most "
            f"{epochs - 1}, or --warmup-prefix",
        ),
        (not data.val_split and run.eval_only, "--eval-only needs validation data: give --val-split"),
        (
            not data.val_split and schedule.sched == "plateau",
            "--sched plateau follows the validation: give --val-split or choose another --sched",
        ),
        (recipe and run.eval_only, "--head-recipe auto chooses before a training: leave it out with --eval-only"),
        (recipe and data.multi_label, "--head-recipe auto does not go with --multi-label"),
        (
            recipe and options.head.head_init != "data" and options.head.head_refit is None,
            "--head-recipe auto is of heads in closed form: give --head-init data or --head-refit, too",
        ),
        (
            recipe and not (model.pretrained or model.pretrained_path or model.initial_checkpoint),
            "--head-recipe auto looks through a pretrained backbone: give --pretrained or --pretrained-path",
        ),
        (chooses and run.eval_only, "--crop-mode auto chooses before a training: leave it out with --eval-only"),
        (chooses and data.multi_label, "--crop-mode auto does not go with --multi-label"),
        (
            chooses and not (model.pretrained or model.pretrained_path or model.initial_checkpoint),
            "--crop-mode auto looks through a pretrained backbone: give --pretrained or --pretrained-path",
        ),
        # mixing and splitting
        (
            mixes and run.batch_size % 2,
            f"--mixup and --cutmix pair up images: --batch-size must be even, got {run.batch_size}",
        ),
        (mixes and splits, "--mixup and --cutmix do not go with --aug-splits. Choose one"),
        (mixes and loss == "jsd", "--mixup and --cutmix do not go with the jsd loss. Choose one"),
        (loss == "jsd" and not splits, "the jsd loss compares views of an image: give --aug-splits 2 or more"),
        (splits and aug.no_aug, "--aug-splits needs augmentation: leave --no-aug out"),
        (splits and kind in STREAMED, f"--aug-splits does not go with streamed data (--dataset {data.dataset})"),
        (aug.aug_repeats and kind in STREAMED, f"--aug-repeats does not go with streamed data ({data.dataset})"),
        (
            device.split_bn and not (splits or aug.resplit),
            "--split-bn needs a split batch: give --aug-splits 2 or more, or --resplit",
        ),
        (device.split_bn and device.sync_bn, "--split-bn and --sync-bn exclude each other"),
        (
            device.split_bn and not splits and run.batch_size % 2,
            f"--split-bn halves the batch: --batch-size must be even, got {run.batch_size}",
        ),
        (options.mixing.mixup_off_epoch and not mixes, "--mixup-off-epoch needs --mixup or --cutmix"),
        # loss
        (len(chosen) > 1, f"{' and '.join(chosen)} exclude each other"),
        (of_bce and loss != "bce", f"{_join(of_bce[:1])} is an option of the bce loss: give --loss bce"),
        (loss in ("twoway", "zlpr") and not data.multi_label, f"--loss {loss} needs --multi-label"),
        (
            loss in ("twoway", "zlpr") and (losses.smoothing or mixes),
            f"--loss {loss} takes targets 0 and 1: no --smoothing, --mixup or --cutmix",
        ),
        (loss == "asl" and mixes and not data.multi_label, "--loss asl does not go with --mixup and --cutmix"),
        (loss in ("ce", "jsd") and data.multi_label, f"--multi-label does not go with the {loss} loss"),
        (for_rare and not_for_rare, f"{_join(for_rare[:1])} does not go with {_join(not_for_rare[:1])}"),
        (options.head.head_init == "data" and data.multi_label, "--head-init data does not go with --multi-label"),
        (options.head.head_refit is not None and not_refit, f"--head-refit does not go with {_join(not_refit[:1])}"),
        (teacher and data.multi_label, "--kd-model-name does not go with --multi-label"),
        (of_teacher and not teacher, f"{_join(of_teacher[:1])} needs a teacher: give --kd-model-name"),
        # contrastive losses
        (contrastive.contrastive and not_contrastive, f"--contrastive does not go with {_join(not_contrastive[:1])}"),
        (
            contrastive.contrastive and contrastive.views == 1 and contrastive.samples_per_class < 2,
            "--contrastive needs several images of a class in a batch: give --samples-per-class 4, or --views 2",
        ),
        (contrastive.views > 1 and splits, "--views and --aug-splits exclude each other"),
        (contrastive.views > 1 and mixes, "--views does not go with --mixup and --cutmix"),
        (
            contrastive.samples_per_class and kind in STREAMED,
            f"--samples-per-class does not go with streamed data (--dataset {data.dataset})",
        ),
        (contrastive.samples_per_class and data.multi_label, "--samples-per-class does not go with --multi-label"),
        (contrastive.samples_per_class and aug.aug_repeats, "--samples-per-class and --aug-repeats exclude each other"),
        # what learns
        (len(partly) > 1, f"{' and '.join(partly)} exclude each other"),
        (
            learning.cache_features and not learning.head_only,
            "--cache-features needs a backbone that stays: give --head-only",
        ),
        (learning.cache_views and not learning.cache_features, "--cache-views needs --cache-features"),
        (learning.cache_features and uncached, f"--cache-features does not go with {_join(uncached[:1])}"),
        # staying near the start
        (
            (kept := [*near, *["--freeze-norms"] * learning.freeze_norms])
            and not (model.pretrained or model.pretrained_path or model.initial_checkpoint),
            f"{_join(kept[:1])} keeps weights near their start, and those of --model {model.model} are random. Give "
            "--pretrained, or leave it out",
        ),
        (
            near and learning.head_only,
            f"{_join(near[:1])} is for a backbone that trains, and --head-only does not train it. Choose one",
        ),
        (near and device.fsdp, f"{_join(near[:1])} does not work under --fsdp. Leave one of them out"),
        (
            options.start.wise_ft == AUTO and not data.val_split,
            "--wise-ft auto chooses on the validation images: give --val-split, or a number",
        ),
        # precision and processes
        (
            device.amp and device.model_dtype not in (None, "float32"),
            f"--amp needs weights in float32: leave --model-dtype {device.model_dtype} out",
        ),
        (device.torchcompile_mode and not device.torchcompile, "--torchcompile-mode needs --torchcompile"),
        (device.fsdp and run.model_ema, "--model-ema does not work under --fsdp. Leave one of them out"),
        # logging
        (
            of_wandb and not (logging.log_wandb or "wandb" in logging.log_with),
            f"{_join(of_wandb[:1])} needs --log-wandb",
        ),
        (logging.wandb_resume_id and not options.checkpoints.resume, "--wandb-resume-id needs --resume"),
        (
            (options.finish.hub_private or options.finish.hub_license) and not options.finish.push_to_hub,
            "--hub-private and --hub-license need --push-to-hub",
        ),
    )
    for broken, message in rules:
        if broken:
            raise UserError(message)


def _join(values: Sequence[Any]) -> str:
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
