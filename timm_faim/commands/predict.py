"""Classify images: names, probabilities, distances, and "unknown" for what is like none of the classes.

timm-faim predict photos/ --model output/RUN
timm-faim predict a.jpg 'shots/**/*.png' --model hf-hub:ORG/NAME --output found.csv --html found.html
find . -name '*.jpg' | timm-faim predict - --model output/RUN --format jsonl

Images that cannot be read are reported and left out. With --output, a run that was killed goes on where it was.
"""

import argparse
from pathlib import Path

from timm_faim.commands.arguments import add_reading
from timm_faim.run.options import Number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGES", help="files, folders, patterns in quotes, or - for a list on stdin")
    add("--model", required=True, metavar="RUN", help="run folder, hf-hub:ORG/NAME, exported file, or timm name")
    add("-o", "--output", type=Path, metavar="FILE", help="a file .csv or .jsonl (default: a table on the terminal)")
    add("--format", choices=("csv", "jsonl", "table"), help="default: by the name of --output, else table")
    add("--html", type=Path, metavar="FILE", help="also a page of the images, the surest first")
    add("--html-images", type=whole(1, 100_000), default=1000, metavar="N", help="most images on it (default: 1000)")
    add("--top", type=whole(1), default=5, metavar="K", help="classes told for each image (default: 5)")
    add("--unknown", type=Number(float, 0, 1, below=True), default=0.05, metavar="RATE",
        help="share of images of the classes that may be called unknown: 0.01, 0.05 or 0.1; 0 calls none so "
        "(default: 0.05)")  # fmt: skip
    add("--set", type=Number(float, 0, 1, above=True, below=True), metavar="COVERAGE",
        help="also the classes that hold the right one so often: 0.9, 0.95 or 0.99")  # fmt: skip
    add("--neighbours", type=whole(0, 1000), default=0, metavar="K",
        help="nearest training images, where the run kept them (default: 0)")  # fmt: skip
    add("--adapt", action="store_true", help="first move the prototypes to where these images put them, for this time "
        "alone; assumes that most of them are of these classes, in about these proportions")  # fmt: skip
    add_reading(parser, skips=False)
    add("--device", metavar="NAME", help="default: a GPU where there is one, else cpu")
    add("--amp", action="store_true", help="run the model in bfloat16 autocast")


def run(args: argparse.Namespace) -> None:
    """Classify the images."""
    from timm_faim.classifier.predict import predict

    predict(args)
