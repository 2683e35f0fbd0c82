"""Weights and model description, in the form that `timm.create_model('local-dir:…', pretrained=True)` opens."""
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from timm_faim.training.files import atomic_write, link_as

LAST, BEST, TIMM_NAME = "last.safetensors", "model_best.safetensors", "model.safetensors"


def save_config(
        model: torch.nn.Module, path: Path, data_config: dict[str, Any], label_names: list[str] | None,
        pretrained: bool,
) -> None:
    """Write config.json: architecture, arguments, preprocessing and labels.

    Args:
        model: model made by `timm.create_model`.
        path: the file.
        data_config: preprocessing that the model was trained with.
        label_names: class names in the order of their indices.
        pretrained: whether training began from published weights, whose tag and licence then stay on record.
    """
    with atomic_write(path) as temporary:
        model_config = {"label_names": label_names} if label_names else {}
        save_config_for_hf(model, str(temporary), model_config=model_config, data_config=data_config)
        config = json.loads(temporary.read_text(encoding="utf-8"))
        # transformers' timm wrapper passes the number of classes itself and fails on a second one.
        config.get("model_args", {}).pop("num_classes", None)
        if not pretrained:
            for key in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
                config["pretrained_cfg"].pop(key, None)
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_weights(model: torch.nn.Module, folder: Path, is_best: bool) -> None:
    """Write last.safetensors and, when these are the best weights so far, model_best.safetensors.

    model.safetensors is a second name of the best weights: it is the one that timm opens in a folder with several.
    """
    # Clones: safetensors refuses tied and strided tensors.
    state = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    with atomic_write(folder / LAST) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    if is_best:
        link_as(folder / LAST, folder / BEST)
        link_as(folder / LAST, folder / TIMM_NAME)


def save_batch(path: Path, images: torch.Tensor, target: torch.Tensor) -> None:
    """Write a batch, for looking at what made a loss non-finite."""
    with atomic_write(path) as temporary:
        save_file({"input": images.detach().cpu().contiguous(), "target": target.detach().cpu().contiguous()},
                  temporary)
