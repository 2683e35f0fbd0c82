"""Accuracy, confusions and calibration of a model on images of known classes, in tables and pictures.

timm-faim evaluate output/RUN                      # on the validation images of the run
timm-faim evaluate output/RUN DIR                  # on others: DIR/val/CLASS/*.jpg, or DIR/CLASS/*.jpg
timm-faim evaluate hf-hub:ORG/NAME DIR
"""

import argparse
from pathlib import Path

from timm_faim.commands.arguments import add_run
from timm_faim.documents import read_yaml
from timm_faim.run.common import run_words
from timm_faim.run.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("model", metavar="RUN", help="run folder, hf-hub:ORG/NAME, local-dir:FOLDER, or a timm model with weights")
    add("folder", nargs="?", metavar="DIR", help="images of known classes (default: those of the run)")
    add("--val-flip", action="store_true", help="average the logits of each image and its mirror image")
    add_run(parser)


def _has_validation(run: Path) -> bool:
    """Whether the options of a run name validation images, as far as they can be read."""
    try:
        options = read_yaml(run / "args.yaml")
    except (OSError, ValueError):
        return True
    return not isinstance(options, dict) or options.get("val_split") != ""


def run(args: argparse.Namespace) -> None:
    """The evaluation of a training run, by the training's own code."""
    is_run = Path(args.model).is_dir()
    if args.folder is None and not is_run:
        raise UserError(f"{args.model} is no run folder, which would know its images. Give the images: "
                        f"timm-faim evaluate {args.model} DIR")  # fmt: skip
    words = ["--eval-only"]
    if args.folder is None and not _has_validation(Path(args.model)):
        raise UserError(f"the run in {args.model} has no validation images. Give images: timm-faim evaluate "
                        f"{args.model} DIR")  # fmt: skip
    if args.folder is None:
        words += ["--resume", args.model]
    else:
        words += ["--model", f"local-dir:{args.model}" if is_run else args.model, "--data-dir", args.folder]
    words += ["--val-flip"] * args.val_flip + run_words(args)

    from timm_faim.train import main

    main(words, "timm-faim evaluate")
