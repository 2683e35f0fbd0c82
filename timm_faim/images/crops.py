"""Ways to make the picture of an image that the network sees, and some images in several of them.

Shapes: N images, K crops, H × W the network's input.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from timm_faim.images.checked import CheckedImages, reader_of

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill 0..1 evenly
_SQUARE = 1.02  # ratio of the sides up to which squashing changes nothing to speak of


@dataclass(frozen=True)
class Crop:
    """timm's crop mode of images that are no square, and the share of the resized image that is kept."""

    mode: str
    pct: float

    def __str__(self) -> str:
        return self.mode if self.pct == 1 else f"{self.mode} {self.pct:g}"


def crops_of(config: dict[str, Any], modes_matter: bool, pct_given: bool) -> list[Crop]:
    """Crops to choose from, the model's own first; later ones are no cheaper.

    Args:
        config: preprocessing, of timm's ``resolve_data_config``.
        modes_matter: there are images of another shape than the network's input.
        pct_given: the share kept is that of the config and not to be chosen.
    """
    own, whole = Crop(config["crop_mode"], config["crop_pct"]), config["crop_pct"] if pct_given else 1.0
    modes = ("center", "squash", "border") if modes_matter else (own.mode,)
    return list(dict.fromkeys([own, *(Crop(mode, whole) for mode in modes)]))


def spread_sample(target_N: np.ndarray, most: int, least: int) -> np.ndarray:
    """Numbers of up to ``most`` images, rising: as many of each class as there are, else alike, spread over its images.

    Where the classes are too many for ``least`` images of each, some of the classes, spread over all.
    """
    classes = np.unique(target_N)
    if len(classes) * least > most:
        classes = classes[np.linspace(0, len(classes) - 1, max(2, most // least)).round().astype(int)]
    place_N, kept = np.empty(len(target_N)), []
    for k in classes:
        members = np.flatnonzero(target_N == k)
        place_N[members[np.argsort(np.arange(len(members)) * _GOLDEN % 1)]] = np.arange(len(members))
        kept.append(members)
    numbers = np.concatenate(kept)
    order = np.lexsort((target_N[numbers], place_N[numbers]))  # the first of each class, the second of each, ...
    return np.sort(numbers[order[:most]])


def have_shape(dataset: Dataset, chosen: np.ndarray, height: int, width: int) -> bool:
    """Whether the chosen images of an image folder all have about this shape; False of data that do not tell it without
    decoding the images."""
    reader = reader_of(dataset)
    if not isinstance(reader, ReaderImageFolder):
        return False
    for i in chosen:
        try:
            with Image.open(reader.samples[i][0]) as image:
                ratio = image.width * height / (image.height * width)
        except Exception:  # what cannot be read is told, or left out, where it is read
            continue
        if max(ratio, 1 / ratio) > _SQUARE:
            return False
    return True


class InCrops(Dataset):
    """Some images of a data set, each as float tensors [K, channels, H, W] of its crops.

    Args:
        dataset: not changed.
        chosen: numbers of the images.
        config: preprocessing, but for the crops.
        crops: K of them.
    """

    def __init__(self, dataset: Dataset, chosen: Sequence[int], config: dict[str, Any], crops: Sequence[Crop]) -> None:
        self.dataset = copy.copy(dataset)
        if isinstance(self.dataset, CheckedImages):
            self.dataset.images = copy.copy(self.dataset.images)
            self.dataset.is_training = False  # an unreadable image is left out
        self.dataset.transform = _as_it_is
        self.chosen = [int(i) for i in chosen]
        self.transforms = [
            create_transform(**config | {"crop_mode": crop.mode, "crop_pct": crop.pct}, is_training=False)
            for crop in crops
        ]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, target = self.dataset[self.chosen[index]]
        return torch.stack([transform(image) for transform in self.transforms]), target


def _as_it_is(image: Any) -> Any:
    return image
