"""The command line: timm's flag names, a few of our own, and YAML recipes.

A recipe is turned into command-line words and put in front of the real ones, so that it goes through the same
type and choice checks and the command line wins because it comes last.
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from accelerate.utils import DynamoBackend
from timm.utils import ParseKwargs

from timm_faim.training.errors import UserError, did_you_mean

DEMO_RECIPE = Path(__file__).parents[1] / "configs" / "omniglot.yaml"

# Options of FAIM models. A recipe may carry them while the command line picks a plain timm model as a baseline.
FAIM_ONLY = ("faim_cfg", "head_init", "damp_epochs")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing the whole usage before the message."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists every option)")


class _Flag(argparse.BooleanOptionalAction):
    """`--x` and `--no-x`, so that the command line can switch off what a recipe switches on."""


def build_parser() -> Parser:
    """The parser; its destinations are the keys of a recipe."""
    parser = Parser(
        prog="train_faim.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a FAIM model, or any timm model, on real images. Without data options it trains on the "
                    "bundled Omniglot characters.",
    )
    parser.add_argument("-c", "--config", metavar="YAML", help="recipe: flag names with underscores as keys")

    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="folder with train/ and val/, one folder of images per class in each")
    add("--dataset", default="", metavar="TYPE/NAME",
        help="timm's dataset type and name (empty: image folder), or omniglot242 for the bundled data")
    add("--dataset-download", action=_Flag, default=False, help="let a torch/ or hfds/ data set download itself")
    add("--train-split", default="train", metavar="NAME", help="training split or folder")
    add("--val-split", default="validation", metavar="NAME", help="validation split or folder")
    add("--class-map", default="", metavar="FILE", help="class names in the order of their indices")
    add("--input-img-mode", metavar="MODE", help="PIL mode of the images (default: L for one channel, else RGB)")
    add("--skip-unreadable", action=_Flag, default=False,
        help="go on without images that cannot be read, and count them; otherwise they are an error")
    add("-j", "--workers", type=int, default=4, metavar="N", help="loader processes per training process")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="faim_resnet50", metavar="NAME", help="a timm name with the prefix faim_, or without it")
    add("--pretrained", action=_Flag, default=False, help="start from timm's pretrained weights")
    add("--initial-checkpoint", default="", metavar="FILE", help="load these weights into the new model")
    add("--num-classes", type=int, metavar="N", help="number of classes (default: that of the data)")
    add("--drop", type=float, metavar="P", help="dropout before the classifier")
    add("--drop-path", type=float, metavar="P", help="stochastic depth")
    add("--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE",
        help="further arguments of timm.create_model")
    add("--grad-checkpointing", action=_Flag, default=False, help="recompute activations to save memory")
    add("--channels-last", action=_Flag, default=False, help="channels-last memory layout")

    add = parser.add_argument_group("FAIM head").add_argument
    add("--faim-cfg", nargs="*", action=ParseKwargs, default=None, metavar="KEY=VALUE",
        help="options of the head, for example normalize=True margin=0.2; replaces those of the recipe")
    add("--head-init", choices=("random", "data"), default="random",
        help="data: class means and within-class variance of the backbone's features")
    add("--damp-epochs", type=int, default=0, metavar="N", help="fade the 1-form in over the first N epochs")

    add = parser.add_argument_group("input size and normalisation (default: the model's)").add_argument
    add("--img-size", type=int, metavar="N", help="height and width in pixels")
    add("--in-chans", type=int, metavar="N", help="input channels")
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="channels, height and width")
    add("--crop-pct", type=float, metavar="P", help="share of the resized image kept in validation")
    add("--mean", type=float, nargs="+", metavar="M", help="mean of the pixels, per channel, in 0..1")
    add("--std", type=float, nargs="+", metavar="S", help="standard deviation of the pixels, per channel")
    add("--interpolation", default="", help="resize interpolation")

    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true", help="resize and crop only (--affine still applies)")
    add("--scale", type=float, nargs=2, default=[0.08, 1.0], metavar=("MIN", "MAX"), help="share of area kept by crop")
    add("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], metavar=("MIN", "MAX"), help="aspect ratio of the crop")
    add("--hflip", type=float, default=0.5, metavar="P", help="horizontal flip")
    add("--vflip", type=float, default=0.0, metavar="P", help="vertical flip")
    add("--color-jitter", type=float, default=0.4, metavar="F", help="colour jitter")
    add("--aa", metavar="POLICY", help="AutoAugment or RandAugment policy, for example rand-m9-mstd0.5")
    add("--affine", type=float, nargs=4, metavar=("DEG", "TRANSLATE", "SCALE", "SHEAR"),
        help="random affine map before the crop: rotation up to DEG degrees, shift up to a share TRANSLATE of the "
             "size, scale within 1 -+ SCALE, shear up to SHEAR degrees")
    add("--affine-fill", type=int, metavar="V", help="grey value 0..255 outside the image (default: the mean)")
    add("--reprob", type=float, default=0.0, metavar="P", help="random erasing")
    add("--remode", default="pixel", help="random erasing mode")
    add("--recount", type=int, default=1, help="random erasing count")
    add("--mixup", type=float, default=0.0, metavar="ALPHA", help="mixup")
    add("--cutmix", type=float, default=0.0, metavar="ALPHA", help="cutmix")
    add("--mixup-prob", type=float, default=1.0, metavar="P", help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing ratio")

    add = parser.add_argument_group("loss and optimiser").add_argument
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--bce-loss", action=_Flag, default=False, help="binary cross entropy")
    add("--opt", default="sgd", help="optimiser")
    add("--opt-eps", type=float, metavar="EPS", help="optimiser epsilon")
    add("--opt-betas", type=float, nargs="+", metavar="B", help="optimiser betas")
    add("--momentum", type=float, default=0.9, help="optimiser momentum")
    add("--weight-decay", type=float, default=2e-5, help="weight decay")
    add("--clip-grad", type=float, metavar="NORM", help="gradient clipping")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="gradient clipping mode")
    add("--layer-decay", type=float, metavar="F", help="layer-wise learning-rate decay")
    add("--grad-accum-steps", type=int, default=1, metavar="N", help="batches per update")

    add = parser.add_argument_group("learning rate and schedule").add_argument
    add("--lr", type=float, help="learning rate; overrides --lr-base")
    add("--lr-base", type=float, default=0.1, help="learning rate for a global batch of --lr-base-size")
    add("--lr-base-size", type=int, default=256, metavar="N", help="global batch size of --lr-base")
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"),
        help="how the rate follows the batch (empty: sqrt for Adam's family and LAMB, else linear)")
    add("--sched", default="cosine", help="schedule",
        choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"))
    add("--sched-on-updates", action=_Flag, default=False, help="step the schedule after every update")
    add("--epochs", type=int, default=300, help="epochs")
    add("--min-lr", type=float, default=0.0, help="lowest learning rate")
    add("--warmup-lr", type=float, default=1e-5, help="learning rate at the start of the warm-up")
    add("--warmup-epochs", type=int, default=5, help="epochs of warm-up")
    add("--warmup-prefix", action=_Flag, default=False, help="do not count the warm-up in --epochs")
    add("--cooldown-epochs", type=int, default=0, help="epochs at the lowest rate after the schedule")
    add("--decay-epochs", type=float, default=90, help="interval of step decay")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs of multistep decay")
    add("--decay-rate", type=float, default=0.1, help="decay rate")
    add("--patience-epochs", type=int, default=10, help="patience of plateau")

    add = parser.add_argument_group("run").add_argument
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images per process and step")
    add("-vb", "--validation-batch-size", type=int, metavar="N", help="the same in validation")
    add("--model-ema", action=_Flag, default=False, help="average the weights; the average is evaluated and saved")
    add("--model-ema-decay", type=float, default=0.9998, help="decay of the average")
    add("--model-ema-warmup", action=_Flag, default=False, help="raise the decay over the first updates")
    add("--dist-bn", default="reduce", choices=("reduce", "broadcast", ""),
        help="how processes agree on batch-norm statistics before an evaluation")
    add("--amp", action=_Flag, default=False, help="mixed precision (default: what `accelerate launch` says)")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="low precision type of --amp")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    add("--cpu-threads", type=int, metavar="N",
        help="threads per process on the CPU (default: the cores shared out; `accelerate launch` alone leaves one)")
    add("--seed", type=int, default=42, help="random seed; each process adds its rank for augmentation")
    add("--output", default="./output", metavar="DIR", help="folder of runs")
    add("--experiment", default="", metavar="NAME", help="folder of this run (default: time, model and size)")
    add("--log-interval", type=int, default=50, metavar="N", help="steps between updates of the progress bar")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Options from defaults, then the recipe, then the command line; the later wins.

    Without any of --config, --data-dir and --dataset the bundled Omniglot recipe is the recipe.

    Raises:
        UserError: unknown flag or key (with the nearest known one), wrong type, impossible combination.
    """
    parser = build_parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]
    try:
        line, unknown = parser.parse_known_args(argv)
    except ValueError as e:  # ParseKwargs splits at the first =
        raise UserError("--faim-cfg and --model-kwargs take KEY=VALUE, for example normalize=True") from e
    if unknown:
        raise UserError(f"unknown option {unknown[0]}.{did_you_mean(unknown[0].split('=')[0], flags)}")

    recipe = line.config
    if not (recipe or line.data_dir or line.dataset):
        recipe = str(DEMO_RECIPE)
    words = _recipe_words(parser, Path(recipe)) if recipe else []
    args = parser.parse_args([*words, *argv])
    args.config = recipe

    if not is_faim(args.model):
        given = [key for key in FAIM_ONLY if any(w.split("=")[0] == _flag(key) for w in argv)]
        if given:
            raise UserError(f"{_flag(given[0])} is for FAIM models, and --model {args.model} has no FAIM head. "
                            f"Use --model faim_{args.model} or leave {_flag(given[0])} out")
        for key in FAIM_ONLY:
            setattr(args, key, parser.get_default(key))
    _check(args)
    return args


