"""The command line: defaults, then a YAML recipe, then flags, and the checks between options.

A recipe is turned into command-line words and put in front of the real ones, so that it goes through the same
type and choice checks and the command line wins because it comes last.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DynamoBackend
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from timm_faim.documents import read_yaml
from timm_faim.images.datasets import dataset_type
from timm_faim.models import may_be_converted
from timm_faim.models.config import resolve_faim_cfg
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.weights import saved_faim_cfg
from timm_faim.training.contrastive import parse_losses
from timm_faim.training.flags import FAIM_ONLY, ONE_LAUNCH, TRAINING_ONLY, Parser, build_parser, switch
from timm_faim.training.removed import REMOVED, without_removed

DEMO_RECIPE = Path(__file__).parents[1] / "configs" / "omniglot.yaml"
WARM_UP = 5  # epochs, unless a run is no longer than that
STREAMED = ("hfids", "wds", "tfds")  # types of --dataset that can only be read from the beginning
MODES = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2, "CMYK": 4, "YCbCr": 3, "HSV": 3, "LAB": 3}  # Pillow's, with 8 bits
WITH_FIELDS = ("hfds", *STREAMED)  # types of --dataset whose samples have named fields


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Options from defaults, then the recipe, then the command line; the later wins.

    Without any of --config, --data-dir, --dataset and --resume PATH the bundled Omniglot recipe is the recipe. With
    --resume PATH and no --config it is the args.yaml of that run.

    Raises:
        UserError: unknown flag or key (with the nearest known one), wrong type, impossible combination.
    """
    parser = build_parser()
    line = _parse_line(parser, argv)
    if line.data and line.data_dir:
        raise UserError(f"two folders of data: {line.data} and --data-dir {line.data_dir}. Give one of them")
    recipe, skip, has_data = line.config, (), bool(line.data or line.data_dir or line.dataset)
    if not recipe and line.resume not in ("", "auto"):
        recipe, skip = _recipe_of_run(line.resume, has_data), (*ONE_LAUNCH, *(REMOVED if line.eval_only else ()))
    elif not (recipe or has_data):
        recipe = str(DEMO_RECIPE)
    # The last word keeps a positional DIR from becoming a value of the recipe's last list.
    words = [*_recipe_words(parser, Path(recipe), skip), f"--config={recipe}"] if recipe else []
    args = _parse_line(parser, [*words, *argv])
    args.config, args.data_dir = recipe, args.data or args.data_dir
    if skip and recipe and line.faim_cfg is None and line.faim_blocks is None:
        _keep_head_of_run(args, Path(recipe).parent)
    del args.data

    if not is_faim(args.model):
        given = [key for key in FAIM_ONLY if any(w.split("=")[0] == _flag(key) for w in argv)]
        if given:
            raise UserError(f"{_flag(given[0])} is for FAIM models, and --model {args.model} has no FAIM head. "
                            f"Use --model faim_{args.model} or leave {_flag(given[0])} out")
        for key in FAIM_ONLY:
            setattr(args, key, parser.get_default(key))
    if args.eval_only:
        if line.push_to_hub:
            raise UserError("--push-to-hub publishes a training. Publish a run with python -m timm_faim.hub push")
        _choose_evaluated(parser, args, line.experiment)
    in_line = any(word.split("=")[0] == "--head-refit" for word in argv)
    if args.head_refit == -1 or not in_line and _without_refit(args):
        args.head_refit = None  # that of a recipe gives way to what it does not go with
    if line.epochs != parser.get_default("epochs") and line.warmup_epochs is None and not args.warmup_prefix \
            and (args.warmup_epochs or 0) >= args.epochs:
        args.warmup_epochs = None  # that of a recipe gives way to a shorter run
    _complete(args)
    _check_values(args)
    _check_combinations(args)
    return args


def _choose_evaluated(parser: Parser, args: argparse.Namespace, experiment: str) -> None:
    """--eval-only opens trained weights: of the run that --resume names, of --initial-checkpoint, or of --model.

    `experiment` is that of the command line: the run's own folder is not the evaluation's.
    """
    args.experiment, args.head_init_scale, args.head_init_bias = experiment, None, None
    if args.resume == "auto":
        raise UserError("--eval-only with --resume auto does not say what to evaluate. Name the run folder")
    if args.resume:
        folder = Path(args.resume).absolute()
        if folder.name.startswith("checkpoint-"):
            raise UserError(f"--eval-only evaluates the best weights of a run, and {folder.name} holds those that "
                            f"training goes on from. Name the run: --resume {folder.parents[1]}; single epochs are "
                            "--initial-checkpoint files in its folder top/")
        for action in parser._actions:  # of the run's options only those of data and images matter
            if action.dest in TRAINING_ONLY:
                setattr(args, action.dest, action.default)
        args.model, args.resume, args.initial_checkpoint, args.pretrained_path = f"local-dir:{folder}", "", "", None
        args.faim_cfg, args.faim_blocks, args.model_kwargs = None, None, {}
    args.pretrained = not args.initial_checkpoint


