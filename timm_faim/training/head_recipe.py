"""How heads are fitted in closed form, at the start and in the refit: as given, or chosen once before the training."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_faim import FAIMHead, faim_heads
from timm_faim.head.fit import fit_moments_
from timm_faim.head.tap import layer_inputs, pooled
from timm_faim.models.moments import part_names
from timm_faim.recipe import MOST, HeldOut, choose, has_recipe, sample
from timm_faim.run.errors import UserError
from timm_faim.run.options import AUTO, above, option, real


@dataclass
class HeadRecipeOptions:
    """Heads in closed form."""

    head_recipe: str = option(
        "auto: the share of the fits by held-out training images, before the training",
        "fixed",
        choices=("fixed", AUTO),
        marks="faim training",
    )
    head_shrinkage: float | None = option(
        "of the covariance within classes (default: 0.3)", None, above(0, 1), "A", marks="faim training"
    )
    head_share: float | None = option(
        "strength at which prototypes of few images are shared with look-alikes (default: 0)",
        None,
        real(0, 100),
        "V",
        marks="faim training",
    )

    @property
    def arguments(self) -> dict[str, float]:
        """Of :func:`timm_faim.fit_`, where they are not its defaults."""
        given = {"shrinkage": self.head_shrinkage, "share": self.head_share}
        return {name: value for name, value in given.items() if value is not None}


def choose_head_recipe(
    options: HeadRecipeOptions,
    model: torch.nn.Module,
    open_clean: Callable[[], Any],
    accelerator: Accelerator,
    log: Callable,
) -> dict[str, Any]:
    """Choose the share where that is asked for, put it into the options and say so; a collective call.

    Args:
        options: what is given by the user stands.
        model: on its device, with the backbone that the training starts from; second moments that nothing has fitted
            yet are.
        open_clean: makes a loader of all training images once, unaugmented, in every process.
        accelerator: processes.
        log: print of the main process.

    Returns:
        The chosen options by name; none where nothing was asked for.

    Raises:
        UserError: a model of several heads, or with one that is not on its indicatrix with a full Σ.
    """
    if options.head_recipe != AUTO:
        return {}
    heads = faim_heads(model)
    head = next(iter(heads.values()), None)
    if len(heads) != 1 or not has_recipe(head):
        raise UserError("--head-recipe auto is for models with one head in the space \"indicatrix\" with a full Σ and "
                        "without 1-form. Give --head-shrinkage and --head-share")  # fmt: skip

    def forward(images: torch.Tensor) -> None:
        model(images.to(accelerator.device))

    clean = open_clean()
    try:
        fit_moments_(model, clean, forward)
        x, y = _features(model, head, clean, forward)
    except ValueError as e:
        raise UserError(f"--head-recipe auto: {e}") from e
    held = HeldOut.of_head(head, x, y)
    weight = 1.0 - head.part_weights[0].item() if head.part_weights is not None else None
    chosen = choose(
        held, [tuple(range(len(head.parts)))], weight=weight, shrinkage=options.head_shrinkage, share=options.head_share
    )
    for line in chosen.lines(part_names(model)):
        log(line)
    plan = broadcast_object_list([chosen.plan])[0]  # of float sums, which need not be equal to the last bit
    taken = {"head_recipe": "fixed", "head_share": plan.share}
    vars(options).update(taken)
    return taken


def _features(
    model: torch.nn.Module, head: FAIMHead, clean: Any, forward: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, D] and classes [N] of at most 10,000 images, all classes in turn."""
    rows, targets = [], []
    was_training = model.training
    for inputs, target in layer_inputs(model.eval(), {"head": head}, clean, forward):
        rows.append(pooled(inputs["head"], head.in_features).float())
        targets.append(target.to(rows[-1].device))
        if sum(map(len, targets)) > 2 * MOST:
            rows, targets = _thinned(rows, targets)
    model.train(was_training)
    (x,), (y,) = _thinned(rows, targets)
    if not torch.isfinite(x).all():
        raise ValueError("features contain NaN or inf; check the backbone's weights and the input normalisation")
    return x, y


def _thinned(rows: list[torch.Tensor], targets: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    y = torch.cat(targets)
    kept = sample(y)
    return [torch.cat(rows)[kept]], [y[kept]]
