"""The three-stage schedule of a FAIM model and separate learning rates of its parts.

| stage       | Σ             | β      | λ      | γ                    | μ, backbone | label smoothing |
|-------------|---------------|--------|--------|----------------------|-------------|-----------------|
| warm-up     | frozen        | frozen | frozen | learns, or as frozen | learn       | off             |
| tune-metric | rate rises    | learns | learns | learns               | learn       | off             |
| fine-tune   | learns        | learns | learns | learns               | learn       | on              |

A frozen part keeps `requires_grad`: its gradient is dropped before the optimiser's step. So DistributedDataParallel
finds no unused parameters, torch.compile does not recompile, and the optimiser's state survives the change of stage.
"""
import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from timm_faim import FAIMHead, FAIMMetric
from timm_faim.training.errors import UserError

PARTS = ("backbone", "mu", "sigma", "beta", "lambda", "gamma")
WARM_UP, TUNE_METRIC, FINE_TUNE = "warm-up", "tune-metric", "fine-tune"
_FROZEN_IN_WARM_UP = ("sigma", "beta", "lambda")


def parts_of(model: torch.nn.Module) -> dict[int, str]:
    """The part of each parameter of a model, by id; the classifier of a plain model counts as `mu`."""
    parts = {}
    for module in model.modules():
        if isinstance(module, FAIMMetric):
            sigma = module.L if module.full_sigma else module.log_sigma_diag
            named = {"sigma": sigma, "beta": module.beta, "lambda": module.lmbda}
        elif isinstance(module, FAIMHead):
            named = {"mu": module.mu, "gamma": module.scale}
            if module.whiten is not None:
                named["sigma"] = module.whiten
            if module.prior is not None:
                parts[id(module.prior)] = "gamma"
        else:
            continue
        parts.update((id(parameter), part) for part, parameter in named.items())
    if not parts and hasattr(model, "get_classifier"):
        classifiers = model.get_classifier()
        for classifier in classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]:
            if isinstance(classifier, torch.nn.Module):
                parts.update((id(parameter), "mu") for parameter in classifier.parameters())
    return parts


def split_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Split the optimiser's groups, in place, so that none holds two parts, and set the parts' learning rates.

    timm's schedules multiply by a group's `lr_scale`, which here is layer decay times the part's factor.
    """
    factors = dict.fromkeys(PARTS, args.lr_scale_scalars) | {
        "backbone": args.lr_scale_backbone, "mu": args.lr_scale_mu,
        "sigma": args.lr_scale_metric, "beta": args.lr_scale_metric,
    }
    if args.lr_scale_lambda is not None:
        factors["lambda"] = args.lr_scale_lambda
    parts = parts_of(model)
    groups = []
    for group in optimizer.param_groups:
        for part in PARTS:
            members = [p for p in group["params"] if parts.get(id(p), "backbone") == part]
            if members:
                scale = group.get("lr_scale", 1.0) * factors[part]
                groups.append(group | {"params": members, "part": part, "lr_scale": scale,
                                       "lr": group["lr"] * scale, "initial_lr": group["lr"]})
    optimizer.param_groups[:] = groups  # in place: wrapping optimisers (lookahead) share the list


@dataclass(frozen=True)
class StageSchedule:
    """What learns when, by the number of updates done.

    Args:
        warm_up_end: number of updates of the warm-up stage.
        tune_metric_end: number of updates of the first two stages.
        freeze_gamma: γ is frozen in the warm-up stage too.
    """

    warm_up_end: int
    tune_metric_end: int
    freeze_gamma: bool = False

    def stage(self, updates: int) -> str:
        """Name of the stage that the next update belongs to."""
        if updates < self.warm_up_end:
            return WARM_UP
        return TUNE_METRIC if updates < self.tune_metric_end else FINE_TUNE

    def factor(self, part: str, updates: int) -> float:
        """Factor on the part's learning rate; 0 is frozen."""
        stage = self.stage(updates)
        if stage == WARM_UP and (part in _FROZEN_IN_WARM_UP or part == "gamma" and self.freeze_gamma):
            return 0.0
        if stage == TUNE_METRIC and part == "sigma":
            return (updates - self.warm_up_end + 1) / (self.tune_metric_end - self.warm_up_end)
        return 1.0

    def smooths_labels(self, updates: int) -> bool:
        """Whether label smoothing is on."""
        return self.stage(updates) == FINE_TUNE

    @contextmanager
    def update(self, optimizer: torch.optim.Optimizer, updates: int) -> Iterator[None]:
        """Within the block, frozen parts have no gradients and the others their stage's learning rates."""
        rates = []
        for group in optimizer.param_groups:
            rates.append(group["lr"])
            factor = self.factor(group["part"], updates)
            group["lr"] *= factor
            for parameter in group["params"] if factor == 0 else ():
                parameter.grad = None
        yield
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def build_stages(args: argparse.Namespace, updates_per_epoch: int, epochs: int) -> StageSchedule | None:
    """The schedule of --stages, or None without it.

    Raises:
        UserError: stages longer than the run.
    """
    if not args.stages or not any(args.stages):
        return None
    # A number below 1 is a fraction of the run.
    lengths = [length * updates_per_epoch * (epochs if length < 1 else 1) for length in args.stages]
    updates = updates_per_epoch * epochs
    if sum(lengths) > updates * (1 + 1e-9):
        raise UserError(f"--stages {args.stages[0]:g} {args.stages[1]:g} are longer than the {epochs} epochs of the "
                        "run. Give shorter ones, or fractions of the run below 1")
    return StageSchedule(round(lengths[0]), min(round(sum(lengths)), updates), args.freeze_gamma)


