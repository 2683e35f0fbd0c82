"""What `timm-faim fit` reads of the images, and how it makes the head of it: as asked, or chosen (--recipe auto).

Shapes: N images, C classes, D features.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from timm_faim import FAIMHead
from timm_faim.calibration import FOLDS, lookalike_folds
from timm_faim.fitting.extract import only_head
from timm_faim.fitting.store import Features
from timm_faim.models.config import PREFIX
from timm_faim.models.moments import NAME, part_names
from timm_faim.models.stages import offered_stages
from timm_faim.recipe import HeldOut, Plan, choose, has_recipe, sample
from timm_faim.run.options import AUTO
from timm_faim.training.model import build_model
from timm_faim.training.options import Options


def folds_of(args: argparse.Namespace) -> int:
    """In how many folds training images are held out."""
    return round(1 / args.val_fraction) if args.val_fraction else FOLDS


def may_choose(args: argparse.Namespace, head: FAIMHead) -> bool:
    """Whether the recipe is to be chosen, and the head one that it is for: with a full Σ on its sphere."""
    return args.recipe == AUTO and has_recipe(head)


def stages_to_offer(args: argparse.Namespace, options: Options, model: nn.Module) -> list[str]:
    """Stages whose second moments the head may read, the usual one first; none where the user or a saved model says
    which it reads."""
    given = "moments" in (options.head.faim_cfg or {}) or ":" in options.model.model
    if given or not may_choose(args, only_head(model)):
        return []
    arguments = {key: value for key, value in model._model_args.items() if key != "faim_cfg"}
    return offered_stages(model.pretrained_cfg["architecture"].removeprefix(PREFIX), arguments)


def with_stages(options: Options, stages: list[str], weight: float | None, num_classes: int) -> nn.Module:
    """The model that reads these stages, on the CPU; the options say so from now on."""
    moments = {"stages": stages} | ({} if weight is None else {"weight": weight})
    options.head.faim_cfg = {**(options.head.faim_cfg or {}), "moments": moments if stages else False}
    random_seed(options.run.seed, 0)  # what no fit sets is the same, whatever came before
    return build_model(options, num_classes).eval()


@dataclass(frozen=True)
class Recipe:
    """The plan of a fit, in words, and what held it to be the best."""

    plan: Plan
    names: list[str]
    held: HeldOut | None
    rows: Tensor | None  # of the training images that were looked at
    score: float | None

    def to_json(self) -> dict[str, object]:
        """What config.json keeps."""
        plan = self.plan.to_json()
        moments = [self.names[i] for i in plan.pop("parts")[1:]]
        score = None if self.score is None else round(100 * self.score, 2)
        return {"recipe": AUTO if self.held else "fixed", "moments": moments, **plan, "held_out_accuracy": score}

    def held_out(self, head: FAIMHead) -> tuple[Tensor, np.ndarray]:
        """Logits [M, C] of training images from heads that are fitted without their look-alikes, and their numbers."""
        cosines, numbers = self.held.cosines(self.plan)
        eps = head.metric.eps
        logits = -head.gamma().detach().float().cpu() * (2.0 + eps - 2.0 * cosines).clamp_min(eps).sqrt()
        return logits, self.rows[numbers].numpy()

    def folds(self, points: Tensor, target: np.ndarray, count: int) -> np.ndarray:
        """The fold [N] of each training image: those of the choice, or look-alikes by their points; -1: in none."""
        if self.held is None:
            return lookalike_folds(points, torch.from_numpy(target), count).numpy()
        fold = np.full(len(target), -1)
        fold[self.rows.numpy()] = self.held.kinds[0].cpu().numpy()
        return fold


def make_recipe(
    args: argparse.Namespace, model: nn.Module, train: Features, weight: float | None, offered: bool, log: Callable
) -> Recipe:
    """The plan: that of the options, or chosen by held-out training images.

    Args:
        args: of `timm-faim fit`.
        model: reads everything that is offered.
        train: features of the training images.
        weight: of the moments, as the user says; None leaves it open.
        offered: whether the model may come to read less than now.
        log: print.
    """
    head, names = only_head(model), part_names(model)
    every = tuple(range(len(head.parts)))
    if not may_choose(args, head):
        moments = model.faim_cfg["moments"] or {}
        plan = Plan(every, moments.get("weight", 1.0), args.shrinkage, args.share or 0.0)
        return Recipe(plan, names, None, None, None)
    rows = sample(torch.from_numpy(train.target))
    x = torch.cat([block for block, _ in train.blocks(rows.numpy())]).to(head.mu.device)
    target = torch.from_numpy(train.target)[rows].to(head.mu.device)
    held = HeldOut.of_head(head, x, target, folds_of(args))
    parts = None if offered else [every]
    chosen = choose(held, parts, shrinkage=args.shrinkage, share=args.share, weight=weight)
    for line in chosen.lines(names):
        log(line)
    return Recipe(chosen.plan, names, held, rows, chosen.score)


def reads_chosen(options: Options, model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model whose head reads what the recipe says, on the device of the one that reads all, with its moments."""
    head, parts = only_head(model), recipe.plan.parts
    if len(head.parts) == len(parts):
        if len(parts) > 1:
            head.part_weights.data.copy_(torch.tensor(recipe.plan.part_weights))
            model.faim_cfg["moments"] = model.faim_cfg["moments"] | {"weight": recipe.plan.weight}
        return model
    stages = [recipe.names[i] for i in parts[1:]]
    made = with_stages(options, stages, recipe.plan.weight, head.num_classes).to(head.mu.device)
    for to, i in enumerate(parts[1:]):
        made.get_submodule(f"{NAME}.{to}").load_state_dict(model.get_submodule(f"{NAME}.{i - 1}").state_dict())
    return made
