"""The run over its epochs: train, evaluate, save, report; from where the progress stands."""
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from timm.utils import distribute_bn

from timm_faim.training.checkpoint import keep_best_epochs, save_weights
from timm_faim.training.data import count_unreadable
from timm_faim.training.errors import UserError
from timm_faim.training.loop import Training, check_weights, evaluate, train_one_epoch
from timm_faim.training.lr_scales import learning_rates
from timm_faim.training.reporting.plots import draw_learning_curve
from timm_faim.training.summary import append_summary, cut_summary, epoch_line, head_metrics, read_summary


def train_epochs(run: Training, val_loader: Any, image_loaders: Sequence[Any], epochs: int, log: Callable) -> bool:
    """Train up to the last epoch or --stop-epoch.

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
    args, progress = run.args, run.progress
    if run.accelerator.is_main_process:
        cut_summary(run.run_folder / "summary.csv", progress.epoch)
    last = epochs if args.stop_epoch is None else min(epochs, args.stop_epoch)
    try:
        while progress.epoch < last:
            trained = train_one_epoch(run)
            if trained is not None:
                finish_epoch(run, trained, val_loader, image_loaders, epochs, log)
            if run.is_stopping and progress.epoch < last:
                log(f"asked to stop: epoch {progress.epoch + 1}, batch {progress.step + 1} is saved in "
                    f"{run.run_folder}. Go on with --resume auto")
                return False
    except KeyboardInterrupt:
        log(f"\nstopped by Ctrl-C in epoch {progress.epoch + 1}; {progress.epoch} finished epochs are kept in "
            f"{run.run_folder}. Go on from the last checkpoint with --resume auto")
        sys.exit(130)
    return True


def finish_epoch(
        run: Training, trained: dict[str, Any], val_loader: Any, image_loaders: Sequence[Any], epochs: int,
        log: Callable,
) -> None:
    """Evaluate, save weights and checkpoint, write and print the row of an epoch whose batches are done."""
    args, accelerator, progress, epoch = run.args, run.accelerator, run.progress, run.progress.epoch
    if accelerator.num_processes > 1 and args.dist_bn:
        for module in (run.task.get_trainable_module(), run.task.get_trainable_module(ema=True)):
            if module is not None:
                distribute_bn(module, accelerator.num_processes, reduce=args.dist_bn == "reduce")
    is_evaluated = val_loader is not None and ((epoch + 1) % args.val_interval == 0 or epoch + 1 == epochs)
    validated = {}
    if is_evaluated:
        validated = evaluate(run.evaluated, val_loader, accelerator, args, run.task.create_evaluator)
    if run.refit is not None and epoch + 1 == epochs and _has_refitted(run, validated, log) and is_evaluated:
        validated = evaluate(run.evaluated, val_loader, accelerator, args, run.task.create_evaluator)
    if not math.isfinite(validated.get("loss", 0.0)):
        raise UserError(f"the validation loss is {validated['loss']} after epoch {epoch + 1}. Checkpoints of earlier "
                        f"epochs are kept in {run.run_folder}. Try a lower --lr or --clip-grad")
    unreadable = count_unreadable(image_loaders, accelerator) if args.skip_unreadable else 0

    if len({group["lr_scale"] for group in run.optimizer.param_groups}) > 1:
        trained.update({f"lr_{part}": rate for part, rate in learning_rates(run.optimizer).items()})
    trained.update(head_metrics(run.part))
    lr = sum(group["lr"] for group in run.optimizer.param_groups) / len(run.optimizer.param_groups)

    metric, decreasing = chosen_metric(args.eval_metric, trained, validated, val_loader is not None)
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)
    is_best = metric is not None and (
        progress.best is None or (metric < progress.best if decreasing else metric > progress.best))
    progress.best = metric if is_best else progress.best
    check_weights(run)
    state = run.whole_state()
    if accelerator.is_main_process:
        save_weights(state, run.run_folder, is_best or progress.best is None)
        if metric is not None:
            progress.kept = keep_best_epochs(
                run.run_folder, progress.kept, epoch, metric, decreasing, args.checkpoint_hist)
        append_summary(run.run_folder / "summary.csv", epoch, trained, validated, lr)
        rows = read_summary(run.run_folder / "summary.csv")
        drawn = draw_learning_curve(run.run_folder / "learning_curve.png", rows)
        log(epoch_line(epoch, epochs, trained, validated, is_best))
        if unreadable:
            log(f"           {unreadable} unreadable images left out so far")
        if epoch == 0 and not drawn:
            log("no learning_curve.png: matplotlib is not installed (pip install 'timm-faim[train]')")
        numbers = trained | {f"eval_{key}": value for key, value in validated.items()}
        accelerator.log(numbers, step=epoch)
    progress.end_epoch()
    if run.checkpointer is not None:
        run.checkpointer.save(progress)


def _has_refitted(run: Training, validated: dict[str, Any], log: Callable) -> bool:
    """Refit the heads and say what they reached before; False, with the reason, where they stay as trained."""
    try:
        run.refit(run)
    except UserError as error:  # the epoch is not lost for it
        log(f"heads stay as trained: {error}")
        return False
    metric = run.args.eval_metric
    log("heads refitted in closed form" + (f"; before: {metric} {validated[metric]:.2f}" if validated else ""))
    return True


def chosen_metric(
        name: str, trained: dict[str, Any], validated: dict[str, Any], has_validation: bool,
) -> tuple[float | None, bool]:
    """The metric that chooses the best epoch, None in an epoch without validation, and whether less is better.

    Raises:
        UserError: there is no such metric.
    """
    if not has_validation:
        return trained["loss"], True
    if not validated:
        return None, name == "loss"
    if name not in validated:
        raise UserError(f"no --eval-metric {name} here; there are {', '.join(sorted(validated))}")
    return validated[name], name == "loss"
