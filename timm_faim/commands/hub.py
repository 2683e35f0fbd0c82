"""Publish runs on the Hugging Face Hub, and keep the entries of hub_configs/.

timm-faim hub push RUN_DIR --repo ORG/faim_resnet50.my_data --license mit
timm-faim hub push RUN_DIR --repo ORG/faim_resnet50.my_data --dry-run FOLDER
timm-faim hub entry RUN_DIR --tag my_data --license mit
timm-faim hub check
timm-faim hub push-all RUNS_DIR

The token comes from `hf auth login` or HF_TOKEN; it is no option, so that it stands in no history of commands.
"""

import argparse
from pathlib import Path

CONFIGS = Path("hub_configs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all its commands."""
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("push", help="publish a run folder").add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, or a folder with config.json and model.safetensors")
    add("--repo", required=True, metavar="ORG/NAME", help="repository; what follows the first dot becomes the tag")
    add("--license", metavar="ID", help="licence of the weights, for example apache-2.0 (default: none is given)")
    add("--dataset", nargs="*", default=[], metavar="ID", help="Hub identifiers of the training data")
    add("--dataset-name", default="", metavar="NAME", help="their name for people")
    add("--base-model", metavar="ID", help="Hub identifier of the model it began from (default: from the run)")
    add("--label-descriptions", type=Path, metavar="JSON", help="file of class name to description")
    visible = commands.choices["push"].add_mutually_exclusive_group().add_argument
    visible("--private", action="store_true", default=None, help="make a private repository")
    visible("--public", action="store_false", dest="private", default=None, help="make a public one")
    add("--branch", metavar="NAME", help="commit to this branch")
    add("--tag", metavar="NAME", help="tag the commit")
    add("--create-pr", action="store_true", help="open a pull request")
    add("--message", default="Add FAIM model", metavar="TEXT", help="message of the commit")
    add("--dry-run", type=Path, metavar="FOLDER", help="write what would be published there and upload nothing")

    add = commands.add_parser("entry", help="write the entry of a run into hub_configs/").add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder")
    add("--tag", required=True, metavar="NAME", help="tag of the checkpoint")
    add("--license", required=True, metavar="ID", help="licence of the weights, for example apache-2.0")
    add("--dataset", default="", metavar="ID", help="Hub identifier of the training data")
    add("--dataset-name", default="", metavar="NAME", help="their name for people")
    add("--recipe", default="", metavar="YAML", help="recipe that repeats the run")
    add("--folder", type=Path, default=CONFIGS, metavar="DIR", help="folder of the entries (default: hub_configs)")

    add = commands.add_parser("check", help="verify entries: form, hash, logits").add_argument
    add("entries", nargs="*", type=Path, metavar="YAML", help="files (default: all entries)")
    add("--offline", action="store_true", help="look at the files alone")

    add = commands.add_parser("push-all", help="publish the entries that are not published yet").add_argument
    add("runs", type=Path, metavar="RUNS_DIR", help="holds the run folder of each entry under the entry's name")
    add("--folder", type=Path, default=CONFIGS, metavar="DIR", help="folder of the entries (default: hub_configs)")
    add("--private", action="store_true", default=None, help="make private repositories")


def run(args: argparse.Namespace) -> int:
    """One of its commands; the exit status."""
    from timm_faim.hub.command import run as run_command

    return run_command(args)
