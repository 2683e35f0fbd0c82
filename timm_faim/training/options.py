"""All options of a run: those of timm's train.py under timm's names, and a few of our own.

Each group is declared where it is used. docs/training.md lists timm's flags one by one, with what became of each.
"""

from dataclasses import dataclass, fields
from typing import Any

from timm_faim.images.splits import DataOptions
from timm_faim.run.common import RunOptions
from timm_faim.run.finished import FinishOptions
from timm_faim.run.options import Help, Parser, ShowHelp, add_groups, marked
from timm_faim.training.checkpoints import CheckpointOptions
from timm_faim.training.contrastive import ContrastiveOptions
from timm_faim.training.data import AugmentationOptions
from timm_faim.training.freeze import LearningOptions
from timm_faim.training.head_recipe import HeadRecipeOptions
from timm_faim.training.launch import DeviceOptions, LoggingOptions
from timm_faim.training.loss import LossOptions, MixingOptions
from timm_faim.training.model import HeadOptions, InputOptions, ModelOptions
from timm_faim.training.optimiser import OptimiserOptions, ScheduleOptions
from timm_faim.training.rare_classes import RareClassOptions
from timm_faim.training.start import StartOptions
from timm_faim.training.tasks import DistillationOptions


@dataclass
class Options:
    """All options, group by group in the order of args.yaml, and the recipe that they came from."""

    data: DataOptions
    model: ModelOptions
    head: HeadOptions
    head_recipe: HeadRecipeOptions
    learning: LearningOptions
    start: StartOptions
    input: InputOptions
    augmentation: AugmentationOptions
    mixing: MixingOptions
    loss: LossOptions
    rare_classes: RareClassOptions
    contrastive: ContrastiveOptions
    distillation: DistillationOptions
    optimiser: OptimiserOptions
    schedule: ScheduleOptions
    device: DeviceOptions
    run: RunOptions
    checkpoints: CheckpointOptions
    logging: LoggingOptions
    finish: FinishOptions
    config: str | None = None

    @property
    def groups(self) -> list[Any]:
        """The groups."""
        return [getattr(self, name) for name in GROUPS]

    @property
    def reading(self) -> dict[str, bool]:
        """How an evaluation reads images: arguments of `predictions`."""
        return {
            "skip_unreadable": self.data.skip_unreadable,
            "channels_last": self.model.channels_last,
            "flips": self.run.val_flip,
        }


GROUPS = {group.name: group.type for group in fields(Options) if group.name != "config"}
ONE_LAUNCH = marked(GROUPS.values(), "launch")


def build_parser(program: str = "train_faim.py") -> Parser:
    """The parser of a program of that name; its destinations are the keys of a recipe."""
    parser = Parser(
        prog=program,
        usage="%(prog)s [DIR] [options]",
        allow_abbrev=False,
        formatter_class=Help,
        add_help=False,
        description="Train a FAIM model, or any timm model, on real images. Without data options it trains on the "
        "bundled Omniglot characters.",
    )
    parser.add_argument("-h", "--help", action=ShowHelp, help="the options that are used most")
    parser.add_argument("--help-all", action=ShowHelp, help="every option")
    parser.add_argument("data", nargs="?", metavar="DIR", help="the same as --data-dir")
    parser.add_argument("-c", "--config", metavar="YAML", help="recipe: flag names with underscores as keys")
    add_groups(parser, GROUPS.values())
    return parser


def as_recipe(options: Options) -> dict[str, Any]:
    """The options as a recipe that repeats the run (without the ones that are unset)."""
    return {key: value for group in options.groups for key, value in vars(group).items() if value is not None}
