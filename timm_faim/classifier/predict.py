"""`timm-faim predict`: classify images, in one process or several, and go on where a killed run was."""

import argparse
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from timm_faim.classifier.adapted import adapt_to_images, check_adaptable
from timm_faim.classifier.classifier import Classifier, ExportedModel, load
from timm_faim.classifier.gallery_page import write_gallery
from timm_faim.classifier.neighbours import Gallery
from timm_faim.classifier.prediction import Judge
from timm_faim.classifier.rows import Journal, Row, line_of, row_of, write_rows
from timm_faim.images.checked import UNREADABLE
from timm_faim.images.files import images_of, list_images, why_unreadable
from timm_faim.images.loaders import clean_loader
from timm_faim.models.checkpoint import sha256
from timm_faim.run.errors import UserError
from timm_faim.run.files import check_writable
from timm_faim.run.gather import raise_together
from timm_faim.run.opening import choose_device
from timm_faim.run.weights import hash_tensors


def predict(args: argparse.Namespace) -> None:
    """Classify the images that the options name; rows go to the terminal or to --output, a summary to stderr.

    Raises:
        UserError: wrong input.
    """
    for stream in (sys.stdin, sys.stdout):  # names of files keep their bytes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    if args.output is not None and args.html is not None and args.output.resolve() == args.html.resolve():
        raise UserError(f"--output and --html are the same file, {args.html}. Give them different names")
    for path in filter(None, (args.output, args.html)):
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise UserError(f"{path} cannot be written: {'a folder' if path.is_dir() else 'no folder to hold it'}. "
                            "Name a file")  # fmt: skip
        check_writable(path.resolve().parent)
    kind, device = _format(args), choose_device(args.device)
    state = PartialState(cpu=device.type == "cpu")
    device = device if state.num_processes == 1 else state.device
    paths = _paths(args.images, state)
    classifier = load(args.model, device, args.amp, "--model")
    try:
        judge = classifier.judge(args.top, args.unknown, args.set)
    except ValueError as e:
        raise UserError(f"--unknown {args.unknown:g}, --set {args.set}: {e}") from e
    if args.neighbours and classifier.head is None:
        raise UserError("--neighbours needs a model with one FAIM head. Leave it out")
    gallery = classifier.gallery() if args.neighbours else None
    if args.adapt:
        check_adaptable(classifier)

    journal = None
    if args.output is not None and state.is_main_process:
        settings = {key: str(getattr(args, key)) for key in ("model", "top", "unknown", "set", "neighbours", "amp")}
        settings |= {"adapt": hashlib.sha256(repr(paths).encode()).hexdigest()} if args.adapt else {}
        journal = Journal(args.output, settings | {"classifier": _digest(classifier)})
        if journal.rows:
            print(f"going on after {len(journal.rows)} images of an earlier run", file=sys.stderr)
    done = broadcast_object_list([{row["file"] for row in journal.rows} if journal else set()])[0]
    left = [path for path in paths if path not in done]
    if args.adapt:
        note = adapt_to_images(classifier, paths, args.batch_size, args.workers, state)
        if state.is_main_process:
            print(note, file=sys.stderr)
    made = rows_of(left, classifier, judge, gallery, args.batch_size, args.workers, state, args.neighbours)
    started, rows = time.perf_counter(), list(journal.rows) if journal else []
    with tqdm(total=len(left), desc="images", unit="image", leave=False, disable=None if journal else True) as bar:
        for found in _in_step(made, len(left), args.batch_size, state):
            rows += found
            bar.update(len(found))
            if journal is not None:
                journal.add(found)
            elif state.is_main_process and args.output is None:
                for row in found:
                    print(json.dumps(row, ensure_ascii=False) if kind == "jsonl" else line_of(row))
    seconds = time.perf_counter() - started
    if not state.is_main_process:
        return
    if all("error" in row for row in rows):
        raise UserError(f"none of the {len(rows)} images can be read, such as {rows[0]['file']}: {rows[0]['error']}")
    order = {path: i for i, path in enumerate(paths)}
    rows = sorted((row for row in rows if row["file"] in order), key=lambda row: order[row["file"]])
    if journal is not None:
        write_rows(args.output, rows, kind)
        journal.remove()
    if args.html is not None:
        write_gallery(args.html, rows, f"Predictions of {args.model}", args.html_images)
    for line in _summary(rows, len(left), seconds, classifier, args):
        print(line, file=sys.stderr)


