"""The flags of train_faim.py: those of timm's train.py under timm's names, and a few of our own.

docs/training.md lists timm's flags one by one, with what became of each.
"""
import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from timm.utils import ParseKwargs

from timm_faim.run.errors import UserError
from timm_faim.run.numbers import MANY, SHARE, Number, above, real, whole

# Options of FAIM models. A recipe may carry them while the command line picks a plain timm model as a baseline.
FAIM_ONLY = ("faim_cfg", "pretrained_head", "faim_blocks", "head_init", "head_refit", "lr_scale_scalars", "contrastive",
             "contrastive_temperature", "contrastive_margin")

# Options of one launch. A run that is resumed by its folder alone takes the others from its args.yaml.
ONE_LAUNCH = ("resume", "no_resume_opt", "start_epoch", "stop_epoch", "dry_run", "eval_only")

# Options that --help lists; the others are in --help-all.
USUAL = ("help", "help_all", "data", "config", "data_dir", "dataset", "val_split", "workers", "model", "pretrained",
         "faim_cfg", "head_init", "head_refit", "head_only", "cache_features", "lr_scale_mu", "img_size", "aa", "mixup",
         "smoothing", "contrastive", "kd_model_name", "opt", "lr", "weight_decay", "epochs", "warmup_epochs", "amp",
         "batch_size", "seed", "output", "experiment", "eval_only", "dry_run", "resume", "push_to_hub")

# Options that an evaluation of a run does not take over: they do nothing there, or need a training.
TRAINING_ONLY = ("fsdp", "model_ema", "sync_bn", "split_bn", "resplit", "log_with", "log_wandb", "wandb_project",
                 "wandb_tags", "wandb_resume_id", "push_to_hub", "hub_private", "hub_license", "kd_model_name",
                 "distill_loss_weight", "task_loss_weight", "freeze", "head_only", "train_last", "cache_features",
                 "cache_views", "aug_splits", "jsd_loss", "aug_repeats", "mixup", "cutmix", "cutmix_minmax",
                 "mixup_off_epoch", "head_init", "head_refit", "contrastive", "views", "samples_per_class")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing the whole usage before the message; numbers are values however written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+).*?: (must be .*)", message, re.DOTALL):
            raise UserError(" ".join(match.groups()))
        raise UserError(f"{message} (--help-all lists every option)")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults, where there is one, and ranges after each help text."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_default = str(action.default) not in ("None", "False", "", "[]", "{}")
        text = super()._get_help_string(action) if has_default else action.help
        return f"{text} [{action.type}]" if isinstance(action.type, Number) else text


class _ShowHelp(argparse._HelpAction):
    """`--help` shows the usual options, `--help-all` every one."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        if self.dest == "help_all":
            super().__call__(parser, *args, **kwargs)
        formatter = parser._get_formatter()
        formatter.add_usage(parser.usage, (), ())
        formatter.add_text(parser.description)
        formatter.add_arguments(action for action in parser._actions if action.dest in USUAL)
        print(formatter.format_help(), end="")
        parser.exit()


class _Flag(argparse.BooleanOptionalAction):
    """`--x` and `--no-x`, so that the command line can switch off what a recipe switches on."""


class _Off(argparse.Action):
    """timm's flags `--no-x`, and `--x` to take one back that a recipe gives. The destination is `no_x`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        (flag,) = option_strings
        super().__init__([flag, flag.replace("--no-", "--")], dest, nargs=0, default=False, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, str(option_string).startswith("--no-"))


def switch(action: argparse.Action, value: bool) -> str | None:
    """The word that gives a flag without a value the value `value`; None for its default."""
    name = action.dest.replace("_", "-")
    if value:
        return f"--{name}"
    return f"--no-{name}" if isinstance(action, _Flag) else None


def build_parser() -> Parser:
    """The parser; its destinations are the keys of a recipe."""
    parser = Parser(
        prog="train_faim.py", usage="%(prog)s [DIR] [options]", allow_abbrev=False, formatter_class=_Help,
        add_help=False,
        description="Train a FAIM model, or any timm model, on real images. Without data options it trains on the "
                    "bundled Omniglot characters.",
    )
    parser.add_argument("-h", "--help", action=_ShowHelp, help="the options that are used most")
    parser.add_argument("--help-all", action=_ShowHelp, help="every option")
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("-c", "--config", metavar="YAML", help="recipe: flag names with underscores as keys")
    for add_group in (_data, _model, _faim, _freezing, _input, _augmentation, _mixing, _loss, _contrastive,
                      _distillation, _optimiser, _schedule, _device, _run, _resume, _logging):
        add_group(parser)
    return parser


