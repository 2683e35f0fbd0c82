"""The commands of `timm-faim classes`: a run is opened, changed in memory, and written as a new folder."""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import Tensor, nn

from timm_faim.classes.change import add_from_batches, merge_classes, remove_classes, rename_classes
from timm_faim.classes.names import class_names
from timm_faim.images.checked import UNREADABLE, reader_of
from timm_faim.images.folders import HIDDEN
from timm_faim.images.loaders import clean_loader
from timm_faim.retrieval.images import Folder, open_folder
from timm_faim.run.errors import UserError, few
from timm_faim.run.files import check_writable, rename
from timm_faim.run.opening import Opened, open_model
from timm_faim.run.record import images_of
from timm_faim.run.weights import LAST, save_config, save_weights


def run(args: argparse.Namespace) -> None:
    """One command.

    Raises:
        UserError: wrong input; nothing is written.
    """
    output = getattr(args, "output", None)
    if output is not None:
        _check_output(output)
    with _wrong_input(args.run):
        opened = open_model(args.run, "RUN")
        names = _names(args, opened)
        images = images_of(opened.record, len(names))
        if args.command == "list":
            print("\n".join(list_lines(names, images)))
            return
        if args.command == "rename":
            rename_classes(opened.model, pairs_of(args.classes, names), label_names=names)
        elif args.command == "remove":
            images = remove_classes(opened.model, args.classes, images=images, label_names=names)
        elif args.command == "merge":
            images = merge_classes(opened.model, {args.name: args.classes}, images=images, label_names=names)
        else:
            images = _add(args, opened.model, names, images)
    now = class_names(opened.model)
    try:
        write_run(opened.model, output, record_now(opened.record, images, args.command == "rename"))
    except OSError as e:
        raise UserError(f"cannot write {output}: {e.strerror or e}. Choose another folder with -o") from e
    print(f"{len(names)} classes before, {len(now)} now; written: {output}")


def list_lines(names: Sequence[str], images: Sequence[int] | None) -> list[str]:
    """A line a class: number, training images where they are known, name."""
    counts = ["-"] * len(names) if images is None else images
    return [f"{'number':>6} {'images':>7}  class"] + [
        f"{k:>6} {count:>7}  {name}" for k, (count, name) in enumerate(zip(counts, names, strict=True))
    ]


def pairs_of(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Old to new names of the words OLD NEW, or of several OLD=NEW.

    Raises:
        UserError: neither of these; one old name twice.
    """
    if len(words) == 2 and (words[0] in names or not any("=" in word for word in words)):
        return {words[0]: words[1]}
    pairs = {}
    for word in words:
        # a name may hold "=" itself
        cuts = [(word[:i], word[i + 1 :]) for i, letter in enumerate(word) if letter == "="]
        if not cuts:
            raise UserError(f"{word} is no OLD=NEW_NAME. Give one class and its new name, or only words of that form")
        old, new = next((cut for cut in cuts if cut[0] in names), cuts[0])
        if old in pairs:
            raise UserError(f"class {old!r} is to be renamed twice. Give it one new name")
        pairs[old] = new
    return pairs


def record_now(record: Mapping[str, Any], images: Sequence[int] | None, same_classes: bool) -> dict[str, Any]:
    """The record of the changed model: a calibration loses its thresholds of sets, which are of the old classes."""
    now = {key: value for key, value in record.items() if key != "images"} | (
        {} if images is None else {"images": images}
    )
    calibration = now.get("calibration")
    if not same_classes and isinstance(calibration, Mapping) and "sets" in calibration:
        now["calibration"] = dict(calibration, sets={})
    return now


def write_run(model: nn.Module, folder: Path, record: Mapping[str, Any]) -> None:
    """config.json, model.safetensors and model_best.safetensors, all of them or no folder."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        made = Path(temporary, "run")
        made.mkdir()
        data_config = resolve_input_data_config(model)
        save_config(model, made / "config.json", data_config, class_names(model), pretrained=True, record=record)
        save_weights(model.state_dict(), made, is_best=True)
        (made / LAST).unlink()
        if folder.exists():
            folder.rmdir()
        rename(made, folder)


def _add(args: argparse.Namespace, model: nn.Module, names: list[str], images: list[int] | None) -> list[int] | None:
    config = resolve_input_data_config(model)
    folder = open_folder(args.folder, "FOLDER", config["input_size"][0], args.skip_unreadable)
    new = list(dict.fromkeys(folder.class_names))
    if empty := _empty_folders(Path(args.folder), folder):
        raise UserError(f"FOLDER {args.folder}: class {few(empty)} has no images. Add some, or remove the folder")
    known = [name for name in new if name in set(names)]
    if known and not args.merge:
        raise UserError(f"the model has class {few(known)} already. Give --merge to take the images into it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = clean_loader(folder.images, config, device, args.batch_size, args.workers)
    images = add_from_batches(model.to(device), _numbered(loader, folder, new), new, names, images)
    model.cpu()
    return images


def _numbered(loader: Any, folder: Folder, new: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches with the places of their classes in ``new``; -1 for images that cannot be read."""
    place = {name: k for k, name in enumerate(new)}
    seen = 0
    for images, targets in loader:
        names = folder.class_names[seen : seen + len(targets)]
        places = torch.tensor([place[name] for name in names])
        yield images, places.where(targets.cpu() != UNREADABLE, torch.tensor(-1))
        seen += len(targets)


def _empty_folders(place: Path, folder: Folder) -> list[str]:
    """Folders right in FOLDER below which no image lies."""
    parents = {Path(path).relative_to(place).parts[0] for path, _ in reader_of(folder.images).samples}
    inside = sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith(HIDDEN))
    return [name for name in inside if name not in parents]


def _names(args: argparse.Namespace, opened: Opened) -> list[str]:
    given = opened.label_names
    if args.names is not None:
        try:
            given = args.names.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as e:
            raise UserError(
                f"cannot read --names {args.names}: {e}. Give a text file with one class name a line"
            ) from e
    elif not given:
        raise UserError(f"{args.run} has no class names. Give them in the order of its classes, one a line, with "
                        "--names FILE")  # fmt: skip
    return class_names(opened.model, given)


def _check_output(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty. Name a folder with -o that does not exist yet")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder.parent}: {e.strerror}. Choose another folder with -o") from e
    check_writable(folder.parent)


@contextmanager
def _wrong_input(run: str) -> Iterator[None]:
    """What the library refuses, as a line for a person."""
    try:
        yield
    except ValueError as e:
        raise UserError(f"{run}: {e}") from e
