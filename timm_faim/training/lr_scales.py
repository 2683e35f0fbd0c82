"""The parts of a FAIM model, each with a factor on its learning rate.

Σ and β, where a head learns its metric, have the learning rate itself.
"""
import argparse

import torch

from timm_faim import FAIMHead, FAIMMetric

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
        "backbone": args.lr_scale_backbone, "mu": args.lr_scale_mu,
        "lambda": args.lr_scale_scalars, "gamma": args.lr_scale_scalars,
    }
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