def _data(parser: Parser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", metavar="DIR", help="folder with train/ and val/, one folder of images per class in each; "
                                          "or tar files, with --train-split train.tar --val-split val.tar")
    add("--dataset", default="", metavar="TYPE/NAME",
        help="hfds/, hfids/ (streamed), wds/, tfds/ or torch/ and a name; empty: image folder or tar; omniglot242: the "
             "bundled data")
    add("--dataset-download", action=_Flag, default=False,
        help="let a torch/ or tfds/ data set download itself, a hfids/ one download before it streams")
    add("--dataset-trust-remote-code", action=_Flag, default=False, help="let a hfds/ data set run its loading script")
    add("--train-split", default="train", metavar="NAME", help="training split or folder")
    add("--val-split", default="validation", metavar="NAME", help="validation split or folder; empty: no validation")
    add("--train-num-samples", type=whole(1, 10**12), metavar="N", help="training images of a streamed data set")
    add("--val-num-samples", type=whole(1, 10**12), metavar="N", help="validation images of a streamed data set")
    add("--class-map", default="", metavar="FILE", help="class names in the order of their indices")
    add("--input-img-mode", metavar="MODE", help="PIL mode of the images (default: L for one channel, else RGB)")
    add("--input-key", metavar="KEY", help="field of the image in a hfds/, hfids/, wds/ or tfds/ data set")
    add("--target-key", metavar="KEY", help="field of the label; several joined by commas: one class each")
    add("--multi-label", action=_Flag, default=False,
        help="any number of classes per image: targets are lists of indices, or as --target-format says")
    add("--target-format", default="indices", choices=("indices", "multihot"), help="form of multi-label targets")
    add("--multilabel-threshold", type=Number(float, 0, 1, above=True, below=True), default=0.5, metavar="P",
        help="probability from which a label counts")
    add("--skip-unreadable", action=_Flag, default=False,
        help="go on without images that cannot be read, and count them; otherwise they are an error")
    add("-j", "--workers", type=whole(0, 1024), default=min(4, available_cores()), metavar="N",
        help="loader processes per training process")


def _model(parser: Parser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="faim_resnet50", metavar="NAME", help="a timm name with the prefix faim_, or without it")
    add("--pretrained", action=_Flag, default=False, help="start from timm's pretrained weights")
    add("--pretrained-head", default="keep", choices=("keep", "fresh"),
        help="what becomes of the classes of pretrained weights that have as many as the data: kept (a linear "
             "classifier is converted in closed form), or a fresh head (default: keep)")
    add("--pretrained-path", metavar="FILE", help="start from this file as if it were the pretrained weights")
    add("--initial-checkpoint", default="", metavar="FILE", help="load these weights into the new model")
    add("--num-classes", type=whole(1, 10_000_000), metavar="N", help="number of classes (default: that of the data)")
    add("--gp", metavar="POOL", help="global pooling, for example avg, max, avgmax, catavgmax (default: the model's)")
    add("--drop", type=SHARE, metavar="P", help="dropout before the classifier (default: the model's)")
    add("--drop-path", type=SHARE, metavar="P", help="stochastic depth")
    add("--drop-block", type=SHARE, metavar="P", help="DropBlock, for ResNet's family")
    add("--bn-momentum", type=SHARE, metavar="M", help="batch-norm momentum, for EfficientNet's family")
    add("--bn-eps", type=above(0, 1), metavar="EPS", help="batch-norm epsilon, for EfficientNet's family")
    add("--head-init-scale", type=real(0, 1e6), metavar="F", help="factor on a linear classifier's initial weights")
    add("--head-init-bias", type=real(-1e6, 1e6), metavar="B", help="a linear classifier's initial bias")
    add("--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE",
        help="further arguments of timm.create_model")
    add("--grad-checkpointing", action=_Flag, default=False, help="recompute activations to save memory")
    add("--channels-last", action=_Flag, default=False, help="channels-last memory layout")
    add("--fast-norm", action=_Flag, default=False, help="norm layers in low precision under --amp")


