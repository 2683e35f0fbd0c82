"""Make a classifier of images in closed form: one pass through the backbone, no training.

timm-faim fit DIR --model faim_tf_efficientnet_lite0     # DIR/train/CLASS/*.jpg, DIR/val/...
timm-faim fit DIR --model output/RUN            # other classes under the backbone of a run
timm-faim fit DIR --unlabelled PHOTOS           # images without labels move the prototypes, if held-out images agree
timm-faim fit DIR --val-fraction 0.1            # DIR/CLASS/*.jpg: every tenth image is held out in turn

The run folder is that of a training, with evaluation and report. Features are kept on disk: the next fit of the same
images takes seconds.
"""

import argparse
from pathlib import Path

from timm_faim.commands.arguments import add_run
from timm_faim.run.options import Number, above, real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder with train/ and val/, or with one folder of images a class")
    add("--model", default="faim_resnet50", metavar="NAME", help="timm name with the prefix faim_, run folder, or "
        "hf-hub:ORG/NAME (default: faim_resnet50)")  # fmt: skip
    add("--pretrained-path", metavar="FILE", help="the backbone's weights from this file")
    add("--faim-cfg", nargs="*", default=[], metavar="KEY=VALUE", help="options of the head, for example moments=True")
    add("--val-fraction", type=Number(float, 0, 0.5, above=True), metavar="F",
        help="hold out this share of the training images in turn, where there is no val/ (default: 0.2)")  # fmt: skip
    add("--recipe", choices=("auto", "fixed"), default="auto", help="auto: stages, weight and share by held-out "
        "training images; fixed: those of --faim-cfg, and share 0 (default: auto)")  # fmt: skip
    add("--shrinkage", type=above(0, 1), metavar="A", default=0.3,
        help="of the covariance within classes towards a multiple of the identity (default: 0.3)")  # fmt: skip
    add("--share", type=real(0, 100), metavar="V", help="strength at which prototypes of few images are shared with "
        "look-alikes (default: the recipe's)")  # fmt: skip
    add("--unlabelled", type=Path, metavar="DIR", help="also learn from the images in this folder, at any depth, which "
        "have no labels; kept unless held-out images get worse; assumes that most of them are of these classes, in "
        "about these proportions")  # fmt: skip
    add("--proportions", choices=("free", "training"), default="free", help="of the classes among the unlabelled "
        "images: not told, or those of the training images, which harms where it is wrong (default: free)")  # fmt: skip
    add_run(parser, chooses=True)
    add("--cache", type=Path, metavar="DIR", help="where features are kept (default: the user's cache folder)")
    add("--no-cache", action="store_true", help="keep no features")
    add("--no-neighbours", action="store_true", help="keep no points of training images for predict --neighbours")
    add("--no-report", action="store_true", help="write no report.html")


def run(args: argparse.Namespace) -> None:
    """Fit a classifier."""
    from timm_faim.fitting.command import fit

    fit(args)
