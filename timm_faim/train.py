"""One training run, from the command line to the saved model: what `train_faim.py` and `timm-faim train` do.

The run folder gets summary.csv, learning_curve.png, report.html, args.yaml, config.json, last.safetensors,
model_best.safetensors, top/ with the best epochs and checkpoints/ to resume from.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from timm.utils import random_seed

from timm_faim import faim_heads, hub
from timm_faim.images.datasets import TrainingData, open_datasets, targets_of
from timm_faim.images.folders import check_same_classes
from timm_faim.run.errors import LOST_PROCESS, RankError, UserError, is_lost_process, report, resource_advice
from timm_faim.run.finished import CALIBRATION, REPORT, forget_done, push_to, record_done, work_left
from timm_faim.run.lock import release_locks
from timm_faim.run.record import record_of
from timm_faim.run.summary import save_recipe
from timm_faim.run.weights import BEST, check_same_head, restore_best, save_config, saved_class_order, saved_config
from timm_faim.training import finish, tasks
from timm_faim.training.args import parse_args
from timm_faim.training.class_sampling import build_class_sampler
from timm_faim.training.data import build_fit_loader, build_loaders
from timm_faim.training.epochs import train_epochs
from timm_faim.training.features import cache_features, only_classifier
from timm_faim.training.fits import build_refit, fit_heads_to, starts_from_data
from timm_faim.training.freeze import apply_freeze
from timm_faim.training.head_recipe import choose_head_recipe
from timm_faim.training.inputs import choose_crop
from timm_faim.training.launch import build_accelerator, start_trackers, wrap_repeated_blocks
from timm_faim.training.loop import Training
from timm_faim.training.loss import build_criterion, build_mixup
from timm_faim.training.model import build_data_config, build_model, check_model_name, input_channels, sync_batch_norm
from timm_faim.training.optimiser import build_optimizer, build_scheduler, learning_rate, split_groups
from timm_faim.training.options import ONE_LAUNCH, Options, as_recipe
from timm_faim.training.plan import dry_run
from timm_faim.training.rare_classes import class_counts
from timm_faim.training.resume import chosen_before, open_run_folder
from timm_faim.training.sampling import TrainingOrder
from timm_faim.training.start import Pull, StartWeights
from timm_faim.training.state import Checkpointer


def train(argv: Sequence[str], program: str = "train_faim.py") -> None:
    """One run, from the command line to the saved model."""
    options = parse_args(argv, program)
    try:
        with resource_advice(options.run.batch_size, options.optimiser.grad_accum_steps, options.run.output):
            train_with(options)
    finally:
        release_locks()


def train_with(options: Options) -> None:
    """One run with these options."""
    requested = as_recipe(options)  # before any option is derived from others
    check_model_name(options.model.model)
    if repo := options.finish.push_to_hub:
        hub.check_target(repo)
        hub.Release(repo, options.finish.hub_license)  # refuses a wrong licence before the training
    accelerator = build_accelerator(options)
    world, is_main = accelerator.num_processes, accelerator.is_main_process
    log = print if is_main else lambda *_, **__: None
    warnings.filterwarnings("once" if is_main else "ignore", message="This DataLoader will create")
    logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(name)s: %(message)s")

    # The same seed everywhere for the weights; augmentation and dropout draw from seeds of their own (sampling.py).
    random_seed(options.run.seed, 0)
    data = open_datasets(
        options.data,
        options.run,
        input_channels(options.input),
        options.model.num_classes,
        options.augmentation.epoch_repeats,
    )
    model = build_model(options, None if options.run.eval_only and options.model.pretrained else data.num_classes)
    requested |= chosen_before(options, requested, accelerator)
    requested |= choose_crop(options, model.to(accelerator.device), data, accelerator, log)
    data_config = build_data_config(options.input, model)
    train_loader, val_loader = build_loaders(options, data, data_config, accelerator)
    model = sync_batch_norm(options.device, model, accelerator).to(accelerator.device)
    if options.run.eval_only:
        finish.evaluate_only(options, model, data, val_loader, data_config["input_size"][-1], accelerator, log)
        return

    order = TrainingOrder(
        train_loader,
        options.run.seed,
        accelerator.process_index,
        build_class_sampler(options.contrastive, options.run, data, accelerator),
    )
    frozen = apply_freeze(options.learning, model)
    part, val_batches = model, val_loader
    if not options.schedule.epochs and not faim_heads(model):
        raise UserError(
            f"--epochs 0 fits FAIM heads in closed form, and {options.model.model} has none. Train it: --epochs 1"
        )
    clean_images = partial(build_fit_loader, options, data_config, accelerator, data.num_classes)
    starts_fitted = starts_from_data(options, model)
    requested |= choose_head_recipe(options.head_recipe, model, clean_images, accelerator, log)
    if starts_fitted:
        log("heads from class statistics of the training data")
        fit_heads_to(model, clean_images(), accelerator, options.head_recipe, "--head-init data")
    if options.learning.cache_features:
        clean = None if options.learning.cache_views else clean_images()
        order, val_batches = cache_features(options, model, order, clean, val_loader, accelerator)
        part, frozen = only_classifier(model), []
        log(f"features of {len(order.loader.target)} training images are computed; the head trains on them")

    criterion = build_criterion(options, part, class_counts(options.rare_classes, data))
    task = tasks.build_task(options, part, criterion, accelerator.device)
    accum = options.optimiser.grad_accum_steps
    options.schedule.lr = learning_rate(options.schedule, options.optimiser.opt, options.run.batch_size * accum * world)
    optimizer = build_optimizer(options.optimiser, options.schedule.lr, task.get_trainable_module())
    split_groups(optimizer, part, options.learning)
    scheduler, epochs = build_scheduler(options.schedule, options.run, optimizer, -(-len(order) // accum))
    if options.run.model_ema:  # a copy of the bare model: `prepare` below patches its forward and may wrap it
        task.setup_ema(decay=options.run.model_ema_decay, use_warmup=options.run.model_ema_warmup)
    start = StartWeights(part) if options.start.flags else None
    wrap_repeated_blocks(accelerator, task.get_trainable_module())
    trainable = task.get_trainable_module()
    task.trainable_module, optimizer = accelerator.prepare(trainable, optimizer)

    # Everything that a wrong option can break is built; from here on there is work to keep.
    run = Training(
        options,
        accelerator,
        model,
        part,
        task,
        optimizer,
        order,
        None,
        scheduler,
        mixup=build_mixup(options.mixing, options.loss, options.data, data.num_classes),
        frozen=frozen,
        starts_fitted=starts_fitted,
        start=start,
        pull=Pull(options.start.l2_sp, optimizer, part, start) if options.start.l2_sp else None,
    )
    if options.head.head_refit is not None and faim_heads(model):
        run.refit = build_refit(clean_images(), options.head.head_refit, epochs, options.head_recipe)
    if options.run.dry_run:
        dry_run(run, val_batches, epochs, log)
        return
    run.run_folder, checkpoint = open_run_folder(
        options, requested, accelerator, data_config["input_size"][-1], epochs, len(data.train), log
    )
    if start is not None:
        start.keep_in(run.run_folder, checkpoint is not None, is_main)
    layout = {
        "processes": world,
        "batch_size": options.run.batch_size,
        "grad_accum_steps": accum,
        "images": len(data.train),
    }
    run.checkpointer = Checkpointer(
        accelerator, run.run_folder, trainable, optimizer, layout, scheduler, task.get_trainable_module(ema=True)
    )
    if checkpoint is not None:
        check_same_head(model, run.run_folder, options.head.faim_cfg or ())
        check_same_classes(data.class_order, saved_class_order(run.run_folder), f"the run in {run.run_folder}")
        run.progress = run.checkpointer.load(checkpoint, len(order), not options.checkpoints.no_resume_opt)
        log(f"  at epoch {run.progress.epoch + 1}, batch {run.progress.step + 1} of {len(order)}")
    if options.checkpoints.start_epoch is not None:
        run.progress.start_at(options.checkpoints.start_epoch, run.updates_per_epoch)
        run.checkpointer.place_schedule(run.progress)
    if is_main and (later := run.checkpointer.set_later_aside(run.progress)):
        restore_best(run.run_folder, run.progress.top)
        log(f"  later checkpoints are set aside: {', '.join(later)}")
    recipe = {key: value for key, value in requested.items() if key not in ONE_LAUNCH} | {"lr": options.schedule.lr}
    if is_main:
        save_recipe(recipe, run.run_folder / "args.yaml")
        save_config(
            model,
            run.run_folder / "config.json",
            data_config,
            data.label_names,
            options.model.pretrained,
            data.class_order,
            _record(run.run_folder, data, is_done=run.progress.epoch == epochs),
        )
    start_trackers(accelerator, options.logging, run.run_folder, recipe)
    run.stop.install()
    if is_main and run.progress.epoch < epochs:
        forget_done(run.run_folder)

    log(
        f"{options.model.model}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{data.num_classes} classes, {len(data.train)} training and {len(data.val or ())} validation images, "
        f"input {'x'.join(map(str, data_config['input_size']))}; {world} x {accelerator.device.type}; "
        f"lr {options.schedule.lr:.3g} after {options.schedule.warmup_epochs} epochs of warm-up; "
        f"run folder {run.run_folder}"
    )
    started = time.perf_counter()
    has_ended = train_epochs(run, val_batches, (train_loader, val_loader), epochs, log)
    seconds = time.perf_counter() - started
    is_whole = has_ended and run.progress.epoch == epochs
    left = broadcast_object_list([work_left(options.finish, run.run_folder, epochs)])[0] if is_whole else []
    if has_ended:
        of_what = f"validation {options.run.eval_metric}" if val_loader is not None else "training loss"
        best = f"best {of_what} {run.progress.best:.2f}" if run.progress.best is not None else "not yet validated,"
        log(f"{best} after {seconds:.0f} s; weights in {run.run_folder / BEST}")
        if asked := [work for work in (CALIBRATION, REPORT) if work in left]:
            finish.finish(run, data, val_loader, data_config, asked, log)
        log(
            f"load it: import timm, timm_faim; model = timm.create_model('local-dir:{run.run_folder}', pretrained=True)"
        )
    if is_main and is_whole:
        record_done(run.run_folder, epochs, *(work for work in (CALIBRATION, REPORT) if work in left))
    accelerator.end_training()
    if is_main and (push := push_to(repo)) in left:  # no process waits for this one
        hub.publish_run(run.run_folder, repo, options.finish.hub_license, options.finish.hub_private, log)
        record_done(run.run_folder, epochs, push)


def _record(folder: Path, data: TrainingData, is_done: bool) -> dict[str, Any]:
    """What config.json says of the classes; a calibration stays with the weights that it was made for."""
    record = record_of(saved_config(folder)) if is_done else {}
    targets = targets_of(data.train)
    if targets is not None:
        record["images"] = np.bincount(targets, minlength=data.num_classes).tolist()
    return record


def main(argv: Sequence[str], program: str) -> None:
    """Entry point: a person's mistakes come out as one line and exit status 1."""
    try:
        train(argv, program)
    except UserError as error:
        report(error, program.removesuffix(".py"))
        sys.exit(1)
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        report(RankError(LOST_PROCESS), program.removesuffix(".py"))
        sys.exit(1)