def _faim(parser: Parser) -> None:
    add = parser.add_argument_group("FAIM head").add_argument
    add("--faim-cfg", nargs="*", action=ParseKwargs, default=None, metavar="KEY=VALUE",
        help="options of the head, for example space=sphere margin=0.2; replaces those of the recipe")
    add("--faim-blocks", type=whole(0, 10_000), metavar="N",
        help="log and exp maps around the last N blocks; the same as --faim-cfg blocks=N")
    add("--head-init", choices=("random", "data"), default="random",
        help="data: class means and within-class variance of the backbone's features, evaluated as epoch 0")
    add("--head-refit", type=whole(-1, 10_000), metavar="N",
        help="after the last epoch set centre, prototypes and Σ in closed form, from all training images and N "
             "augmented epochs; -1: not, where a recipe does")


def _freezing(parser: Parser) -> None:
    add = parser.add_argument_group("what learns, and how fast").add_argument
    add("--freeze", nargs="*", metavar="GLOB", help="freeze the modules of these names, for example layer1 'blocks.*'")
    add("--head-only", action=_Flag, default=False, help="train the classifier only")
    add("--train-last", type=whole(1, 10_000), metavar="N",
        help="train the classifier, the last N blocks and the norm after them")
    add("--cache-features", action=_Flag, default=False, help="with --head-only: compute the features once")
    add("--cache-views", type=whole(0, 10_000), default=0, metavar="N",
        help="augmented views per image to cache; 0: one view without augmentation")
    for part, of in (("backbone", "the backbone"), ("mu", "the prototypes μ, or a plain model's classifier"),
                     ("scalars", "λ, γ and the prior")):
        add(f"--lr-scale-{part}", type=above(0, 1e6), default=1.0, metavar="F",
            help=f"factor on the learning rate of {of}")


def _input(parser: Parser) -> None:
    add = parser.add_argument_group("input size and normalisation (default: the model's)").add_argument
    add("--img-size", type=whole(1, 8192), metavar="N", help="height and width in pixels")
    add("--in-chans", type=whole(1, 4), metavar="N", help="input channels")
    add("--input-size", type=whole(1, 8192), nargs=3, metavar=("C", "H", "W"), help="channels, height and width")
    add("--crop-pct", type=real(0.05, 2), metavar="P", help="share of the resized image kept in validation")
    add("--mean", type=SHARE, nargs="+", metavar="M", help="mean of the pixels, per channel, in 0..1")
    add("--std", type=above(0, 10), nargs="+", metavar="S", help="standard deviation of the pixels, per channel")
    add("--interpolation", default="", help="resize interpolation in validation")
    add("--train-interpolation", default="random", choices=("random", "bilinear", "bicubic", ""),
        help="the same in training; empty: as in validation")


def _augmentation(parser: Parser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action=_Off, help="resize and crop only (--affine still applies)")
    add("--train-crop-mode", choices=("rrc", "rkrc", "rkrr"), help="random crop (default: rrc, random resized crop)")
    add("--scale", type=above(0, 1), nargs=2, default=[0.08, 1.0], metavar=("MIN", "MAX"),
        help="share of area kept by crop")
    add("--ratio", type=above(0, 100), nargs=2, default=[3 / 4, 4 / 3], metavar=("MIN", "MAX"),
        help="aspect ratio of the crop")
    add("--hflip", type=SHARE, default=0.5, metavar="P", help="horizontal flip")
    add("--vflip", type=SHARE, default=0.0, metavar="P", help="vertical flip")
    add("--color-jitter", type=real(0, 10), default=0.4, metavar="F", help="colour jitter; 0 is off")
    add("--color-jitter-prob", type=SHARE, metavar="P", help="probability of colour jitter (default: always)")
    add("--grayscale-prob", type=SHARE, metavar="P", help="probability of a grey image")
    add("--gaussian-blur-prob", type=SHARE, metavar="P", help="probability of blur")
    add("--aa", metavar="POLICY", help="AutoAugment, RandAugment or AugMix policy, for example rand-m9-mstd0.5")
    add("--affine", type=real(0, 180), nargs=4, metavar=("DEG", "TRANSLATE", "SCALE", "SHEAR"),
        help="random affine map before the crop: rotation up to DEG degrees, shift up to a share TRANSLATE of the "
             "size, scale within 1 -+ SCALE, shear up to SHEAR degrees")
    add("--affine-fill", type=whole(0, 255), metavar="V",
        help="grey value 0..255 outside the image (default: the mean)")
    add("--reprob", type=SHARE, default=0.0, metavar="P", help="random erasing")
    add("--remode", default="pixel", choices=("pixel", "rand", "const"), help="random erasing mode")
    add("--recount", type=whole(1, 1000), default=1, metavar="N", help="random erasing count")
    add("--resplit", action=_Flag, default=False, help="no random erasing in the first split, or half, of the batch")
    add("--aug-repeats", type=real(0, 100), default=0, metavar="N",
        help="augmented copies of each image over the processes (several processes only)")
    add("--aug-splits", type=whole(0, 100), default=0, metavar="N",
        help="views per image, the first one clean; 0 or at least 2")
    add("--epoch-repeats", type=real(0, 10_000), default=0.0, metavar="N",
        help="passes per epoch over hfids/ or tfds/ data")