def is_faim(model_name: str) -> bool:
    """Whether a name may have a FAIM head: a faim_ twin, or a saved model whose architecture is not known yet."""
    return model_name.startswith("faim_") or ":" in model_name


def _without_refit(args: argparse.Namespace) -> list[str]:
    """What among the options --head-refit does not go with."""
    return [flag for flag, on in (
        ("--multi-label", args.multi_label), ("--cache-features", args.cache_features), ("--fsdp", args.fsdp),
        ("--aug-splits", args.aug_splits), ("--epochs 0, whose heads --head-init data fits", not args.epochs),
        (f"--dataset {args.dataset}", dataset_type(args.dataset) in STREAMED)) if on]


def as_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a recipe that repeats the run (without the ones that are unset)."""
    return {key: value for key, value in vars(args).items() if value is not None and key != "config"}


def mixes_images(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on, so that targets are soft."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def loss_name(args: argparse.Namespace) -> str:
    """The loss by timm's name, whichever flag chose it."""
    return args.loss or ("bce" if args.bce_loss or args.multi_label and not args.jsd_loss else
                         "jsd" if args.jsd_loss else "ce")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _parse_line(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    without_removed({word.split("=")[0].replace("--no-", "--")[2:].replace("-", "_"): word
                     for word in words if word.startswith("--")}, "")
    try:
        args, unknown = parser.parse_known_args(words)
    except ValueError as e:  # ParseKwargs splits at the first =
        raise UserError("--faim-cfg, --model-kwargs and --opt-kwargs take KEY=VALUE, for example margin=0.2") from e
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = next((word for word in unknown if word.startswith("-")), None)
        if word is None:
            raise UserError(f"cannot place {unknown[0]!r}: one folder of data is expected, or a flag (--help)")
        raise UserError(f"unknown option {word}.{did_you_mean(word.split('=')[0], flags)}")
    return args


def _recipe_of_run(resume: str, has_data: bool) -> str | None:
    """args.yaml of the run folder that --resume names, directly or by one of its checkpoints."""
    folder = Path(resume)
    for path in (folder, *folder.absolute().parents[:2]) if folder.name.startswith("checkpoint-") else (folder,):
        if (path / "args.yaml").is_file():
            return str(path / "args.yaml")
    if has_data:
        return None
    raise UserError(f"--resume {resume}: no args.yaml there. Name a run folder or a checkpoint in it, or say how "
                    "to train with --config or --data-dir")


def _keep_head_of_run(args: argparse.Namespace, folder: Path) -> None:
    """Take the head's options from the run's config.json where this version would resolve its args.yaml to others."""
    saved = saved_faim_cfg(folder)
    if saved is None or ":" in args.model or not is_faim(args.model) or args.pretrained and may_be_converted(saved):
        return
    given = {**(args.faim_cfg or {}), **({} if args.faim_blocks is None else {"blocks": args.faim_blocks})}
    try:
        now = resolve_faim_cfg(given)
    except (ValueError, TypeError):
        return  # an error of its own, later
    if any(now[key] != saved[key] for key in now if key not in given and key != "prior"):
        args.faim_cfg, args.faim_blocks = saved, None


def _recipe_words(parser: Parser, path: Path, skip: Sequence[str] = ()) -> list[str]:
    """Command-line words that say what the recipe says, without the keys in `skip`."""
    try:
        recipe = read_yaml(path)
    except OSError as e:
        raise UserError(f"cannot read --config {path}: {e.strerror}. Give the path of a YAML file") from e
    except ValueError as e:
        raise UserError(f"--config {path} is not valid YAML: {e}") from e
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `key: value` lines, got {type(recipe).__name__}")

    actions = {a.dest: a for a in parser._actions if a.option_strings and a.dest not in ("help", "help_all", "config")}
    words: list[str] = []
    recipe = without_removed({key: value for key, value in recipe.items() if key not in skip}, f" of {path}")
    for key, value in recipe.items():
        if key not in actions:
            raise UserError(f"unknown key {key!r} in {path}.{did_you_mean(str(key), actions)}")
        if value is None:
            continue
        action, flag = actions[key], _flag(key)
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} in {path} must be true or false, got {value!r}")
            word = switch(action, value)
            words += [word] if word else []
        elif isinstance(value, dict):
            words += [flag, *(_value_word(key, f"{k}={v!r}", path) for k, v in value.items())]
        elif isinstance(value, list):
            words += [flag, *(_value_word(key, item, path) for item in value)]
        else:
            words.append(f"{flag}={value}")  # one word: an empty or negative value stays a value
    return words


