"""Command line of the Hub: publish runs, and keep the entries of hub_configs/.

    python -m timm_faim.hub push RUN_DIR --repo ORG/faim_resnet50.my_data --license mit
    python -m timm_faim.hub push RUN_DIR --repo ORG/faim_resnet50.my_data --dry-run FOLDER
    python -m timm_faim.hub entry RUN_DIR --tag my_data --license mit
    python -m timm_faim.hub check
    python -m timm_faim.hub push-all RUNS_DIR

The token comes from `hf auth login` or HF_TOKEN; it is no option, so that it stands in no history of commands.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm_faim  # noqa: F401  registers the architectures
from timm_faim.documents import read_json
from timm_faim.hub.entries import check_entry, publish_entry, write_entry
from timm_faim.hub.package import Release, build_package
from timm_faim.hub.publish import publish
from timm_faim.hub.upload import check_repo_id
from timm_faim.models.published import EntryError, entry_files, read_entry
from timm_faim.run.errors import UserError

CONFIGS = Path("hub_configs")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m timm_faim.hub", description=__doc__.splitlines()[0])
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
    return parser


def run(argv: Sequence[str]) -> int:
    """One command; the exit status."""
    args = build_parser().parse_args(argv)
    return {"push": _push, "entry": _entry, "check": _check, "push-all": _push_all}[args.command](args)


def _push(args: argparse.Namespace) -> int:
    check_repo_id(args.repo)
    release = Release(
        args.repo,
        args.license,
        args.dataset,
        args.dataset_name,
        args.base_model,
        _descriptions(args.label_descriptions),
    )
    if args.dry_run is not None:
        build_package(args.run, args.dry_run, release)
        print(
            f"nothing is uploaded; {args.dry_run} holds what would be: "
            f"{', '.join(sorted(path.name for path in args.dry_run.iterdir()))}"
        )
        return 0
    url, commit = publish(
        args.run,
        release,
        private=args.private,
        branch=args.branch,
        tag=args.tag,
        create_pr=args.create_pr,
        message=args.message,
    )
    print(f"published: {url}")
    print(f"load it: import timm, timm_faim; model = timm.create_model('hf-hub:{args.repo}@{commit}', pretrained=True)")
    return 0


def _entry(args: argparse.Namespace) -> int:
    dataset = {key: value for key, value in (("name", args.dataset_name), ("id", args.dataset)) if value}
    path = write_entry(args.run, args.folder, args.tag, license=args.license, dataset=dataset, recipe=args.recipe)
    print(f"{path} is written. Look through it, then publish with push-all")
    return 0


def _check(args: argparse.Namespace) -> int:
    verdicts = [check_entry(path, args.offline) for path in args.entries or entry_files()]
    for verdict in verdicts:
        print(f"{'FAILED' if verdict.problem else 'ok'}  {verdict.name}: {verdict.problem or verdict.state}")
    failed = sum(bool(verdict.problem) for verdict in verdicts)
    print(f"{len(verdicts)} entries, {failed} failed")
    return 1 if failed else 0


def _push_all(args: argparse.Namespace) -> int:
    for flag, folder, held in (("RUNS_DIR", args.runs, "runs"), ("--folder", args.folder, "entries")):
        if not folder.is_dir():
            raise UserError(f"{flag} {folder} is no folder. Name the folder that holds the {held}")
    failed = 0
    for path in sorted(args.folder.glob("faim_*.yaml")):
        try:
            entry = read_entry(path)
            if entry.revision:
                print(f"{entry.name}: published before")
                continue
            if not (args.runs / entry.name).is_dir():
                print(f"{entry.name}: left out, no {args.runs / entry.name}")
                continue
            with tempfile.TemporaryDirectory() as work:
                entry = publish_entry(entry, args.runs / entry.name, Path(work, "package"), private=args.private)
            print(f"{entry.name}: published as {entry.hub_id}")
        except (UserError, EntryError) as e:
            failed += 1
            print(f"{path.stem}: {e}", file=sys.stderr)
    return 1 if failed else 0


def _descriptions(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        found = read_json(path)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read --label-descriptions {path}: {e}") from e
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"--label-descriptions {path} must map class names to texts")
    return found


def main() -> None:
    """Entry point: a person's mistakes come out as one line and exit status 1."""
    try:
        sys.exit(run(sys.argv[1:]))
    except UserError as error:
        print(f"timm_faim.hub: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
