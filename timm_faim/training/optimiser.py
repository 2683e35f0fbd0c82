"""Optimiser and schedule, made by timm from the options, and the parts of a FAIM model with their own learning rates.

Σ and β, where a head learns its metric, have the learning rate itself.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

from timm_faim import FAIMHead, FAIMMetric
from timm_faim.run.common import RunOptions
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import MANY, SHARE, above, flag, option, real, whole
from timm_faim.training.freeze import LearningOptions

# timm's rule: optimisers with per-parameter step sizes scale their rate with the root of the batch.
ADAPTIVE = ("ada", "lamb")
PARTS = ("backbone", "mu", "sigma", "beta", "lambda", "gamma")


@dataclass
class OptimiserOptions:
    """Optimiser."""

    opt: str = option("optimiser", "sgd", marks="usual")
    opt_eps: float | None = option("optimiser epsilon", None, SHARE, "EPS")
    opt_betas: list[float] | None = option("optimiser betas", None, SHARE, "B", nargs="+")
    opt_kwargs: dict[str, Any] = option(
        "further arguments of timm's create_optimizer_v2", {}, metavar="KEY=VALUE", nargs="*", action=ParseKwargs
    )
    momentum: float = option("optimiser momentum", 0.9, SHARE)
    weight_decay: float = option("weight decay", 2e-5, real(0, 1000), marks="usual")
    clip_grad: float | None = option("gradient clipping", None, above(0, 1e9), "NORM")
    clip_mode: str = option("gradient clipping mode", "norm", choices=("norm", "value", "agc"))
    layer_decay: float | None = option("layer-wise learning-rate decay", None, above(0, 1), "F")
    layer_decay_min_scale: float = option("smallest factor of layer decay", 0.0, SHARE, "F")
    layer_decay_no_opt_scale: float | None = option("do not train layers whose factor is below F", None, SHARE, "F")
    grad_accum_steps: int = option("batches per update", 1, whole(1), "N")


@dataclass
class ScheduleOptions:
    """Learning rate and schedule."""

    lr: float | None = option("learning rate; overrides --lr-base", None, real(0, 1000), marks="usual")
    lr_base: float = option("learning rate for a global batch of --lr-base-size", 0.1, real(0, 1000))
    lr_base_size: int = option("global batch size of --lr-base", 256, whole(1, 10**9), "N")
    lr_base_scale: str = option(
        "how the rate follows the batch (empty: sqrt for Adam's family and LAMB, else linear)",
        "",
        choices=("", "linear", "sqrt"),
    )
    sched: str = option(
        "schedule",
        "cosine",
        choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"),
    )
    sched_on_updates: bool = flag("step the schedule after every update")
    epochs: int = option("epochs; 0 with --head-init data: fit, evaluate and save only", 300, whole(0), marks="usual")
    min_lr: float = option("lowest learning rate", 0.0, real(0, 1000))
    warmup_lr: float = option("learning rate at the start of the warm-up", 1e-5, real(0, 1000))
    warmup_epochs: int | None = option(
        "epochs of warm-up (default: 5, half of a shorter run)", None, whole(0), "N", marks="usual"
    )
    warmup_prefix: bool = flag("do not count the warm-up in --epochs")
    cooldown_epochs: int = option("epochs at the lowest rate after the schedule", 0, whole(0))
    decay_epochs: float = option("interval of step decay, length of the decay of wsd and rsqrt", 90, real(0.001, MANY))
    decay_milestones: list[int] = option("epochs of multistep decay", [90, 180, 270], whole(0), nargs="+")
    decay_rate: float = option("decay rate", 0.1, above(0, 100), alias="--dr")
    patience_epochs: int = option("patience of plateau", 10, whole(0))
    lr_noise: list[float] | None = option(
        "noise on the rate from, or between, shares of the run", None, SHARE, "F", nargs="*"
    )
    lr_noise_pct: float = option("limit of the noise", 0.67, real(0.01, 1), "F")
    lr_noise_std: float = option("standard deviation of the noise", 1.0, real(0, 100), "S")
    lr_cycle_mul: float = option("factor on the length of each next cycle", 1.0, real(0.01, 100), "F")
    lr_cycle_decay: float = option("factor on the rate of each next cycle", 0.5, SHARE, "F")
    lr_cycle_limit: int = option("number of cycles", 1, whole(1), "N")
    lr_k_decay: float = option("k-decay of cosine and poly", 1.0, above(0, 100), "K")
    lr_decay_fn: str | None = option("decay of wsd and rsqrt", choices=("linear", "1-sqrt", "cosine", "power", "exp"))
    lr_stable_timescale: float | None = option(
        "timescale of rsqrt in epochs (default: the warm-up)", None, real(0.001, MANY), "N"
    )


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


def split_groups(optimizer: torch.optim.Optimizer, model: torch.nn.Module, options: LearningOptions) -> None:
    """Split the optimiser's groups, in place, so that none holds two parts, and set the parts' learning rates.

    timm's schedules multiply by a group's `lr_scale`, which here is layer decay times the part's factor.
    """
    factors = dict.fromkeys(PARTS, 1.0) | {
        "backbone": options.lr_scale_backbone,
        "mu": options.lr_scale_mu,
        "lambda": options.lr_scale_scalars,
        "gamma": options.lr_scale_scalars,
    }
    parts = parts_of(model)
    groups = []
    for group in optimizer.param_groups:
        for part in PARTS:
            members = [p for p in group["params"] if parts.get(id(p), "backbone") == part]
            if members:
                scale = group.get("lr_scale", 1.0) * factors[part]
                groups.append(
                    group
                    | {
                        "params": members,
                        "part": part,
                        "lr_scale": scale,
                        "lr": group["lr"] * scale,
                        "initial_lr": group["lr"],
                    }
                )
    optimizer.param_groups[:] = groups  # in place: wrapping optimisers (lookahead) share the list


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Mean learning rate of each part that has parameters."""
    rates: dict[str, list[float]] = {}
    for group in optimizer.param_groups:
        rates.setdefault(group["part"], []).append(group["lr"])
    return {part: sum(values) / len(values) for part, values in rates.items()}