def _value_word(key: str, item: Any, path: Path) -> str:
    """An item of a list as a word that cannot be read as a flag."""
    word = str(item)
    if word.startswith("-") and not isinstance(item, (int, float)):
        raise UserError(f"{key} in {path} holds {word!r}; items of a list must not begin with a dash")
    return word


def _complete(args: argparse.Namespace) -> None:
    """Defaults that follow from other options, and one spelling of what can be said in two ways."""
    if args.smoothing is None:
        args.smoothing = 0.0 if args.multi_label else 0.1
    if args.warmup_epochs is None:
        args.warmup_epochs = WARM_UP if args.epochs > WARM_UP else args.epochs // 2
    if args.eval_metric is None:
        args.eval_metric = "loss" if not args.val_split else _evaluator(args).default_metric
    for key in ("cutmix_minmax", "freeze", "lr_noise", "contrastive"):  # an empty list takes back what a recipe gives
        setattr(args, key, getattr(args, key) or None)


def _evaluator(args: argparse.Namespace) -> type[ClassificationEvaluator]:
    return MultiLabelClassificationEvaluator if args.multi_label else ClassificationEvaluator


def _check_values(args: argparse.Namespace) -> None:
    """Each value by itself."""
    for key in ("scale", "ratio", "lr_noise", "decay_milestones"):
        values = getattr(args, key) or []
        if list(values) != sorted(values):
            raise UserError(f"{_flag(key)} takes numbers in rising order, got {_join(values)}")
    if args.affine and (max(args.affine[1:3]) > 1 or args.affine[2] == 1 or args.affine[3] >= 90):
        raise UserError("--affine takes DEG in 0..180, TRANSLATE in 0..1, SCALE below 1 and SHEAR below 90, got "
                        f"{_join(args.affine)}")
    if args.aug_splits == 1:
        raise UserError(f"--aug-splits must be 0 or at least 2, got {args.aug_splits}")
    if args.cutmix_minmax and not (len(args.cutmix_minmax) == 2 and args.cutmix_minmax[0] < args.cutmix_minmax[1]):
        raise UserError(f"--cutmix-minmax takes MIN < MAX in 0..1, got {_join(args.cutmix_minmax)}")
    if args.lr_noise and len(args.lr_noise) > 2:
        raise UserError(f"--lr-noise takes one or two shares of the run, got {_join(args.lr_noise)}")
    _check_channels(args)
    parse_losses(args.contrastive or ())
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        raise UserError(f"--start-epoch {args.start_epoch} leaves none of the {args.epochs} epochs. Raise --epochs")
    if args.torchcompile and args.torchcompile.upper() not in DynamoBackend.__members__:
        raise UserError(f"unknown --torchcompile {args.torchcompile}."
                        f"{did_you_mean(args.torchcompile, [b.lower() for b in DynamoBackend.__members__])}")
    metrics = _evaluator(args).metric_names
    if args.eval_metric not in metrics:
        raise UserError(f"--eval-metric {args.eval_metric} is not computed. Choose one of {', '.join(metrics)}")
    for name in args.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"unknown --log-with {name}.{did_you_mean(name, LOGGER_TYPE_TO_CLASS)} "
                            f"Accelerate has {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if not (args.data_dir or args.dataset):
        raise UserError("no data: give --data-dir or --dataset, on the command line or in "
                        f"{args.config or 'a recipe'}")