def _mixing(parser: Parser) -> None:
    add = parser.add_argument_group("mixing images").add_argument
    add("--mixup", type=real(0, 1000), default=0.0, metavar="ALPHA", help="mixup")
    add("--cutmix", type=real(0, 1000), default=0.0, metavar="ALPHA", help="cutmix")
    add("--cutmix-minmax", type=SHARE, nargs="*", metavar="F", help="MIN MAX side of the pasted part; turns cutmix on")
    add("--mixup-prob", type=SHARE, default=1.0, metavar="P", help="probability of mixup or cutmix")
    add("--mixup-switch-prob", type=SHARE, default=0.5, metavar="P", help="probability of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one mixing ratio")
    add("--mixup-off-epoch", type=whole(0), default=0, metavar="N", help="no mixing after N epochs; 0: never off")


def _loss(parser: Parser) -> None:
    add = parser.add_argument_group("loss").add_argument
    add("--smoothing", type=Number(float, 0, 1, below=True), metavar="S",
        help="label smoothing (default: 0.1; 0 with --multi-label)")
    add("--loss", choices=("ce", "bce", "asl", "poly", "jsd", "twoway", "zlpr"),
        help="timm's losses (default: ce; bce with --multi-label)")
    add("--bce-loss", action=_Flag, default=False, help="the same as --loss bce")
    add("--bce-sum", action=_Flag, default=False, help="sum the bce loss over the classes")
    add("--bce-target-thresh", type=SHARE, metavar="P", help="soft targets above P are 1 in the bce loss, others 0")
    add("--bce-pos-weight", type=above(0, 1e6), metavar="W", help="weight of the positives in the bce loss")
    add("--jsd-loss", action=_Flag, default=False, help="the same as --loss jsd; needs --aug-splits")


def _contrastive(parser: Parser) -> None:
    add = parser.add_argument_group("contrastive losses under the head's metric").add_argument
    add("--contrastive", nargs="*", metavar="NAME:WEIGHT",
        help="add losses on the features: infonce, supcon, triplet, npair, for example infonce:0.1")
    add("--views", type=whole(1, 64), default=1, metavar="N", help="augmented views of each image in a batch")
    add("--samples-per-class", type=whole(0), default=0, metavar="K",
        help="batches of K images each of --batch-size/K classes")
    add("--contrastive-temperature", type=above(0, 1000), default=0.1, metavar="T",
        help="temperature of infonce, supcon and npair")
    add("--contrastive-margin", type=above(0, 1000), default=0.2, metavar="M",
        help="margin of triplet, in units of the distance")


