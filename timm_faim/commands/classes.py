"""Add, remove, merge and rename classes without training.

timm-faim classes list RUN
timm-faim classes add RUN FOLDER -o NEW                 # one folder of images a class
timm-faim classes remove RUN NAME ... -o NEW
timm-faim classes merge RUN NEW_NAME OLD OLD ... -o NEW
timm-faim classes rename RUN OLD NEW_NAME -o NEW        # or several OLD=NEW_NAME

RUN is a run folder, local-dir:FOLDER or hf-hub:ORG/NAME and stays as it is; NEW becomes a folder that timm opens.
"""

import argparse
from pathlib import Path

from timm_faim.commands.arguments import add_reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all its commands."""
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, writes: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, allow_abbrev=False)
        made.add_argument("run", metavar="RUN", help="run folder, local-dir:FOLDER or hf-hub:ORG/NAME")
        made.add_argument("--names", type=Path, metavar="FILE", help="class names, one a line in the order of the "
                          "classes, of a model that has none")  # fmt: skip
        if writes:
            made.add_argument("-o", "--output", type=Path, required=True, metavar="NEW", help="folder to write")
        return made

    command("list", "number, training images and name of each class", writes=False)

    made = command("add", "classes from a few images of each")
    add = made.add_argument
    add("folder", metavar="FOLDER", help="one folder of images a class")
    add("--merge", action="store_true", help="a class that the model has takes the images of its name in")
    add_reading(made)

    add = command("remove", "leave classes out").add_argument
    add("classes", nargs="+", metavar="NAME", help="class")

    add = command("merge", "make one class of several").add_argument
    add("name", metavar="NEW_NAME", help="of the class that they become; may be one of theirs")
    add("classes", nargs="+", metavar="OLD", help="classes to merge, two or more")

    add = command("rename", "give classes other names").add_argument
    add("classes", nargs="+", metavar="OLD NEW_NAME", help="a class and its new name, or several OLD=NEW_NAME")


def run(args: argparse.Namespace) -> None:
    """One of its commands."""
    from timm_faim.classes.command import run as run_command

    run_command(args)
