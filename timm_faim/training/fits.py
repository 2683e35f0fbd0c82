"""Heads in closed form: before the first epoch (--head-init data), and from the trained features (--head-refit)."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel

from timm_faim import faim_heads, fit_
from timm_faim.moments import Moments
from timm_faim.run.errors import UserError
from timm_faim.run.gather import raise_together
from timm_faim.training.head_recipe import HeadRecipeOptions
from timm_faim.training.loop import Training
from timm_faim.training.options import Options


def starts_from_data(options: Options, model: torch.nn.Module) -> bool:
    """Whether the heads start in closed form: as --head-init data says, and always where they read second moments,
    whose projection comes from maps.

    Raises:
        UserError: moments to fit, with the heads, from images of several labels.
    """
    reads_new_moments = any(isinstance(m, Moments) and not m.is_fitted for m in model.modules())
    if reads_new_moments and options.data.multi_label:
        raise UserError("--faim-cfg moments does not go with --multi-label: the head starts from classes of one label")
    return bool(faim_heads(model)) and (options.head.head_init == "data" or reads_new_moments)


def fit_heads_to(
    model: torch.nn.Module, batches: Any, accelerator: Accelerator, recipe: HeadRecipeOptions, flag: str
) -> None:
    """Heads in closed form from the training images, as `flag` asks.

    Raises:
        UserError: what the fit says of the features (NaN, all equal).
    """
    try:
        fit_(model, batches, device=accelerator.device, **recipe.arguments)
    except ValueError as e:
        raise UserError(f"{flag}: {e}") from e


def build_refit(
    clean: Any, views: int, epochs: int, recipe: HeadRecipeOptions | None = None
) -> Callable[[Training], None]:
    """What refits the heads of a run.

    Args:
        clean: loader of all training images once, unaugmented, in every process.
        views: augmented views of each image beside that.
        epochs: of the run; the views are drawn as those of the epochs that would follow.
        recipe: shrinkage and share (default: those of `fit_`).

    Its `UserError` is raised on all processes alike, and leaves the heads as they are.
    """

    def refit(run: Training) -> None:
        fit_heads_to(
            extract_model_from_parallel(run.evaluated),
            batches(run),
            run.accelerator,
            recipe or HeadRecipeOptions(),
            "--head-refit",
        )

    def batches(run: Training) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        problem = None
        try:
            # every process reads all of the clean images and its share of a view: weigh the two alike
            for number, batch in enumerate(clean):
                if number % run.accelerator.num_processes == run.accelerator.process_index:
                    yield batch
            for view in range(views):
                yield from run.order.batches(epochs + view)
        except UserError as error:  # an image that this process alone could not read; the others wait at the end
            problem = f"{error} (process {run.accelerator.process_index})"
        raise_together(problem)

    return refit
