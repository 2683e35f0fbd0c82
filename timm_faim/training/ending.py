"""What becomes of the weights after the last epoch: averaged with those of the start, heads refitted."""

from collections.abc import Callable
from typing import Any

from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_faim.report.predictions import evaluate
from timm_faim.run.errors import UserError
from timm_faim.training.freeze import classifier_parameters
from timm_faim.training.loop import Training
from timm_faim.training.start import averaged, floating, set_


def end_weights(run: Training, validated: dict[str, Any], val_loader: Any, log: Callable) -> dict[str, Any]:
    """Do to the weights what --wise-ft and --head-refit ask for; a collective call.

    Args:
        run: after its last epoch, which is not saved yet.
        validated: metrics of the weights as trained; none without validation images.
        val_loader: validation images, or None.
        log: print of the main process.

    Returns:
        Metrics of the weights that are kept.
    """
    shares = run.options.start.shares
    if not shares and run.refit is None:
        return validated
    model, before = unwrap_model(run.evaluated), _said(run, validated, "; before: ")
    end = floating(model) if shares else {}
    kept: tuple[float, dict[str, Any], dict[str, Tensor]] | None = None
    for share in shares or (1.0,):
        done = []
        if shares:
            set_(model, averaged(run.start.tensors, end, share, _as_trained(run, model)))
            done.append(f"weights averaged, {share:g} of the end and {1 - share:g} of the start")
        if run.refit is not None and _is_refitted(run, log):
            done.append("heads refitted in closed form")
        if done and val_loader is not None:
            validated = validate(run, val_loader)
        if done:
            log(", ".join(done) + (_said(run, validated, ": ") if len(shares) > 1 else before))
        if len(shares) < 2:
            return validated
        if kept is None or _is_better(run, validated, kept[1]):
            kept = share, validated, floating(model)
    share, validated, tensors = kept
    set_(model, tensors)
    log(f"kept: {share:g} of the end{_said(run, validated, ', ')}{before}")
    return validated


def validate(run: Training, val_loader: Any) -> dict[str, Any]:
    """Metrics of what is evaluated of a run."""
    return evaluate(run.evaluated, val_loader, run.accelerator, run.task.create_evaluator, **run.options.reading)


def chosen_metric(
    name: str, trained: dict[str, Any], validated: dict[str, Any], has_validation: bool
) -> tuple[float | None, bool]:
    """The metric that chooses the best epoch, None in an epoch without validation, and whether less is better.

    Raises:
        UserError: there is no such metric.
    """
    if not has_validation:
        return trained.get("loss"), True  # a start has no training loss either
    if not validated:
        return None, name == "loss"
    if name not in validated:
        raise UserError(f"no --eval-metric {name} here; there are {', '.join(sorted(validated))}")
    return validated[name], name == "loss"


def _is_better(run: Training, validated: dict[str, Any], other: dict[str, Any]) -> bool:
    (metric, decreasing), (than, _) = (
        chosen_metric(run.options.run.eval_metric, {}, each, True) for each in (validated, other)
    )
    return metric < than if decreasing else metric > than  # never with NaN


def _as_trained(run: Training, model: nn.Module) -> set[str]:
    """Names of a classifier that began at random: what lies between that and its end is no classifier."""
    return set() if run.starts_fitted else classifier_parameters(model)


def _is_refitted(run: Training, log: Callable) -> bool:
    """Refit the heads; False, with the reason, where they stay as they are."""
    try:
        run.refit(run)
    except UserError as error:  # the epoch is not lost for it
        log(f"heads stay as trained: {error}")
        return False
    return True


def _said(run: Training, validated: dict[str, Any], before: str) -> str:
    """The metric that chooses, after some words; nothing without one."""
    metric = run.options.run.eval_metric
    return f"{before}{metric} {validated[metric]:.2f}" if validated else ""
