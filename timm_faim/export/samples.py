"""Real images to check a file with and to calibrate int8 with.

Shapes: N images, c channels, H and W of the model's input.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform
from torch import Tensor

from timm_faim.data import omniglot242_root
from timm_faim.images.checked import UNREADABLE, CheckedImages, reader_of
from timm_faim.images.folders import put_in_order
from timm_faim.images.pixels import mode_of
from timm_faim.run.errors import UserError


@dataclass(frozen=True)
class Samples:
    """Images as the model sees them, before they are normalised: bytes [N, H, W, c], and the folder that each lies
    in."""

    pixels: Tensor
    folders: list[str]

    def spread(self, count: int) -> "Samples":
        """At most ``count`` of the images, in equal steps."""
        kept = _steps(len(self.pixels), count)
        return Samples(self.pixels[kept], [self.folders[i] for i in kept])


def bundled_drawings() -> Path:
    """Folder of the characters that ship with the package."""
    return omniglot242_root() / "val"


def read_samples(folder: Path, data_config: Mapping[str, Any], count: int, skip_unreadable: bool = False) -> Samples:
    """At most ``count`` images of a folder, searched to any depth, in equal steps through the list of their names.

    Args:
        folder: the place.
        data_config: the model's preprocessing.
        count: images.
        skip_unreadable: leave those out that cannot be read.

    Raises:
        UserError: no such folder, no images, or one that cannot be read.
    """
    channels = data_config["input_size"][0]
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder. Give a folder of images")
    try:
        dataset = create_dataset("", root=str(folder), search_split=False, input_img_mode=mode_of(channels))
    except (RuntimeError, OSError) as e:
        raise UserError(f"cannot open --images {folder}: {e}. Give a folder of images") from e
    images = CheckedImages(dataset, skip=skip_unreadable, is_training=False)
    reader = reader_of(images)
    put_in_order(reader, has_class_map=False)
    images.transform = create_transform(**data_config, is_training=False, use_prefetcher=True)
    names = {k: name for name, k in reader.class_to_idx.items()}
    pixels, folders = [], []
    for i in _steps(len(images), count):
        image, target = images[i]
        if target != UNREADABLE:
            pixels.append(torch.as_tensor(image).permute(1, 2, 0))
            folders.append(str(names[target]))
    if not pixels:
        raise UserError(f"none of the images of --images {folder} can be read. Check the files")
    return Samples(torch.stack(pixels), folders)


def _steps(length: int, count: int) -> list[int]:
    """At most ``count`` numbers below ``length`` in equal steps."""
    count = min(length, count)
    return [i * length // count for i in range(count)]