def without_effect(args: argparse.Namespace, model: torch.nn.Module) -> list[str]:
    """Flags that move the metric, where no metric of the model learns, as in the default recipe."""
    metrics = [module for module in model.modules() if isinstance(module, FAIMMetric)]
    if not metrics or any(parameter.requires_grad for metric in metrics for parameter in metric.parameters()):
        return []
    moves = {"--stages": args.stages and any(args.stages), "--damp-epochs": args.damp_epochs,
             "--lr-scale-metric": args.lr_scale_metric != 1, "--lr-scale-lambda": args.lr_scale_lambda is not None}
    return [flag for flag, is_given in moves.items() if is_given]


def describe(schedule: StageSchedule, updates_per_epoch: int, epochs: int) -> list[str]:
    """One line a stage, for a person."""
    bounds = (0, schedule.warm_up_end, schedule.tune_metric_end, updates_per_epoch * epochs)
    learns = ("backbone and μ learn" if schedule.freeze_gamma else "backbone, μ and γ learn",
              "β and λ learn as well, the rate of Σ rises", "everything learns, label smoothing")
    return [
        f"{name}: epochs {begin / updates_per_epoch:.4g} to {end / updates_per_epoch:.4g}; {what}"
        for name, begin, end, what in zip((WARM_UP, TUNE_METRIC, FINE_TUNE), bounds, bounds[1:], learns, strict=False)
        if end > begin
    ]


def learning_rates(
        optimizer: torch.optim.Optimizer, schedule: StageSchedule | None, updates: int,
) -> dict[str, float]:
    """Mean learning rate at the next update of each part that has parameters; 0 while it is frozen."""
    rates: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        factor = schedule.factor(group["part"], updates) if schedule else 1.0
        rates.setdefault(group["part"], []).append(group["lr"] * factor)
    return {part: sum(values) / len(values) for part, values in rates.items()}


def sizes_of_parts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Number of parameters of each part that has any."""
    counts: dict[str, int] = {}
    for group in optimizer.param_groups:
        counts[group["part"]] = counts.get(group["part"], 0) + sum(p.numel() for p in group["params"])
    return counts
