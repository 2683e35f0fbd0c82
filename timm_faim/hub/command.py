"""`timm-faim hub`: publish runs, and keep the entries of hub_configs/."""

import argparse
import sys
import tempfile
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


def run(args: argparse.Namespace) -> int:
    """One of the commands; the exit status."""
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
