"""`timm-faim fit`: a classifier in closed form, saved like a training run, with evaluation and report."""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import random_seed

from timm_faim.calibration import FOLDS, Calibration, apply_temperature_, calibrate, lookalike_folds
from timm_faim.classifier.neighbours import Gallery
from timm_faim.data import cache_dir
from timm_faim.fitting.extract import extract, only_head
from timm_faim.fitting.heads import fit_head, held_out_logits, logits_of, points_of
from timm_faim.fitting.store import Features, key_of
from timm_faim.images.checked import CheckedImages, reader_of
from timm_faim.images.datasets import TrainingData, open_datasets
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.page import write_report
from timm_faim.report.tables import file_names, summary_lines, write_evaluation
from timm_faim.run.calibrated import calibration_line
from timm_faim.run.errors import UserError, resource_advice
from timm_faim.run.files import create_run_folder
from timm_faim.run.finished import CALIBRATION, REPORT, record_done
from timm_faim.run.lock import lock_run_folder, release_locks
from timm_faim.run.summary import append_summary, head_metrics, read_summary, save_recipe
from timm_faim.run.weights import CONFIG, save_config, save_weights
from timm_faim.training.args import is_faim, parse_args
from timm_faim.training.data import build_clean_loader
from timm_faim.training.launch import build_accelerator
from timm_faim.training.model import build_data_config, build_model, input_channels
from timm_faim.training.options import Options, as_recipe

_SPLITS = ("val", "validation", "valid", "eval", "test")
_KEPT = 2**30  # bytes of training points that a run keeps


def fit(args: argparse.Namespace) -> None:
    """Fit a classifier as the options say.

    Raises:
        UserError: wrong input.
    """
    options = parse_args(_words(args), "timm-faim fit")
    try:
        with resource_advice(options.run.batch_size, 1, options.run.output):
            _fit(args, options)
    finally:
        release_locks()


def _words(args: argparse.Namespace) -> list[str]:
    """The same as options of a training that fits its head and does not train."""
    root = Path(args.folder)
    has_train = (root / "train").is_dir()
    has_val = has_train and any((root / name).is_dir() for name in _SPLITS)
    if has_val and args.val_fraction is not None:
        raise UserError(f"--val-fraction {args.val_fraction:g} holds out training images, and {root} has validation "
                        "images. Leave it out")  # fmt: skip
    model = f"local-dir:{args.model}" if Path(args.model).is_dir() else args.model
    if not is_faim(model):
        raise UserError(f"--model {model} has no FAIM head. Use --model faim_{model}")
    words = ["--data-dir", str(root), "--model", model, "--epochs", "0", "--head-init", "data"]
    words += ["--pretrained-path", args.pretrained_path] if args.pretrained_path else ["--pretrained"]
    words += [] if has_train else ["--train-split", ""]
    words += [] if has_val else ["--val-split", ""]
    words += ["--faim-cfg", *args.faim_cfg] if args.faim_cfg else []
    for name in ("img_size", "crop_pct", "class_map", "batch_size", "workers", "output", "experiment"):
        value = getattr(args, name)
        words += [] if value in (None, "") else [f"--{name.replace('_', '-')}", str(value)]
    words += ["--skip-unreadable"] * args.skip_unreadable + ["--no-report"] * args.no_report
    return words + ["--amp", "--amp-dtype", "bfloat16"] * args.amp


def _fit(args: argparse.Namespace, options: Options) -> None:
    accelerator = build_accelerator(options)
    is_main = accelerator.is_main_process
    log = print if is_main else lambda *_: None
    random_seed(options.run.seed, 0)
    data = open_datasets(options.data, options.run, input_channels(options.input))
    model = build_model(options, data.num_classes).to(accelerator.device).eval()
    head = only_head(model)
    data_config = build_data_config(options.input, model)
    datasets = {"train": data.train} | ({} if data.val is None else {"val": data.val})
    for dataset in datasets.values():
        if isinstance(dataset, CheckedImages):
            dataset.is_training = False  # an unreadable image is left out, no other one counts twice
    loaders = {split: build_clean_loader(options, dataset, data_config, accelerator)
               for split, dataset in datasets.items()}  # fmt: skip
    started = time.perf_counter()
    with _store_folder(args, model, data_config, datasets) as folder:
        ran = extract(model, loaders, folder, accelerator)
        if is_main:
            features = {split: Features(folder, split) for split in datasets}
            seconds = time.perf_counter() - started
            count, how = sum(map(len, features.values())), "computed" if ran else "found in the cache"
            log(f"features of {count} images {how} in {seconds:.1f} s")
            _finish(args, options, model, head, data, data_config, loaders, features, accelerator, log)
        accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def _store_folder(
    args: argparse.Namespace, model: torch.nn.Module, data_config: dict[str, Any], datasets: dict[str, Any]
) -> Iterator[Path]:
    """Where the features are: in the cache, or for this fit alone."""
    readers = [reader_of(dataset) for dataset in datasets.values()]
    if args.no_cache or not all(isinstance(reader, ReaderImageFolder) for reader in readers):
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            yield Path(folder, "store")
        return
    files = [path for reader in readers for path, _ in reader.samples]
    settings = data_config | {"amp": args.amp, "splits": [len(reader.samples) for reader in readers]}
    settings |= {"model": str(getattr(model, "faim_cfg", "")), "classes": [k for r in readers for _, k in r.samples]}
    yield (args.cache or cache_dir() / "features") / key_of(model, settings, files)


