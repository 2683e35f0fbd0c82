"""Options that several commands have."""

import argparse

from timm_faim.run.options import MANY, Number, available_cores, whole


def add_reading(parser: argparse.ArgumentParser, skips: bool = True) -> None:
    """How images are read: --batch-size, --workers and, where `skips`, --skip-unreadable."""
    add = parser.add_argument
    add("--batch-size", type=whole(1, MANY), default=64, metavar="N", help="images at a time (default: 64)")
    add("--workers", type=whole(0, 1024), default=min(4, available_cores()), metavar="N",
        help="processes that read images (default: 4, or as many as there are cores)")  # fmt: skip
    if skips:
        add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")


def add_run(parser: argparse.ArgumentParser, chooses: bool = False) -> None:
    """Options of a training that commands in front of it take too: input, images, precision and where the run goes.

    Args:
        parser: of the command.
        chooses: --crop-mode has auto, the default, and model.
    """
    add, also = parser.add_argument, ("auto", "model") if chooses else ()
    add("--img-size", type=whole(1, 8192), metavar="N", help="height and width in pixels (default: the model's)")
    add("--crop-pct", type=Number(float, 0.05, 2), metavar="P", help="share of the resized image that is seen")
    add("--crop-mode", choices=(*also, "center", "squash", "border"), default="auto" if chooses else None,
        help="what is seen of an image that is no square: its centre, all of it squashed, or all of it with a border "
        + ("(default: auto, chosen on training images, with --crop-pct; model: the model's)" if chooses else
           "(default: the model's)"))  # fmt: skip
    add("--class-map", metavar="FILE", help="the classes in order, one a line")
    add_reading(parser)
    add("--amp", action="store_true", help="run the model in bfloat16 autocast")
    add("--output", default="./output", metavar="DIR", help="folder of runs (default: ./output)")
    add("--experiment", default="", metavar="NAME", help="folder of this run (default: time, model and size)")
