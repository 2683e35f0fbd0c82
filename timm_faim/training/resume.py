"""Which run folder a run writes to, and the checkpoint it goes on from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_faim.documents import read_yaml
from timm_faim.run.errors import UserError
from timm_faim.run.files import check_writable, create_run_folder
from timm_faim.run.finished import work_left
from timm_faim.run.lock import lock_run_folder
from timm_faim.run.options import AUTO, marked
from timm_faim.training.checkpoints import (
    FOLDER,
    check_checkpoint,
    epochs_done,
    find_checkpoint,
    is_checkpoint,
    layout_of,
)
from timm_faim.training.options import GROUPS, ONE_LAUNCH, Options
from timm_faim.training.removed import REMOVED

# Options that may differ between the parts of one run.
_RUNTIME = {"config", *ONE_LAUNCH, *marked(GROUPS.values(), "runtime")}


OF_CROP = ("crop_mode", "crop_pct", "train_crop_mode")  # options that --crop-mode auto sets
OF_HEAD = ("head_recipe", "head_share")  # and --head-recipe auto


def open_run_folder(
    options: Options,
    requested: dict[str, Any],
    accelerator: Accelerator,
    img_size: int,
    epochs: int,
    count: int,
    log: Callable,
) -> tuple[Path, Path | None]:
    """Find or make the run folder and the checkpoint; a collective call.

    Args:
        options: all options, completed.
        requested: `as_recipe` of the options as they were asked for, taken before any was derived from others.
        accelerator: for the main process to decide and the others to follow.
        img_size: pixels, for the name of a new folder.
        epochs: length of the run, which tells finished ones from others.
        count: number of training images.
        log: print of the main process.

    Returns:
        The folder, and the checkpoint to resume from or None.

    Raises:
        UserError: the folder cannot be used, or --resume finds nothing, something damaged or more than one run.
    """
    decided: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            folder = _choose_folder(options, requested, img_size, epochs, log)
            lock_run_folder(folder)
            decided[0] = str(folder)
        except UserError as e:
            decided[1] = str(e)
    folder, problem = broadcast_object_list(decided)
    if problem:
        raise UserError(problem)
    if not options.checkpoints.resume:
        return Path(folder), None

    named = _checkpoint_of(options.checkpoints.resume)
    if named is not None:
        check_checkpoint(named, accelerator)
    checkpoint = named or find_checkpoint(Path(folder), accelerator, log)
    if checkpoint is None and options.checkpoints.resume != "auto":
        raise UserError(
            f"--resume {options.checkpoints.resume}: no whole checkpoint in {Path(folder, FOLDER)}. Name a "
            "run folder or a checkpoint in it, or use --resume auto, which starts anew where there is none"
        )
    if checkpoint is not None and accelerator.is_main_process:
        _tell(requested, Path(folder), checkpoint, accelerator, count, log)
    return Path(folder), checkpoint


def _choose_folder(options: Options, requested: dict[str, Any], img_size: int, epochs: int, log: Callable) -> Path:
    resume, output, experiment = options.checkpoints.resume, options.run.output, options.run.experiment
    model = options.model.model
    if not resume:
        return create_run_folder(output, experiment, model, img_size)
    if resume != "auto":
        checkpoint = _checkpoint_of(resume)
        folder = checkpoint.parents[1] if checkpoint else Path(resume)
        if not folder.is_dir():
            raise UserError(f"--resume {resume} is no folder. Name a run folder or a checkpoint in it, or auto")
        return check_writable(folder)
    if experiment:
        folder = Path(output, experiment)
        if folder.is_dir():
            return check_writable(folder)
        return create_run_folder(output, experiment, model, img_size)

    runs = [path.parents[1] for path in Path(output).glob(f"*/{FOLDER}/checkpoint-*")]
    unfinished = [
        run
        for run in sorted(set(runs))
        if not _changes(run, requested) and (epochs_done(run) < epochs or work_left(options.finish, run, epochs))
    ]
    if len(unfinished) > 1:
        raise UserError(
            f"--resume auto finds {len(unfinished)} unfinished runs with these options in {output}: "
            f"{', '.join(run.name for run in unfinished[:3])}. Choose one with --resume FOLDER, or give "
            "each run a name with --experiment"
        )
    if unfinished:
        return check_writable(unfinished[0])
    log(f"--resume auto: no unfinished run with these options in {output}; starting anew")
    return create_run_folder(output, "", model, img_size)


def chosen_before(options: Options, requested: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """What an earlier part of the run that --resume auto goes on with has chosen for --crop-mode auto and --head-recipe
    auto, put into the options as well; empty where there is none. A collective call."""
    chosen = OF_CROP if options.input.crop_mode == AUTO else ()
    chosen += OF_HEAD if options.head_recipe.head_recipe == AUTO else ()
    if options.checkpoints.resume != "auto" or not chosen:
        return {}
    found: dict[str, Any] = {}
    if accelerator.is_main_process:
        name = options.run.experiment  # such a run goes on whatever else has changed
        runs = sorted(path.parent for path in Path(options.run.output).glob(f"{name or '*'}/args.yaml"))
        runs = [run for run in runs if name or _changes(run, requested).keys() <= set(chosen)]
        before = read_yaml(runs[0] / "args.yaml") if runs else None
        found = {key: before[key] for key in chosen if key in before} if isinstance(before, dict) else {}
    (found,) = broadcast_object_list([found])
    for group in (options.input, options.augmentation, options.head_recipe):
        vars(group).update((key, value) for key, value in found.items() if key in vars(group))
    return found


def _checkpoint_of(resume: str) -> Path | None:
    path = Path(resume).absolute()
    return path if is_checkpoint(path) else None


def _changes(folder: Path, requested: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options of a run folder that differ from those asked for: name to (before, now)."""
    try:
        before = read_yaml(folder / "args.yaml")
    except (OSError, ValueError):
        return {"args.yaml": (None, None)}
    if not isinstance(before, dict):
        return {"args.yaml": (None, None)}
    now = yaml.safe_load(yaml.safe_dump(requested))
    derived = {"lr"} - now.keys()  # the rate that follows the batch is on record, but was not asked for
    idle = {key for key, (default, _) in REMOVED.items() if before.get(key) == default}
    defaults = {key: value for group in GROUPS.values() for key, value in vars(group()).items()}
    newer = {key for key in now.keys() - before.keys() if now[key] == defaults.get(key)}  # than that run
    keys = (before.keys() | now.keys()) - _RUNTIME - derived - idle - newer
    return {key: (before.get(key), now.get(key)) for key in sorted(keys) if before.get(key) != now.get(key)}


def _tell(
    requested: dict[str, Any], folder: Path, checkpoint: Path, accelerator: Accelerator, count: int, log: Callable
) -> None:
    log(f"resuming from {checkpoint}")
    for key, (before, now) in _changes(folder, requested).items():
        log(f"  option {key} has changed: {before} before, {now} now")
    processes, images = (layout_of(checkpoint)[key] for key in ("processes", "images"))
    if images != count:
        log(f"  the training data had {images} images before and have {count} now; the epoch goes on at that image")
    if processes != accelerator.num_processes:
        log(
            f"  the checkpoint was written by {processes} processes, this run has {accelerator.num_processes}. "
            "Weights, optimiser and schedule go on as they were; not exact: batch-norm statistics of single processes, "
            "which images share a batch, and the random augmentation; an epoch goes on at the nearest batch"
        )