def _finish(
    args: argparse.Namespace,
    options: Options,
    model: torch.nn.Module,
    head: Any,
    data: TrainingData,
    data_config: dict[str, Any],
    loaders: dict[str, Any],
    features: dict[str, Features],
    accelerator: Accelerator,
    log: Any,
) -> None:
    """All that comes after the features; for the main process."""
    started = time.perf_counter()
    train = features["train"]
    counts = np.bincount(train.target, minlength=data.num_classes)
    if not counts.all():
        missing = [data.label_names[k] if data.label_names else str(k) for k in np.flatnonzero(counts == 0)[:3]]
        raise UserError(f"no readable training image of {', '.join(missing)}. Add images, or remove the class")
    fit_head(head, train, args.shrinkage)
    points = points_of(head, train)
    images, logits, target, source = "val", None, None, "validation"
    if "val" in features:
        logits, target = logits_of(head, features["val"]), features["val"].target
        places = features["val"].place
    else:
        images, source = "train", "cross-fitted training images"
        count = round(1 / args.val_fraction) if args.val_fraction else FOLDS
        fold = lookalike_folds(points, torch.from_numpy(train.target), count).numpy()
        logits, chosen = held_out_logits(head, train, args.shrinkage, fold)
        target, places = train.target[chosen], train.place[chosen]
        log(f"{len(target)} training images held out in turn, in {count} folds; the saved head is fitted to all")
    calibration, evaluation = None, None
    if len(target):
        calibration = _calibration(logits, torch.from_numpy(target), source, log)
        temperature = calibration.temperature if calibration is not None else 1.0
        evaluation = Evaluation.of(logits / temperature, torch.from_numpy(target))
        evaluation.index[:] = places
    if calibration is not None:
        apply_temperature_(model, calibration.temperature)
    log(f"fitted to {len(train)} images of {data.num_classes} classes in {time.perf_counter() - started:.1f} s")

    img_size = data_config["input_size"][-1]
    folder = create_run_folder(options.run.output, options.run.experiment, options.model.model, img_size)
    lock_run_folder(folder)
    save_recipe(as_recipe(options), folder / "args.yaml")
    record = {"images": counts.tolist(), "fit": {"shrinkage": args.shrinkage}}
    record |= {} if calibration is None else {"calibration": calibration.to_json()}
    save_config(
        model, folder / CONFIG, data_config, data.label_names, options.model.pretrained, data.class_order, record
    )
    save_weights(model.state_dict(), folder, is_best=True)
    metrics = evaluation.metrics() if evaluation is not None else {}
    shown = {key: metrics[key] for key in ("loss", "top1", "top5", "samples") if key in metrics}
    append_summary(folder / "summary.csv", 0, head_metrics(model), shown)
    if not args.no_neighbours and len(train) * train.width * 2 <= _KEPT:
        names = file_names(data.train) or [str(place) for place in train.place]
        Gallery(points, [names[place] for place in train.place]).save(folder)
    if evaluation is not None:
        info = {"model": options.model.model, "images": source}
        write_evaluation(folder / "eval", evaluation, data.label_names, file_names(loaders[images].dataset), info)
        for line in summary_lines(evaluation, data.label_names):
            log(line)
    if not args.no_report:
        page = write_report(folder, model, read_summary(folder / "summary.csv"), label_names=data.label_names,
                            evaluation=evaluation, train_images=loaders["train"],
                            val_images=loaders[images], options=folder / "args.yaml")  # fmt: skip
        log(f"report: {page}" if page else "no report.html: pip install 'timm-faim[train]'")
    record_done(folder, 0, CALIBRATION, REPORT)
    log(f"saved: {folder}\nclassify images: timm-faim predict IMAGES --model {folder}")


def _calibration(logits: torch.Tensor, target: torch.Tensor, source: str, log: Any) -> Calibration | None:
    try:
        calibration = calibrate(logits, target, source)
    except ValueError as e:
        log(f"not calibrated: {e}")
        return None
    log(calibration_line(calibration))
    return calibration
