"""`timm-faim fit`: a classifier in closed form, saved like a training run, with evaluation and report."""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.utils import random_seed

from timm_faim.calibration import apply_temperature_, calibrate
from timm_faim.fitting.extract import extract, only_head
from timm_faim.fitting.heads import fit_head, held_out_logits, logits_of, points_of
from timm_faim.fitting.inputs import kept_trial
from timm_faim.fitting.recipe import Recipe, folds_of, make_recipe, reads_chosen, stages_to_offer, with_stages
from timm_faim.fitting.saving import Fitted, save_run
from timm_faim.fitting.store import Features, place
from timm_faim.fitting.unlabelled import follow_unlabelled, unlabelled_store
from timm_faim.images.checked import CheckedImages, reader_of
from timm_faim.images.datasets import TrainingData, open_datasets
from timm_faim.report.evaluation import Evaluation
from timm_faim.run.calibrated import calibration_line
from timm_faim.run.common import run_words
from timm_faim.run.errors import UserError, few, resource_advice
from timm_faim.run.files import create_run_folder
from timm_faim.run.lock import LOCK, lock_run_folder, release_locks
from timm_faim.run.weights import saved_config
from timm_faim.training.args import is_faim, parse_args
from timm_faim.training.data import build_clean_loader
from timm_faim.training.inputs import choose_crop
from timm_faim.training.launch import build_accelerator
from timm_faim.training.model import build_data_config, build_model, input_channels
from timm_faim.training.options import Options

_SPLITS = ("val", "validation", "valid", "eval", "test")


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
    if args.crop_mode == "model":
        args.crop_mode = None
    model = f"local-dir:{args.model}" if Path(args.model).is_dir() else args.model
    if not is_faim(model):
        raise UserError(f"--model {model} has no FAIM head. Use --model faim_{model}")
    channels = _channels(Path(args.model))
    words = ["--in-chans", str(channels)] if channels != 3 else []
    words += ["--data-dir", str(root), "--model", model, "--epochs", "0", "--head-init", "data"]
    words += ["--pretrained-path", args.pretrained_path] if args.pretrained_path else ["--pretrained"]
    words += [] if has_train else ["--train-split", ""]
    words += [] if has_val else ["--val-split", ""]
    words += ["--faim-cfg", *args.faim_cfg] if args.faim_cfg else []
    return words + ["--no-report"] * args.no_report + run_words(args)


def _channels(run: Path) -> int:
    """Input channels of a run; 3 of everything else."""
    cfg = saved_config(run).get("pretrained_cfg") if run.is_dir() else None
    size = cfg.get("input_size") if isinstance(cfg, dict) else None
    return size[0] if isinstance(size, list) and size and size[0] in (1, 2, 3, 4) else 3


def _fit(args: argparse.Namespace, options: Options) -> None:
    accelerator = build_accelerator(options)
    is_main = accelerator.is_main_process
    log = print if is_main else lambda *_: None
    random_seed(options.run.seed, 0)
    data = open_datasets(options.data, options.run, input_channels(options.input))
    for name in data.class_order or ():
        if name != name.encode("utf-8", "replace").decode():
            raise UserError(f"the name of class folder {name!r} is no valid UTF-8. Rename it")
    model = build_model(options, data.num_classes).to(accelerator.device).eval()
    given = (options.head.faim_cfg or {}).get("moments")
    if stages := stages_to_offer(args, options, model):
        model = with_stages(options, stages[:1], None, data.num_classes).to(accelerator.device)
    choose_crop(options, model, data, accelerator, log, partial(kept_trial, args.cache, args.no_cache))
    if len(stages) > 1:
        model = with_stages(options, stages, None, data.num_classes).to(accelerator.device)
    data_config = build_data_config(options.input, model)
    datasets = {"train": data.train} | ({} if data.val is None else {"val": data.val})
    for dataset in datasets.values():
        if isinstance(dataset, CheckedImages):
            dataset.is_training = False  # an unreadable image is left out, no other one counts twice
    loaders = {split: build_clean_loader(options, dataset, data_config, accelerator)
               for split, dataset in datasets.items()}  # fmt: skip
    with _run_folder(options, data_config["input_size"][-1], accelerator) as run_folder:
        with _store_folder(args, model, data_config, datasets) as folder:
            folder = Path(broadcast_object_list([str(folder)])[0])  # a temporary one is that of the main process
            started = time.perf_counter()
            ran = extract(model, loaders, folder, accelerator)
            seconds = time.perf_counter() - started
            with unlabelled_store(args, options, model, data_config, datasets, accelerator) as other:
                if is_main:
                    features = {split: Features(folder, split) for split in datasets}
                    count, how = sum(map(len, features.values())), "computed" if ran else "found in the cache"
                    log(f"features of {count} images {how} in {seconds:.1f} s")
                    features |= {} if other is None else {"unlabelled": Features(other, "unlabelled")}
                    _check_classes(features["train"], data)
                    weight = given.get("weight") if isinstance(given, dict) else None
                    recipe = make_recipe(args, model, features["train"], weight, bool(stages), log)
                    model, widths = reads_chosen(options, model, recipe), only_head(model).parts
                    features = {split: each.parts(widths, recipe.plan.parts) for split, each in features.items()}
                    fitted = _fit_head(args, model, recipe, data, features, log)
                accelerator.wait_for_everyone()
        if is_main:
            save_run(args, options, fitted, data, data_config, loaders, run_folder, log)
            log(f"saved: {run_folder}\nclassify images: timm-faim predict IMAGES --model {run_folder}")
    accelerator.end_training()


