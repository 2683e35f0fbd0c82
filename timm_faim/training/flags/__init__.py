"""The flags of train_faim.py: those of timm's train.py under timm's names, and a few of our own.

docs/training.md lists timm's flags one by one, with what became of each.
"""

import argparse
from typing import Any

from timm_faim.run.parser import Help, Parser

from . import data, learning, model, run

# Options of FAIM models. A recipe may carry them while the command line picks a plain timm model as a baseline.
FAIM_ONLY = (
    "faim_cfg",
    "pretrained_head",
    "faim_blocks",
    "head_init",
    "head_refit",
    "lr_scale_scalars",
    "contrastive",
    "contrastive_temperature",
    "contrastive_margin",
)

# Options of one launch. A run that is resumed by its folder alone takes the others from its args.yaml.
ONE_LAUNCH = ("resume", "no_resume_opt", "start_epoch", "stop_epoch", "dry_run", "eval_only")

# Options that --help lists; the others are in --help-all.
USUAL = (
    "help",
    "help_all",
    "data",
    "config",
    "data_dir",
    "dataset",
    "val_split",
    "workers",
    "model",
    "pretrained",
    "faim_cfg",
    "head_init",
    "head_refit",
    "head_only",
    "cache_features",
    "lr_scale_mu",
    "img_size",
    "aa",
    "mixup",
    "smoothing",
    "contrastive",
    "kd_model_name",
    "opt",
    "lr",
    "weight_decay",
    "epochs",
    "warmup_epochs",
    "amp",
    "batch_size",
    "seed",
    "output",
    "experiment",
    "eval_only",
    "dry_run",
    "resume",
    "push_to_hub",
)

# Options that an evaluation of a run does not take over: they do nothing there, or need a training.
TRAINING_ONLY = (
    "fsdp",
    "model_ema",
    "sync_bn",
    "split_bn",
    "resplit",
    "log_with",
    "log_wandb",
    "wandb_project",
    "wandb_tags",
    "wandb_resume_id",
    "push_to_hub",
    "hub_private",
    "hub_license",
    "kd_model_name",
    "distill_loss_weight",
    "task_loss_weight",
    "freeze",
    "head_only",
    "train_last",
    "cache_features",
    "cache_views",
    "aug_splits",
    "jsd_loss",
    "aug_repeats",
    "mixup",
    "cutmix",
    "cutmix_minmax",
    "mixup_off_epoch",
    "head_init",
    "head_refit",
    "contrastive",
    "views",
    "samples_per_class",
)


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


def build_parser() -> Parser:
    """The parser; its destinations are the keys of a recipe."""
    parser = Parser(
        prog="train_faim.py",
        usage="%(prog)s [DIR] [options]",
        allow_abbrev=False,
        formatter_class=Help,
        add_help=False,
        description="Train a FAIM model, or any timm model, on real images. Without data options it trains on the "
        "bundled Omniglot characters.",
    )
    parser.add_argument("-h", "--help", action=_ShowHelp, help="the options that are used most")
    parser.add_argument("--help-all", action=_ShowHelp, help="every option")
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("-c", "--config", metavar="YAML", help="recipe: flag names with underscores as keys")
    for add_group in (
        data.data,
        model.model,
        model.faim,
        model.freezing,
        data.input,
        data.augmentation,
        data.mixing,
        model.loss,
        model.contrastive,
        model.distillation,
        learning.optimiser,
        learning.schedule,
        run.device,
        run.run,
        run.resume,
        run.logging,
    ):
        add_group(parser)
    return parser