def sizes_of_parts(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Number of parameters of each part that has any."""
    counts: dict[str, int] = {}
    for group in optimizer.param_groups:
        counts[group["part"]] = counts.get(group["part"], 0) + sum(p.numel() for p in group["params"])
    return counts


def learning_rate(options: ScheduleOptions, opt: str, images: int) -> float:
    """The learning rate; without --lr it follows the number of images an update as in timm."""
    if options.lr is not None:
        return options.lr
    ratio = images / options.lr_base_size
    rule = options.lr_base_scale or ("sqrt" if any(name in opt.lower() for name in ADAPTIVE) else "linear")
    return options.lr_base * (ratio**0.5 if rule == "sqrt" else ratio)


def build_optimizer(options: OptimiserOptions, lr: float, model: torch.nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser."""
    try:
        cfg = SimpleNamespace(**vars(options), lr=lr)
        return create_optimizer_v2(model, **{**optimizer_kwargs(cfg), **options.opt_kwargs})
    except (ValueError, TypeError, AssertionError, LookupError) as e:
        if options.opt not in list_optimizers() and isinstance(e, ValueError):
            raise UserError(f"unknown --opt {options.opt}.{did_you_mean(options.opt, list_optimizers())}") from e
        raise UserError(f"--opt {options.opt}: {' '.join(str(e).split())}") from e


def build_scheduler(
    options: ScheduleOptions, run: RunOptions, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[Any, int]:
    """timm's schedule (None for --sched none) and the number of epochs with warm-up and cool-down.

    Args:
        options: --sched and its options.
        run: the metric that plateau follows, and the seed of noise.
        optimizer: whose rates the schedule sets.
        updates: of an epoch.

    Raises:
        UserError: lengths that do not go together, for example a decay longer than the run.
    """
    if not options.epochs:
        return None, 0
    cfg = SimpleNamespace(**vars(options), seed=run.seed, eval_metric=run.eval_metric)
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(cfg), updates_per_epoch=updates)
        if scheduler is not None and options.sched != "plateau":
            _check_rates(scheduler, epochs, updates)
    except (ValueError, AssertionError, ArithmeticError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"--sched {options.sched}: {reason}. Check the options of the schedule (--lr-..., --decay-..., "
            "--cooldown-epochs)"
        ) from e
    return scheduler, epochs


def _check_rates(scheduler: Any, epochs: int, updates: int) -> None:
    """Ask a schedule for the rates of every epoch, as a run will.

    Raises:
        ValueError, ArithmeticError: it has none there, or one that is no rate.
    """
    for epoch in range(epochs + 1):
        rates = scheduler._get_values(epoch * (1 if scheduler.t_in_epochs else updates), on_epoch=True) or []
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            raise ValueError(f"the learning rate of epoch {epoch + 1} would be {rates[0]:g}")
