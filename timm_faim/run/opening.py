"""Any model with its weights, and what is known of it, from a run folder, the Hub or timm's own list."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models._hub import hf_split
from torch import nn

from timm_faim.documents import read_json
from timm_faim.run.errors import MODEL_ERRORS, UserError, did_you_mean
from timm_faim.run.record import record_of

_HUB, _LOCAL = "hf-hub:", "local-dir:"


@dataclass(frozen=True)
class Opened:
    """A model in eval mode on the CPU, the folder that it came from (None: from elsewhere), its class names in the
    order of the logits (None: it has none), and its record (`timm_faim.run.record`)."""

    model: nn.Module
    folder: Path | None
    label_names: list[str] | None
    record: dict[str, Any]


def open_model(checkpoint: str, flag: str = "--model", **options: Any) -> Opened:
    """A model with its weights.

    Args:
        checkpoint: a run folder, ``local-dir:`` or ``hf-hub:`` and a place, or a timm name.
        flag: what the command line calls it.
        **options: further arguments of `timm.create_model`.

    Raises:
        UserError: it cannot be opened.
    """
    name = f"{_LOCAL}{checkpoint}" if Path(checkpoint).is_dir() else checkpoint
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = did_you_mean(name.split(".")[0], timm.list_models())
        raise UserError(
            f"{flag} {checkpoint} is no folder and no timm model.{near} Name the run folder of a training, or "
            "hf-hub:ORG/NAME"
        )
    try:
        model = timm.create_model(name, pretrained=True, **options).eval()
        config = _config_of(name)
    except MODEL_ERRORS as e:
        raise UserError(
            f"cannot open {flag} {checkpoint}: {' '.join(str(e).split())}. Name the run folder of a training, "
            "hf-hub:ORG/NAME, or a timm model that has weights"
        ) from e
    folder = Path(name.removeprefix(_LOCAL)) if name.startswith(_LOCAL) else None
    return Opened(model, folder, _names(model, config), record_of(config))


def _config_of(name: str) -> dict[str, Any]:
    """config.json beside the weights; empty for a model of timm's list."""
    if name.startswith(_LOCAL):
        return read_json(Path(name.removeprefix(_LOCAL), "config.json"))
    if name.startswith(_HUB):
        repo, revision = hf_split(name.removeprefix(_HUB))
        return read_json(Path(hf_hub_download(repo, "config.json", revision=revision)))
    return {}


def _names(model: nn.Module, config: dict[str, Any]) -> list[str] | None:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or config.get("class_order")
    return [str(name) for name in names] if names else None


def choose_device(name: str | None) -> torch.device:
    """The device of --device; without a name a GPU where there is one.

    Raises:
        UserError: it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used: {str(e).splitlines()[0]}. Leave it out, or give cpu") from e
    return device
