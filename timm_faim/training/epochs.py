"""The run over its epochs: train, evaluate, save, report; from where the progress stands."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from timm.utils import distribute_bn

from timm_faim.report.plots import draw_learning_curve, has_matplotlib
from timm_faim.run.errors import UserError
from timm_faim.run.summary import append_summary, cut_summary, epoch_line, head_metrics, read_summary, validation_line
from timm_faim.run.weights import keep_best_epochs, save_weights
from timm_faim.training.data import count_unreadable
from timm_faim.training.ending import chosen_metric, end_weights, validate
from timm_faim.training.loop import Training, check_weights, train_one_epoch
from timm_faim.training.optimiser import learning_rates
from timm_faim.training.state import Progress


def train_epochs(run: Training, val_loader: Any, image_loaders: Sequence[Any], epochs: int, log: Callable) -> bool:
    """Train up to the last epoch or --stop-epoch; a start in closed form is evaluated before.

    Args:
        run: the run.
        val_loader: what is evaluated after an epoch, or None.
        image_loaders: timm's loaders, for the count of unreadable images.
        epochs: length of the run.
        log: print of the main process.

    Returns:
        False when it stopped before because a process was asked to, with a checkpoint to resume from.

    Raises:
        UserError: a loss that is not finite, unreadable data; what is saved so far is kept.
    """
    options, progress = run.options, run.progress
    is_new = progress == Progress()
    if run.accelerator.is_main_process:
        cut_summary(run.run_folder / "summary.csv", -1 if is_new else progress.epoch)
    last = epochs if options.checkpoints.stop_epoch is None else min(epochs, options.checkpoints.stop_epoch)
    try:
        if is_new and run.starts_fitted:
            finish_start(run, val_loader, log)
        while progress.epoch < last:
            trained = train_one_epoch(run)
            if trained is not None:
                finish_epoch(run, trained, val_loader, image_loaders, epochs, log)
            if run.is_stopping and progress.epoch < last:
                log(
                    f"asked to stop: epoch {progress.epoch + 1}, batch {progress.step + 1} is saved in "
                    f"{run.run_folder}. Go on with --resume auto"
                )
                return False
    except KeyboardInterrupt:
        log(
            f"\nstopped by Ctrl-C in epoch {progress.epoch + 1}; {progress.epoch} finished epochs are kept in "
            f"{run.run_folder}. Go on from the last checkpoint with --resume auto"
        )
        sys.exit(130)
    return True


def finish_start(run: Training, val_loader: Any, log: Callable) -> None:
    """Evaluate heads in closed form before any training, and keep them as epoch 0."""
    validated = {} if val_loader is None else validate(run, val_loader)
    if not math.isfinite(validated.get("loss", 0.0)):
        raise UserError(f"the validation loss is {validated['loss']} at the start. Leave --head-init data out")
    metric, decreasing = chosen_metric(run.options.run.eval_metric, {}, validated, val_loader is not None)
    is_best = _keep(run, 0, head_metrics(run.part), validated, metric, decreasing)
    log(f"start: {validation_line(validated) or 'not validated'}{'  *' if is_best else ''}")
    if run.checkpointer is not None:
        run.checkpointer.save(run.progress)


def finish_epoch(
    run: Training, trained: dict[str, Any], val_loader: Any, image_loaders: Sequence[Any], epochs: int, log: Callable
) -> None:
    """Evaluate, save weights and checkpoint, write and print the row of an epoch whose batches are done."""
    options, accelerator, progress, epoch = run.options, run.accelerator, run.progress, run.progress.epoch + 1
    if accelerator.num_processes > 1 and options.device.dist_bn:
        for module in (run.task.get_trainable_module(), run.task.get_trainable_module(ema=True)):
            if module is not None:
                distribute_bn(module, accelerator.num_processes, reduce=options.device.dist_bn == "reduce")
    is_evaluated = val_loader is not None and (epoch % options.run.val_interval == 0 or epoch == epochs)
    validated = validate(run, val_loader) if is_evaluated else {}
    if epoch == epochs:
        validated = end_weights(run, validated, val_loader, log)
    if not math.isfinite(validated.get("loss", 0.0)):
        raise UserError(
            f"the validation loss is {validated['loss']} after epoch {epoch}. Checkpoints of earlier "
            f"epochs are kept in {run.run_folder}. Try a lower --lr or --clip-grad"
        )
    unreadable = count_unreadable(image_loaders, accelerator) if options.data.skip_unreadable else 0

    if len({group["lr_scale"] for group in run.optimizer.param_groups}) > 1:
        trained.update({f"lr_{part}": rate for part, rate in learning_rates(run.optimizer).items()})
    trained.update(head_metrics(run.part))
    lr = sum(group["lr"] for group in run.optimizer.param_groups) / len(run.optimizer.param_groups)

    metric, decreasing = chosen_metric(options.run.eval_metric, trained, validated, val_loader is not None)
    if run.scheduler is not None:
        run.scheduler.step(epoch, metric)
    is_best = _keep(run, epoch, trained, validated, metric, decreasing, lr)
    log(epoch_line(epoch, epochs, trained, validated, is_best))
    if unreadable:
        log(f"           {unreadable} unreadable images left out so far")
    if epoch == 1 and not has_matplotlib():
        log("no learning_curve.png: matplotlib is not installed (pip install 'timm-faim[train]')")
    progress.end_epoch()
    if run.checkpointer is not None:
        run.checkpointer.save(progress)


def _keep(
    run: Training,
    epoch: int,
    trained: dict[str, Any],
    validated: dict[str, Any],
    metric: float | None,
    decreasing: bool,
    lr: float | None = None,
) -> bool:
    """Save the weights after `epoch` epochs, add their row, draw the curves; whether they are the best so far."""
    progress, folder = run.progress, run.run_folder
    is_best = metric is not None and (
        progress.best is None or (metric < progress.best if decreasing else metric > progress.best)
    )
    progress.best = metric if is_best else progress.best
    check_weights(run)
    state = run.whole_state()
    if run.accelerator.is_main_process:
        save_weights(state, folder, is_best or progress.best is None)
        if metric is not None:
            kept = run.options.checkpoints.checkpoint_hist
            progress.top = keep_best_epochs(folder, progress.top, epoch, metric, decreasing, kept)
        append_summary(folder / "summary.csv", epoch, trained, validated, lr)
        draw_learning_curve(folder / "learning_curve.png", read_summary(folder / "summary.csv"))
        run.accelerator.log(trained | {f"eval_{key}": value for key, value in validated.items()}, step=epoch)
    return is_best
