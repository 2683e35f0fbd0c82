"""Image folders as uint8 tensors on the device, augmented there by one affine resampling.

Shapes: N images, B of them in a batch, S stored and R network resolution.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from features import hash_folder, list_images
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Images:
    """uint8 images [N, 3, S, S] and class indices [N] of both splits."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    data_hash: str


def load_images(folder: Path, size: int, cache: Path, centre: bool = False) -> Images:
    """Read ``folder/{train,val}/<class>/*``, each image squashed to a square or its ``centre`` cut out, or take it from
    the cache."""
    data_hash = hash_folder(folder)
    file = cache / f"{data_hash[:16]}-{size}-{'centre' if centre else 'whole'}.pt"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        splits = []
        with ProcessPoolExecutor() as pool:
            for split in ("train", "val"):
                paths, labels = list_images(folder / split)
                pixels = list(pool.map(_read, paths, [size] * len(paths), [centre] * len(paths), chunksize=32))
                splits.append((torch.from_numpy(np.stack(pixels)), torch.tensor(labels)))
        torch.save(splits, file)
    train, val = torch.load(file, mmap=True)
    return Images(train, val, data_hash)


def _read(path: Path, size: int, centre: bool) -> np.ndarray:
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side) if centre else None
    image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).transpose(2, 0, 1).copy()


def draw_augmentation(n: int, kind: str, generator: torch.Generator) -> Tensor:
    """Parameters [n, 8] of :func:`augment`: an affine map, brightness and contrast.

    ``photo``: a crop of 0.35 to 1 of the area (ratio 3/4 to 4/3), mirrored half of the time, light ± 30 %.
    ``drawing``: rotation ± 12°, shear ± 8°, scale ± 15 %, shift ± 8 %, never mirrored.
    """
    u = torch.rand(n, 7, generator=generator)
    signed = 2.0 * u - 1.0
    zero = torch.zeros(n)
    if kind == "photo":
        area, ratio = 0.35 + 0.65 * u[:, 0], torch.exp(signed[:, 1] * math.log(4 / 3))
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        x, y = signed[:, 2] * (1 - width), signed[:, 3] * (1 - height)
        mirror = torch.where(u[:, 6] < 0.5, -1.0, 1.0)
        light, contrast = 1 + 0.3 * signed[:, 4], 1 + 0.3 * signed[:, 5]
        return torch.stack([width * mirror, zero, x, zero, height, y, light, contrast], 1)
    angle, shear, scale = signed[:, 0] * math.radians(12), signed[:, 1] * math.radians(8), 1 + 0.15 * signed[:, 2]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    return torch.stack([cos, sin + shear, 0.16 * signed[:, 3], -sin, cos, 0.16 * signed[:, 4], zero + 1, zero + 1], 1)


def augment(images: Tensor, parameters: Tensor, resolution: int) -> Tensor:
    """uint8 images [B, 3, S, S] to network inputs [B, 3, R, R] in [-1, 1]."""
    x = images.float() / 127.5 - 1.0
    grid = F.affine_grid(parameters[:, :6].view(-1, 2, 3), [len(x), 3, resolution, resolution], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    mean = x.mean((2, 3), keepdim=True)
    x = (x - mean) * parameters[:, 7, None, None, None] + mean
    return ((x + 1.0) * parameters[:, 6, None, None, None] - 1.0).contiguous(memory_format=torch.channels_last)


def resized(images: Tensor, resolution: int) -> Tensor:
    """Whole uint8 images [B, 3, S, S] as network inputs [B, 3, R, R] in [-1, 1]."""
    x = images.float() / 127.5 - 1.0
    if x.shape[-1] != resolution:
        x = F.interpolate(x, (resolution, resolution), mode="bilinear", antialias=True)
    return x.contiguous(memory_format=torch.channels_last)


def cut(labels: Tensor, shots: int, generator: torch.Generator) -> Tensor:
    """Indices of ``shots`` random images of each class (0: all), in random order within a class."""
    kept = []
    for label in range(int(labels.max()) + 1):
        own = (labels == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        kept.append(own[:shots] if shots else own)
    return torch.cat(kept)


def hold_out(kept: Tensor, labels: Tensor, fraction: float = 0.25) -> tuple[Tensor, Tensor]:
    """Split the indices of a cut into training and selection, at least one image of each class in both."""
    train, selection = [], []
    for label in range(int(labels.max()) + 1):
        own = kept[labels[kept] == label]
        held = max(1, round(fraction * len(own)))
        selection.append(own[:held])
        train.append(own[held:])
    return torch.cat(train), torch.cat(selection)
