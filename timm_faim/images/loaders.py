"""timm's loader of images as a model sees them, without augmentation."""

from typing import Any

import torch
from timm.data import create_loader
from torch.utils.data import Dataset


def clean_loader(images: Dataset, config: dict[str, Any], device: torch.device, batch_size: int, workers: int) -> Any:
    """Batches (images [B, channels, H, W] on the device, targets [B]) in the order of the data set.

    Args:
        images: as `CheckedImages`.
        config: preprocessing, of timm's ``resolve_data_config``.
        device: where the batches go.
        batch_size, workers: of timm's loader; no more workers start than there are batches.
    """
    return create_loader(
        images,
        config["input_size"],
        batch_size,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=min(workers, -(-len(images) // batch_size)),
        persistent_workers=False,
        pin_memory=device.type == "cuda",
        device=device,
    )
