"""Images through the backbone, once, into a store of features.

Shapes: B images, C classes, D features.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from timm.task import evaluation_sample_limit
from torch import nn
from tqdm import tqdm

from timm_faim import FAIMHead, faim_heads
from timm_faim.fitting.store import Writer, finish_store, fitted_before_heads, is_whole, stored_state
from timm_faim.head.fit import fit_moments_
from timm_faim.head.tap import layer_inputs, pooled
from timm_faim.images.checked import UNREADABLE
from timm_faim.run.errors import UserError
from timm_faim.run.gather import raise_together

_ALIKE = 1e-3  # of the spread of the logits


def only_head(model: nn.Module) -> FAIMHead:
    """The one FAIM head of a model.

    Raises:
        UserError: it has none, or several.
    """
    heads = faim_heads(model)
    if len(heads) != 1:
        raise UserError(
            f"the model has {len(heads) or 'no'} FAIM head{'s' if len(heads) > 1 else ''}, and a fit makes one. "
            + ("Start in closed form with timm-faim train --head-init data --epochs 0" if heads else
               "Give a model under its faim_ name")
        )  # fmt: skip
    return next(iter(heads.values()))


def extract(model: nn.Module, loaders: Mapping[str, Any], folder: Path, accelerator: Accelerator) -> bool:
    """See to it that a store holds what the head of the model gets of all images; a collective call.

    Second moments that nothing has fitted yet are, from the first training images; those of the store come back into
    the model. Without a split "train" they have been.

    Args:
        model: on its device; its one FAIM head is left as it is.
        loaders: by split, timm's, without augmentation and shared out over the processes.
        folder: of the store.
        accelerator: processes, and the precision of the backbone.

    Returns:
        Whether the backbone had to run.

    Raises:
        UserError: features that are not finite, images that cannot be read, a model whose logits are not its head's.
    """
    whole = broadcast_object_list([is_whole(folder, loaders) if accelerator.is_main_process else None])[0]
    if not whole:
        _write(model, loaders, folder, accelerator)
    model.load_state_dict(stored_state(folder), strict=False)
    return not whole


def _write(model: nn.Module, loaders: Mapping[str, Any], folder: Path, accelerator: Accelerator) -> None:
    made = None
    if accelerator.is_main_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    temporary = Path(broadcast_object_list([made])[0])
    try:
        try:
            fit_moments_(model, loaders.get("train", ()), lambda images: model(images.to(accelerator.device)))
        except ValueError as e:
            raise UserError(f"the second moments cannot be fitted: {e}") from e
        splits = {split: _write_split(model, loader, temporary, split, accelerator)
                  for split, loader in loaders.items()}  # fmt: skip
        if accelerator.is_main_process:
            finish_store(temporary, folder, splits, fitted_before_heads(model))
        accelerator.wait_for_everyone()
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_split(model: nn.Module, loader: Any, folder: Path, split: str, accelerator: Accelerator) -> dict[str, Any]:
    """Write this process's share of a split; what the store says of the whole."""
    writer, problem = Writer(folder, split, accelerator.process_index), None
    try:
        _write_share(model, loader, writer, accelerator, split)
    except UserError as e:
        problem = str(e)
    writer.close()
    raise_together(problem)
    return {"counts": gather_object([writer.count]), "width": max(gather_object([writer.width]))}


def _write_share(model: nn.Module, loader: Any, writer: Writer, accelerator: Accelerator, split: str) -> None:
    head, limit, seen = only_head(model), evaluation_sample_limit(loader), 0
    logits: list[torch.Tensor] = []

    def forward(images: torch.Tensor) -> None:
        with accelerator.autocast():
            logits[:] = [model(images)]

    bar = tqdm(loader, desc=f"{split} features", unit="batch", leave=False,
               disable=None if accelerator.is_main_process else True)  # fmt: skip
    for inputs, target in layer_inputs(model, {"head": head}, bar, forward):
        x = pooled(inputs["head"], head.in_features).float() if inputs else None
        if seen == 0:
            _check_head_is_all(head, x, logits[0])
        count = len(target) if limit is None else max(0, min(len(target), limit - seen))
        readable = (target != UNREADABLE) & (torch.arange(len(target), device=target.device) < count)
        if not torch.isfinite(x[readable]).all():
            raise UserError("features contain NaN or inf; check the backbone's weights and the input normalisation")
        place = seen + torch.arange(len(target), device=target.device)
        writer.add(x[readable], place[readable], target[readable])
        seen += len(target)


@torch.no_grad()
def _check_head_is_all(head: FAIMHead, x: torch.Tensor | None, logits: Any) -> None:
    own = None if x is None else head(x)
    same = isinstance(logits, torch.Tensor) and own is not None and own.shape == logits.shape
    if not same or not (own - logits).abs().max() <= _ALIKE * (logits.amax() - logits.amin()).clamp_min(1e-6):
        raise UserError(
            "the model's logits are not those of its head for one vector an image, so that features alone do not do. "
            "Start in closed form with timm-faim train --head-init data --epochs 0"
        )
