"""Train on the 242 handwritten characters that come with the package, then classify some: minutes on a laptop.

timm-faim demo
"""

import argparse
from itertools import count
from pathlib import Path

from timm_faim.run.options import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--output", default="./output", metavar="DIR", help="folder of runs (default: ./output)")
    parser.add_argument("--epochs", type=whole(1), metavar="N", help="default: those of the recipe")


def run(args: argparse.Namespace) -> None:
    """A training, and a page of predictions in its folder."""
    from timm_faim.commands import run_command
    from timm_faim.data import omniglot242_root
    from timm_faim.train import main

    taken = (Path(args.output, f"demo-{number}" if number else "demo") for number in count())
    name = next(path.name for path in taken if not path.exists())
    words = ["--output", args.output, "--experiment", name]
    main([*words, "--epochs", str(args.epochs)] if args.epochs else words, "timm-faim demo")
    folder = Path(args.output, name)
    images = sorted(str(path) for path in (omniglot242_root() / "val").glob("*/*.png"))[::10]
    page = str(folder / "predictions.html")
    table = str(folder / "predictions.csv")
    run_command("predict", [*images, "--model", str(folder), "--html", page, "--output", table])
    print(f"look at {folder / 'report.html'} and {page}")
