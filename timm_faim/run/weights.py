"""Weights and model description, in the form that `timm.create_model('local-dir:…', pretrained=True)` opens."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from timm_faim.documents import read_json
from timm_faim.models.config import resolve_faim_cfg
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write, link_as
from timm_faim.run.record import KEY

CONFIG = "config.json"
LAST, BEST, TIMM_NAME = "last.safetensors", "model_best.safetensors", "model.safetensors"
TOP = "top"  # folder of the best epochs' weights


def save_config(
    model: torch.nn.Module,
    path: Path,
    data_config: dict[str, Any],
    label_names: list[str] | None,
    pretrained: bool,
    class_order: list[str] | None = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write config.json: architecture, arguments, preprocessing and labels.

    Args:
        model: model made by `timm.create_model`.
        path: the file.
        data_config: preprocessing that the model was trained with.
        label_names: class names in the order of their indices; None leaves those that the model's weights came with,
            where there is no ``class_order``.
        pretrained: whether training began from published weights, whose tag and licence then stay on record.
        class_order: class names of the data, for a model that has more classes and so no `label_names`.
        record: see `timm_faim.run.record`.
    """
    with atomic_write(path) as temporary:
        model_config = {"label_names": label_names} if label_names else {}
        save_config_for_hf(model, str(temporary), model_config=model_config, data_config=data_config)
        config = json.loads(temporary.read_text(encoding="utf-8"))
        if class_order and not label_names:
            config["class_order"] = class_order
        _move_names(config)
        if record:
            config[KEY] = record
        # transformers' timm wrapper passes the number of classes itself and fails on a second one.
        config.get("model_args", {}).pop("num_classes", None)
        if not pretrained:
            for key in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
                config["pretrained_cfg"].pop(key, None)
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _move_names(config: dict[str, Any]) -> None:
    """Class names and descriptions that a model was opened with are in its pretrained_cfg; a config has them beside."""
    brought = {key: config["pretrained_cfg"].pop(key, None) for key in ("label_names", "label_descriptions")}
    if brought["label_names"] and "label_names" not in config and "class_order" not in config:
        config["label_names"] = brought["label_names"]
    names = set(config.get("label_names") or ())
    if texts := {name: text for name, text in (brought["label_descriptions"] or {}).items() if name in names}:
        config["label_descriptions"] = texts


def save_weights(state: dict[str, torch.Tensor], folder: Path, is_best: bool) -> None:
    """Write last.safetensors and, when these are the best weights so far, model_best.safetensors.

    model.safetensors is a second name of the best weights: it is the one that timm opens in a folder with several.
    """
    with atomic_write(folder / LAST) as temporary:
        save_file(whole_tensors(state), temporary, metadata={"format": "pt"})
    if is_best:
        link_as(folder / LAST, folder / BEST)
        link_as(folder / LAST, folder / TIMM_NAME)


def keep_best_epochs(
    folder: Path, kept: list[dict[str, Any]], epoch: int, metric: float, decreasing: bool, count: int
) -> list[dict[str, Any]]:
    """Keep last.safetensors under the epoch's name if it is among the best `count`; remove what falls out.

    Args:
        folder: run folder.
        kept: the epochs kept so far, {"epoch", "metric"}.
        epoch: number of the epoch just saved, 0 for the start.
        metric: its validation metric.
        decreasing: whether less is better.
        count: how many to keep; 1 or less keeps none beside model_best.safetensors.

    Returns:
        The epochs kept now, the best first.
    """
    if count <= 1:
        return []
    ranked = sorted(
        [*(k for k in kept if k["epoch"] != epoch), {"epoch": epoch, "metric": metric}],
        key=lambda k: (k["metric"] if decreasing else -k["metric"], k["epoch"]),
    )
    kept, dropped = ranked[:count], ranked[count:]
    top = folder / TOP
    top.mkdir(exist_ok=True)
    if any(k["epoch"] == epoch for k in kept):
        link_as(folder / LAST, top / _epoch_name(epoch))
    for entry in dropped:
        (top / _epoch_name(entry["epoch"])).unlink(missing_ok=True)
    return kept


def saved_class_order(folder: Path) -> list[str] | None:
    """The class names of the data in a run folder's config.json; None where there are none."""
    config = saved_config(folder)
    names = config.get("label_names") or config.get("class_order")
    return names if isinstance(names, list) else None


def saved_faim_cfg(folder: Path) -> dict[str, Any] | None:
    """The head's options in a run folder's config.json, completed; None where there are none that can be read."""
    arguments = saved_config(folder).get("model_args")
    given = arguments.get("faim_cfg") if isinstance(arguments, dict) else None
    try:
        return None if given is None else resolve_faim_cfg(given)
    except (ValueError, TypeError):
        return None


def check_same_head(model: torch.nn.Module, folder: Path, asked: Collection[str]) -> None:
    """Refuse to go on with another head than the run was made with.

    Args:
        model: the model that is to go on.
        folder: of the run.
        asked: options that were asked for, whatever the run had.

    Raises:
        UserError: names the options that differ.
    """
    saved, now = saved_faim_cfg(folder), getattr(model, "faim_cfg", None)
    if saved is None or now is None:
        return
    differ = [key for key in now if key in saved and now[key] != saved[key] and key not in asked]
    if differ:
        options = " ".join(f"{key}={saved[key]!r}" for key in differ)
        raise UserError(
            f"the run in {folder} was made with a head of {options}, which is not what these options make "
            f"now. Go on with --resume {folder} alone, or give --faim-cfg {options}"
        )


def saved_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder; empty where there is none that can be read."""
    try:
        config = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def restore_best(folder: Path, kept: list[dict[str, Any]]) -> None:
    """Make the best of the kept epochs the best weights again, and remove those of epochs that are not kept.

    For a run that goes back to an earlier epoch. Without kept epochs nothing changes.
    """
    if not kept:
        return
    names = [_epoch_name(entry["epoch"]) for entry in kept]
    for path in (folder / TOP).glob("epoch_*.safetensors"):
        if path.name not in names:
            path.unlink()
    for name in (BEST, TIMM_NAME):
        link_as(folder / TOP / names[0], folder / name)


def _epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}.safetensors"


def whole_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that share nothing and are contiguous: safetensors refuses tied and strided tensors."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}


def hash_tensors(digest: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Feed names and bytes of tensors to a digest of hashlib."""
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def save_batch(path: Path, images: torch.Tensor, target: torch.Tensor) -> None:
    """Write a batch, for looking at what made a loss non-finite."""
    with atomic_write(path) as temporary:
        save_file(
            {"input": images.detach().cpu().contiguous(), "target": target.detach().cpu().contiguous()}, temporary
        )