def _distillation(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--kd-model-name", metavar="NAME", help="teacher: a pretrained timm name, local-dir:RUN or hf-hub:NAME")
    add("--kd-distill-type", default="logit", choices=("logit", "feature", "token"),
        help="what is matched: logits, pooled features, or the distillation head of models like DeiT")
    add("--kd-loss-type", default="kl", choices=("kl",), help="loss between logits")
    add("--kd-temperature", type=above(0, 1000), default=4.0, metavar="T", help="temperature of the softmax")
    add("--kd-token-distill-type", default="soft", choices=("soft", "hard"), help="target of the distillation head")
    add("--kd-student-feature-dim", type=whole(1), metavar="D", help="width of the student's features (default: found)")
    add("--kd-teacher-feature-dim", type=whole(1), metavar="D", help="width of the teacher's features (default: found)")
    add("--distill-loss-weight", type=real(0, 1e6), metavar="W",
        help="weight of distillation (default: 1, or 1 - the other)")
    add("--task-loss-weight", type=real(0, 1e6), metavar="W", help="weight of the classification loss (default: 1)")


def _optimiser(parser: Parser) -> None:
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="sgd", help="optimiser")
    add("--opt-eps", type=SHARE, metavar="EPS", help="optimiser epsilon")
    add("--opt-betas", type=SHARE, nargs="+", metavar="B", help="optimiser betas")
    add("--opt-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE",
        help="further arguments of timm's create_optimizer_v2")
    add("--momentum", type=SHARE, default=0.9, help="optimiser momentum")
    add("--weight-decay", type=real(0, 1000), default=2e-5, help="weight decay")
    add("--clip-grad", type=above(0, 1e9), metavar="NORM", help="gradient clipping")
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="gradient clipping mode")
    add("--layer-decay", type=above(0, 1), metavar="F", help="layer-wise learning-rate decay")
    add("--layer-decay-min-scale", type=SHARE, default=0.0, metavar="F", help="smallest factor of layer decay")
    add("--layer-decay-no-opt-scale", type=SHARE, metavar="F", help="do not train layers whose factor is below F")
    add("--grad-accum-steps", type=whole(1), default=1, metavar="N", help="batches per update")