@contextmanager
def _run_folder(options: Options, img_size: int, accelerator: Accelerator) -> Iterator[Path | None]:
    """The folder of the run, claimed before the work and removed again where nothing came into it; None in other
    processes than the main one."""
    made: tuple[str, str] = ("", "")
    if accelerator.is_main_process:
        try:
            folder = create_run_folder(options.run.output, options.run.experiment, options.model.model, img_size)
            lock_run_folder(folder)
            made = (str(folder), "")
        except UserError as e:
            made = ("", str(e))
    name, problem = broadcast_object_list([made])[0]
    if problem:
        raise UserError(problem)
    try:
        yield Path(name) if accelerator.is_main_process else None
    except BaseException:
        if accelerator.is_main_process and not any(p.name != LOCK for p in Path(name).iterdir()):
            shutil.rmtree(name)
        raise


@contextmanager
def _store_folder(
    args: argparse.Namespace, model: torch.nn.Module, data_config: dict[str, Any], datasets: dict[str, Any]
) -> Iterator[Path]:
    """Where the features are: in the cache, or for this fit alone."""
    readers = [reader_of(dataset) for dataset in datasets.values()]
    files, settings = None, data_config | {"amp": args.amp, "skip": args.skip_unreadable}
    if all(isinstance(reader, ReaderImageFolder) for reader in readers):
        files = [path for reader in readers for path, _ in reader.samples]
        settings |= {"splits": [len(r.samples) for r in readers], "classes": [k for r in readers for _, k in r.samples]}
        settings |= {"model": [model.pretrained_cfg.get("architecture"), model._model_args]}
    with place(args, model, settings, files) as folder:
        yield folder


def _check_classes(train: Features, data: TrainingData) -> None:
    counts = np.bincount(train.target, minlength=data.num_classes)
    if not counts.all():
        missing = few([data.label_names[k] if data.label_names else str(k) for k in np.flatnonzero(counts == 0)])
        raise UserError(f"no readable training image of {missing}. Add images, or remove the class")


def _fit_head(
    args: argparse.Namespace,
    model: torch.nn.Module,
    recipe: Recipe,
    data: TrainingData,
    features: dict[str, Features],
    log: Callable,
) -> Fitted:
    """The head, and what it says of images that it is not fitted to; for the main process."""
    started, train, head = time.perf_counter(), features["train"], only_head(model)
    fit_head(head, train, recipe.plan)
    points, fold, unlabelled = points_of(head, train), None, None
    if "val" in features:
        val = features["val"]
        if not len(val):
            raise UserError("no validation image can be read. Repair them, or remove the folder")
        logits, target, places, source = logits_of(head, val), val.target, val.place, "validation"
    else:
        if recipe.held is not None and "unlabelled" not in features:
            logits, chosen = recipe.held_out(head)
        else:
            fold = recipe.folds(points, train.target, folds_of(args))
            logits, chosen = held_out_logits(head, train, recipe.plan, fold)
        target, places, source = train.target[chosen], train.place[chosen], "cross-fitted training images"
        log(f"{len(target)} training images held out in turn, in {folds_of(args)} folds; the saved head has all")
    if "unlabelled" in features:
        y = torch.from_numpy(target)
        logits, unlabelled = follow_unlabelled(head, features, args, recipe.plan, fold, logits, y, log)
    calibration, evaluation = None, None
    if len(target):
        calibration = calibrate(logits, torch.from_numpy(target), source)
        apply_temperature_(model, calibration.temperature)
        evaluation = Evaluation.of(logits / calibration.temperature, torch.from_numpy(target))
        evaluation.index[:] = places
        log(calibration_line(calibration))
    log(f"fitted to {len(train)} images of {data.num_classes} classes in {time.perf_counter() - started:.1f} s")
    counts = np.bincount(train.target, minlength=data.num_classes)
    record = recipe.to_json() | ({} if unlabelled is None else {"unlabelled": unlabelled})
    return Fitted(model, counts.tolist(), points, train.place, calibration, evaluation, record)