def _paths(words: Sequence[str], state: PartialState) -> list[str]:
    """The images of the places on the command line, and of those that come on standard input in the place of "-"; the
    main process, which alone should read it, tells the others."""
    found: tuple[list[str], str] = ([], "")
    if state.is_main_process:
        try:
            places: list[str] = []
            for word in words:
                places += [line.rstrip("\n") for line in sys.stdin if line.strip()] if word == "-" else [word]
            found = (list_images(places), "")
        except UserError as e:
            found = ([], str(e))
    paths, problem = broadcast_object_list([found])[0]
    if problem:
        raise UserError(problem)
    return paths


def _format(args: argparse.Namespace) -> str:
    by_name = args.output.suffix.lower().removeprefix(".") if args.output is not None else "table"
    kind = args.format or {"json": "jsonl", "ndjson": "jsonl"}.get(by_name, by_name)
    if args.output is not None and kind not in ("csv", "jsonl"):
        raise UserError(f"--output {args.output} is of no known format: name a file .csv or .jsonl, or give --format")
    if args.output is None and kind == "csv":
        raise UserError("--format csv needs a file, whose columns are known at the end: give --output FILE.csv")
    return kind


def _digest(classifier: Classifier) -> str:
    """Changes when the weights, the names, the preprocessing or the calibration do."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tensors(digest, classifier.model.state_dict())
    if isinstance(classifier.model, ExportedModel):
        digest.update(sha256(classifier.model.file.path).encode())
    calibration = classifier.calibration.to_json() if classifier.calibration is not None else None
    known = [classifier.names, classifier.data_config, calibration]
    digest.update(json.dumps(known, default=str).encode())
    return digest.hexdigest()


def rows_of(
    paths: Sequence[str],
    classifier: Classifier,
    judge: Judge,
    gallery: Gallery | None,
    batch_size: int,
    workers: int,
    state: PartialState,
    neighbours: int = 0,
) -> Iterator[list[Row]]:
    """Rows of this process's share of the images, batch by batch."""
    mine, start = paths[state.process_index :: state.num_processes], 0
    if not mine:
        return
    images = images_of(mine, classifier.mode)
    for batch, numbers in clean_loader(images, classifier.data_config, classifier.device, batch_size, workers):
        logits, points = (classifier.logits(batch), None) if gallery is None else classifier.points(batch)
        found = judge(logits)
        near = gallery.nearest(points, neighbours) if gallery is not None else [()] * len(found)
        rows = []
        for file, number, prediction, alike in zip(mine[start:], numbers.tolist(), found, near, strict=False):
            if number == UNREADABLE:
                rows.append({"file": file, "error": why_unreadable(file, classifier.mode)})
            else:
                rows.append(row_of(file, replace(prediction, neighbours=alike)))
        start += len(found)
        yield rows


def _in_step(batches: Iterator[list[Row]], images: int, batch_size: int, state: PartialState) -> Iterator[list[Row]]:
    """The rows of all processes, one batch of each at a time; what one of them raises ends all of them."""
    if state.num_processes == 1:
        yield from batches
        return
    share = (images - 1) // state.num_processes + 1  # of the first process, which has the most
    for _ in range((share - 1) // batch_size + 1):
        try:
            mine, problem = next(batches, []), None
        except (UserError, RuntimeError) as e:
            mine, problem = [], f"{e} (process {state.process_index})"
        raise_together(problem)
        yield gather_object(mine)


def _summary(
    rows: Sequence[Row], new: int, seconds: float, classifier: Classifier, args: argparse.Namespace
) -> Iterator[str]:
    errors = [row for row in rows if "error" in row]
    rate = f", {new / seconds:.0f} images/s" if new and seconds > 0 else ""
    yield f"{len(rows)} images in {seconds:.1f} s{rate}"
    if errors:
        yield f"{len(errors)} cannot be read, such as {errors[0]['file']} ({errors[0]['error']})"
    if args.unknown and classifier.calibration is not None and classifier.calibration.reject:
        unknown = sum(row.get("known") is False for row in rows)
        yield f"{unknown} are called unknown; of images of the classes at most {100 * args.unknown:g} % are"
    elif args.unknown and classifier.calibration is None:
        yield "nothing is called unknown: the model was not calibrated on held-out images"
    if written := [str(path) for path in (args.output, args.html) if path is not None]:
        yield f"written: {', '.join(written)}"
