"""Options that several commands have."""

import argparse

from timm_faim.run.options import MANY, available_cores, whole


def add_reading(parser: argparse.ArgumentParser, skips: bool = True) -> None:
    """How images are read: --batch-size, --workers and, where `skips`, --skip-unreadable."""
    add = parser.add_argument
    add("--batch-size", type=whole(1, MANY), default=64, metavar="N", help="images at a time (default: 64)")
    add("--workers", type=whole(0, 1024), default=min(4, available_cores()), metavar="N",
        help="processes that read images (default: 4, or as many as there are cores)")  # fmt: skip
    if skips:
        add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