def is_faim(model_name: str) -> bool:
    """Whether a name may have a FAIM head: a faim_ twin, or a saved model whose architecture is not known yet."""
    return model_name.startswith("faim_") or ":" in model_name


def as_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a recipe that repeats the run (without the ones that are unset)."""
    return {key: value for key, value in vars(args).items() if value is not None and key != "config"}


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _recipe_words(parser: Parser, path: Path) -> list[str]:
    """Command-line words that say what the recipe says."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read --config {path}: {e.strerror}. Give the path of a YAML file") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(e).split())}") from e
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `key: value` lines, got {type(recipe).__name__}")

    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    words: list[str] = []
    for key, value in recipe.items():
        if key not in actions:
            raise UserError(f"unknown key {key!r} in {path}.{did_you_mean(str(key), actions)}")
        if value is None:
            continue
        action, flag = actions[key], _flag(key)
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{key} in {path} must be true or false, got {value!r}")
            if value:
                words.append(flag)
            elif isinstance(action, _Flag):
                words.append(f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            words += [flag, *(f"{k}={v!r}" for k, v in value.items())]
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words.append(f"{flag}={value}")  # one word: an empty or negative value stays a value
    return words


def _check(args: argparse.Namespace) -> None:
    at_least_one = ("num_classes", "batch_size", "validation_batch_size", "epochs", "grad_accum_steps", "log_interval",
                    "in_chans", "img_size", "cpu_threads")
    for key in at_least_one:
        value = getattr(args, key)
        if value is not None and value < 1:
            raise UserError(f"{_flag(key)} must be at least 1, got {value}")
    for key in ("workers", "damp_epochs", "warmup_epochs", "cooldown_epochs", "mixup", "cutmix"):
        if getattr(args, key) < 0:
            raise UserError(f"{_flag(key)} must not be negative, got {getattr(args, key)}")
    if args.torchcompile and args.torchcompile.upper() not in DynamoBackend.__members__:
        raise UserError(f"unknown --torchcompile {args.torchcompile}."
                        f"{did_you_mean(args.torchcompile, [b.lower() for b in DynamoBackend.__members__])}")
    if not (args.data_dir or args.dataset):
        raise UserError(f"no data: give --data-dir or --dataset, on the command line or in {args.config}")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise UserError(f"--mixup and --cutmix pair up images: --batch-size must be even, got {args.batch_size}")