def _check_channels(args: argparse.Namespace) -> None:
    """The model's input has the channels of the images' mode."""
    chans = args.input_size[0] if args.input_size else args.in_chans
    mode = args.input_img_mode or ("L" if chans == 1 else "RGB")
    if mode not in MODES:
        raise UserError(f"unknown --input-img-mode {mode}.{did_you_mean(mode, MODES)} Modes are {', '.join(MODES)}")
    if chans is not None and chans != MODES[mode]:
        fitting = " or ".join(name for name, count in MODES.items() if count == chans)
        mend = f"Give --input-img-mode {fitting}" if fitting else "Images have 1 to 4 channels"
        raise UserError(f"--{'input-size' if args.input_size else 'in-chans'} {chans}: images of mode {mode} have "
                        f"{MODES[mode]} channels. {mend}")


def _check_combinations(args: argparse.Namespace) -> None:
    """Options that need or exclude each other; the first rule that is broken is the error."""
    loss, mixes, splits = loss_name(args), mixes_images(args), args.aug_splits > 1
    kind = dataset_type(args.dataset)
    chosen = [flag for flag, on in (("--loss", args.loss), ("--bce-loss", args.bce_loss), ("--jsd-loss", args.jsd_loss))
              if on]
    partly = [flag for flag, on in (("--freeze", args.freeze), ("--head-only", args.head_only),
                                    ("--train-last", args.train_last is not None)) if on]
    of_bce = [flag for flag, on in (("--bce-sum", args.bce_sum), ("--bce-target-thresh", args.bce_target_thresh),
                                    ("--bce-pos-weight", args.bce_pos_weight)) if on]
    of_wandb = [flag for flag, on in (("--wandb-project", args.wandb_project), ("--wandb-tags", args.wandb_tags),
                                      ("--wandb-resume-id", args.wandb_resume_id)) if on]
    of_teacher = [flag for flag, on in (("--distill-loss-weight", args.distill_loss_weight is not None),
                                        ("--task-loss-weight", args.task_loss_weight is not None)) if on]
    uncached = [flag for flag, on in (("--mixup and --cutmix", mixes), ("--aug-splits", splits),
                                      ("--kd-model-name", args.kd_model_name), ("--fsdp", args.fsdp),
                                      ("--contrastive", args.contrastive), ("--views", args.views > 1),
                                      ("--samples-per-class", args.samples_per_class),
                                      (f"--dataset {args.dataset}", kind in STREAMED)) if on]
    not_contrastive = [flag for flag, on in (
        ("--mixup and --cutmix", mixes), ("--multi-label", args.multi_label), ("--kd-model-name", args.kd_model_name),
        ("--aug-splits", splits), ("--fsdp", args.fsdp)) if on]
    not_refit = _without_refit(args)
    rules = (
        # data
        (args.multi_label and kind not in WITH_FIELDS,
         "--multi-label needs a data set whose images have several labels: --dataset hfds/, hfids/, wds/ or tfds/"),
        (args.target_format != "indices" and not args.multi_label, "--target-format is for --multi-label"),
        ((args.input_key or args.target_key) and kind not in WITH_FIELDS,
         "--input-key and --target-key are for --dataset hfds/, hfids/, wds/ and tfds/. Leave them out"),
        ((args.train_num_samples or args.val_num_samples) and kind not in STREAMED,
         "--train-num-samples and --val-num-samples are for streamed data (hfids/, wds/, tfds/). Leave them out"),
        (args.skip_unreadable and kind not in ("", "hfds"),
         "--skip-unreadable is for images that are read one by one (folders, tar files, hfds/), not for --dataset "
         f"{args.dataset}. Leave it out"),
        (args.epoch_repeats and kind not in ("hfids", "tfds"),
         "--epoch-repeats is for hfids/ and tfds/ data. Raise --epochs instead"),
        (not args.epochs and args.head_init != "data" and not args.eval_only,
         "--epochs 0 trains nothing: give --head-init data, which fits the FAIM heads in closed form, or more epochs"),
        (args.warmup_epochs >= args.epochs > 0 and args.warmup_epochs and args.sched not in ("none", "plateau")
         and not args.warmup_prefix and not args.eval_only,
         f"--warmup-epochs {args.warmup_epochs} leaves none of the {args.epochs} epochs at the full rate. Give at most "
         f"{args.epochs - 1}, or --warmup-prefix"),
        (not args.val_split and args.eval_only, "--eval-only needs validation data: give --val-split"),
        (not args.val_split and args.sched == "plateau",
         "--sched plateau follows the validation: give --val-split or choose another --sched"),
        # mixing and splitting
        (mixes and args.batch_size % 2,
         f"--mixup and --cutmix pair up images: --batch-size must be even, got {args.batch_size}"),
        (mixes and splits, "--mixup and --cutmix do not go with --aug-splits. Choose one"),
        (mixes and loss == "jsd", "--mixup and --cutmix do not go with the jsd loss. Choose one"),
        (loss == "jsd" and not splits, "the jsd loss compares views of an image: give --aug-splits 2 or more"),
        (splits and args.no_aug, "--aug-splits needs augmentation: leave --no-aug out"),
        (splits and kind in STREAMED, f"--aug-splits does not go with streamed data (--dataset {args.dataset})"),
        (args.aug_repeats and kind in STREAMED, f"--aug-repeats does not go with streamed data ({args.dataset})"),
        (args.split_bn and not (splits or args.resplit),
         "--split-bn needs a split batch: give --aug-splits 2 or more, or --resplit"),
        (args.split_bn and args.sync_bn, "--split-bn and --sync-bn exclude each other"),
        (args.split_bn and not splits and args.batch_size % 2,
         f"--split-bn halves the batch: --batch-size must be even, got {args.batch_size}"),
        (args.mixup_off_epoch and not mixes, "--mixup-off-epoch needs --mixup or --cutmix"),
        # loss
        (len(chosen) > 1, f"{' and '.join(chosen)} exclude each other"),
        (of_bce and loss != "bce", f"{_join(of_bce[:1])} is an option of the bce loss: give --loss bce"),
        (loss in ("twoway", "zlpr") and not args.multi_label, f"--loss {loss} needs --multi-label"),
        (loss in ("twoway", "zlpr") and (args.smoothing or mixes),
         f"--loss {loss} takes targets 0 and 1: no --smoothing, --mixup or --cutmix"),
        (loss == "asl" and mixes and not args.multi_label, "--loss asl does not go with --mixup and --cutmix"),
        (loss in ("ce", "jsd") and args.multi_label, f"--multi-label does not go with the {loss} loss"),
        (args.head_init == "data" and args.multi_label, "--head-init data does not go with --multi-label"),
        (args.head_refit is not None and not_refit, f"--head-refit does not go with {_join(not_refit[:1])}"),
        (args.kd_model_name and args.multi_label, "--kd-model-name does not go with --multi-label"),
        (of_teacher and not args.kd_model_name, f"{_join(of_teacher[:1])} needs a teacher: give --kd-model-name"),
        # contrastive losses
        (args.contrastive and not_contrastive, f"--contrastive does not go with {_join(not_contrastive[:1])}"),
        (args.contrastive and args.views == 1 and args.samples_per_class < 2,
         "--contrastive needs several images of a class in a batch: give --samples-per-class 4, or --views 2"),
        (args.views > 1 and splits, "--views and --aug-splits exclude each other"),
        (args.views > 1 and mixes, "--views does not go with --mixup and --cutmix"),
        (args.samples_per_class and kind in STREAMED,
         f"--samples-per-class does not go with streamed data (--dataset {args.dataset})"),
        (args.samples_per_class and args.multi_label, "--samples-per-class does not go with --multi-label"),
        (args.samples_per_class and args.aug_repeats, "--samples-per-class and --aug-repeats exclude each other"),
        # what learns
        (len(partly) > 1, f"{' and '.join(partly)} exclude each other"),
        (args.cache_features and not args.head_only, "--cache-features needs a backbone that stays: give --head-only"),
        (args.cache_views and not args.cache_features, "--cache-views needs --cache-features"),
        (args.cache_features and uncached, f"--cache-features does not go with {_join(uncached[:1])}"),
        # precision and processes
        (args.amp and args.model_dtype not in (None, "float32"),
         f"--amp needs weights in float32: leave --model-dtype {args.model_dtype} out"),
        (args.torchcompile_mode and not args.torchcompile, "--torchcompile-mode needs --torchcompile"),
        (args.fsdp and args.model_ema, "--model-ema does not work under --fsdp. Leave one of them out"),
        # logging
        (of_wandb and not (args.log_wandb or "wandb" in args.log_with), f"{_join(of_wandb[:1])} needs --log-wandb"),
        (args.wandb_resume_id and not args.resume, "--wandb-resume-id needs --resume"),
        ((args.hub_private or args.hub_license) and not args.push_to_hub,
         "--hub-private and --hub-license need --push-to-hub"),
    )
    for broken, message in rules:
        if broken:
            raise UserError(message)


def _join(values: Sequence[Any]) -> str:
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