def _schedule(parser: Parser) -> None:
    add = parser.add_argument_group("learning rate and schedule").add_argument
    add("--lr", type=real(0, 1000), help="learning rate; overrides --lr-base")
    add("--lr-base", type=real(0, 1000), default=0.1, help="learning rate for a global batch of --lr-base-size")
    add("--lr-base-size", type=whole(1, 10**9), default=256, metavar="N", help="global batch size of --lr-base")
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"),
        help="how the rate follows the batch (empty: sqrt for Adam's family and LAMB, else linear)")
    add("--sched", default="cosine", help="schedule",
        choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"))
    add("--sched-on-updates", action=_Flag, default=False, help="step the schedule after every update")
    add("--epochs", type=whole(0), default=300, help="epochs; 0 with --head-init data: fit, evaluate and save only")
    add("--min-lr", type=real(0, 1000), default=0.0, help="lowest learning rate")
    add("--warmup-lr", type=real(0, 1000), default=1e-5, help="learning rate at the start of the warm-up")
    add("--warmup-epochs", type=whole(0), metavar="N", help="epochs of warm-up (default: 5, half of a shorter run)")
    add("--warmup-prefix", action=_Flag, default=False, help="do not count the warm-up in --epochs")
    add("--cooldown-epochs", type=whole(0), default=0, help="epochs at the lowest rate after the schedule")
    add("--decay-epochs", type=real(0.001, MANY), default=90,
        help="interval of step decay, length of the decay of wsd and rsqrt")
    add("--decay-milestones", type=whole(0), nargs="+", default=[90, 180, 270], help="epochs of multistep decay")
    add("--decay-rate", "--dr", type=above(0, 100), default=0.1, help="decay rate")
    add("--patience-epochs", type=whole(0), default=10, help="patience of plateau")
    add("--lr-noise", type=SHARE, nargs="*", metavar="F", help="noise on the rate from, or between, shares of the run")
    add("--lr-noise-pct", type=real(0.01, 1), default=0.67, metavar="F", help="limit of the noise")
    add("--lr-noise-std", type=real(0, 100), default=1.0, metavar="S", help="standard deviation of the noise")
    add("--lr-cycle-mul", type=real(0.01, 100), default=1.0, metavar="F",
        help="factor on the length of each next cycle")
    add("--lr-cycle-decay", type=SHARE, default=0.5, metavar="F", help="factor on the rate of each next cycle")
    add("--lr-cycle-limit", type=whole(1), default=1, metavar="N", help="number of cycles")
    add("--lr-k-decay", type=above(0, 100), default=1.0, metavar="K", help="k-decay of cosine and poly")
    add("--lr-decay-fn", choices=("linear", "1-sqrt", "cosine", "power", "exp"), help="decay of wsd and rsqrt")
    add("--lr-stable-timescale", type=real(0.001, MANY), metavar="N",
        help="timescale of rsqrt in epochs (default: the warm-up)")


def _device(parser: Parser) -> None:
    add = parser.add_argument_group("precision, processes and batch norm").add_argument
    add("--amp", action=_Flag, default=False, help="mixed precision (default: what `accelerate launch` says)")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"), help="low precision type of --amp")
    add("--model-dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights, without --amp")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")
    add("--torchcompile-mode", choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
        help="mode of torch.compile")
    add("--fsdp", action=_Flag, default=False, help="shard parameters, gradients and optimiser over the processes")
    add("--no-ddp-bb", action=_Off, help="do not broadcast buffers before every step")
    add("--sync-bn", action=_Flag, default=False, help="batch norm over the batches of all processes (GPUs only)")
    add("--dist-bn", default="reduce", choices=("reduce", "broadcast", ""),
        help="how processes agree on batch-norm statistics before an evaluation")
    add("--split-bn", action=_Flag, default=False, help="separate batch norm for each split of the batch")
    add("--cpu-threads", type=whole(1, max(256, os.cpu_count() or 1)), metavar="N",
        help="threads per process on the CPU (default: the cores shared out; `accelerate launch` alone leaves one)")


def _run(parser: Parser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("-b", "--batch-size", type=whole(1), default=128, metavar="N", help="images per process and step")
    add("-vb", "--validation-batch-size", type=whole(1), metavar="N", help="the same in validation")
    add("--model-ema", action=_Flag, default=False, help="average the weights; the average is evaluated and saved")
    add("--model-ema-decay", type=SHARE, default=0.9998, help="decay of the average")
    add("--model-ema-warmup", action=_Flag, default=False, help="raise the decay over the first updates")
    add("--seed", type=whole(0, 2**31 - 1), default=42, help="random seed; each sample draws from its place in the run")
    add("--output", default="./output", metavar="DIR", help="folder of runs")
    add("--experiment", default="", metavar="NAME", help="folder of this run (default: time, model and size)")
    add("--val-interval", type=whole(1), default=1, metavar="N", help="epochs between validations")
    add("--eval-metric", metavar="NAME",
        help="what makes an epoch the best: top1, top5 or loss, or with --multi-label map, micro_f1, macro_f1, "
             "sample_f1 or loss (default: top1, map, or loss without validation)")
    add("--eval-only", action=_Flag, default=False, help="evaluate on the validation data, do not train")
    add("--dry-run", action=_Flag, default=False,
        help="try two updates and a validation batch, and tell what the run would do")


def _resume(parser: Parser) -> None:
    add = parser.add_argument_group("checkpoints").add_argument
    add("--resume", default="", metavar="PATH",
        help="go on from a run folder or one of its checkpoints; without --config its args.yaml is the recipe. auto: "
             "from the unfinished run with these options, if there is one")
    add("--no-resume-opt", action=_Off, help="resume without the state of the optimiser")
    add("--start-epoch", type=whole(0), metavar="N",
        help="number of the first epoch, from 0 (default: 0, or as resumed)")
    add("--stop-epoch", type=whole(1), metavar="N", help="stop when N epochs are done, to be resumed later")
    add("--recovery-interval", type=whole(0), default=0, metavar="N",
        help="updates between checkpoints within an epoch")
    add("--checkpoint-hist", type=whole(1), default=10, metavar="N",
        help="number of best epochs whose weights are kept")


def _logging(parser: Parser) -> None:
    add = parser.add_argument_group("logging").add_argument
    add("--log-interval", type=whole(1), default=50, metavar="N", help="steps between updates of the progress bar")
    add("--log-with", nargs="*", default=[], metavar="NAME", help="trackers, for example tensorboard wandb mlflow")
    add("--project-name", metavar="NAME", help="project of the trackers")
    add("--log-wandb", action=_Flag, default=False, help="the same as --log-with wandb")
    add("--wandb-project", metavar="NAME", help="project of wandb (default: --project-name)")
    add("--wandb-tags", nargs="*", default=[], metavar="TAG", help="tags of the run in wandb")
    add("--wandb-resume-id", default="", metavar="ID", help="with --resume: the run's id in wandb")
    add("--report", action=_Flag, default=True, help="write an HTML page about the run")
    add("--push-to-hub", default="", metavar="ORG/NAME", help="publish the finished run on the Hugging Face Hub")
    add("--hub-private", action=_Flag, default=False, help="with --push-to-hub: make a private repository")
    add("--hub-license", metavar="ID", help="with --push-to-hub: licence of the weights, for example apache-2.0")
