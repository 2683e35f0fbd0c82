"""Optimiser and schedule, made by timm from the options, and the parts of a FAIM model with their own learning rates.

Σ and β, where a head learns its metric, have the learning rate itself.
"""

import argparse
import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from timm_faim import FAIMHead, FAIMMetric
from timm_faim.run.errors import UserError, did_you_mean

# timm's rule: optimisers with per-parameter step sizes scale their rate with the root of the batch.
ADAPTIVE = ("ada", "lamb")
PARTS = ("backbone", "mu", "sigma", "beta", "lambda", "gamma")


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
    factors = dict.fromkeys(PARTS, 1.0) | {
        "backbone": args.lr_scale_backbone,
        "mu": args.lr_scale_mu,
        "lambda": args.lr_scale_scalars,
        "gamma": args.lr_scale_scalars,
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


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module, processes: int) -> torch.optim.Optimizer:
    """timm's optimiser; without --lr the rate follows the global batch as in timm."""
    if args.lr is None:
        ratio = args.batch_size * args.grad_accum_steps * processes / args.lr_base_size
        rule = args.lr_base_scale or ("sqrt" if any(name in args.opt.lower() for name in ADAPTIVE) else "linear")
        args.lr = args.lr_base * (ratio**0.5 if rule == "sqrt" else ratio)
    try:
        return create_optimizer_v2(model, **{**optimizer_kwargs(args), **args.opt_kwargs})
    except (ValueError, TypeError, AssertionError, LookupError) as e:
        if args.opt not in list_optimizers() and isinstance(e, ValueError):
            raise UserError(f"unknown --opt {args.opt}.{did_you_mean(args.opt, list_optimizers())}") from e
        raise UserError(f"--opt {args.opt}: {' '.join(str(e).split())}") from e


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches: int) -> tuple[Any, int]:
    """timm's schedule (None for --sched none) and the number of epochs with warm-up and cool-down.

    `batches` is the number of training batches an epoch in this process.

    Raises:
        UserError: lengths that do not go together, for example a decay longer than the run.
    """
    if not args.epochs:
        return None, 0
    updates = -(-batches // args.grad_accum_steps)
    try:
        scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates)
        if scheduler is not None and args.sched != "plateau":
            _check_rates(scheduler, epochs, updates)
    except (ValueError, AssertionError, ArithmeticError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(
            f"--sched {args.sched}: {reason}. Check the options of the schedule (--lr-..., --decay-..., "
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
