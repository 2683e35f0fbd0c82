"""Images of a timm evaluation loader by index, as model input and as a picture, and the features that heads get.

Shapes: N images, D features.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.data.loader import fast_collate
from torch import nn
from torch.utils.data import DataLoader, Subset

from timm_faim import faim_heads
from timm_faim.head.tap import layer_inputs, pooled

BATCH = 64


class Pictures:
    """The images behind a timm evaluation loader (with its prefetcher), in any order.

    timm's prefetcher takes bytes [channels, H, W] from the data set and normalises them on the device: the bytes are
    the picture, cropped as the model sees it, and the same step makes the model's input of them.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.dataset = loader.dataset

    @classmethod
    def of(cls, loader: Any) -> "Pictures | None":
        """The pictures of a loader; None without one, and for data that cannot be read by index."""
        usable = hasattr(getattr(loader, "dataset", None), "__getitem__") and hasattr(loader, "mean")
        iterable = isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset)
        return cls(loader) if usable and not iterable and len(loader.dataset) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        """Image [H, W] (grey) or [H, W, 3] of bytes, for drawing."""
        image = np.asarray(self.dataset[int(index)][0])
        return image[0] if len(image) < 3 else image[:3].transpose(1, 2, 0)

    def targets(self) -> np.ndarray | None:
        """Classes of all images [N] without reading the images; None where the data set does not list them."""
        images = getattr(self.dataset, "images", self.dataset)
        reader = getattr(images, "reader", images)
        listed = getattr(reader, "targets", None)
        if listed is None and (samples := getattr(reader, "samples", None)):
            listed = [sample[1] for sample in samples]
        try:
            targets = np.asarray(listed, dtype=np.int64)
        except (TypeError, ValueError):
            return None
        return targets if targets.shape == (len(self),) else None

    def batches(self, indices: Sequence[int]):
        """Yield (model input [B, channels, H, W] on the loader's device, classes [B]) for the images, in that order."""
        inner = getattr(self.loader, "loader", None)
        workers = min(getattr(inner, "num_workers", 0), -(-len(indices) // BATCH))
        subset = Subset(self.dataset, [int(i) for i in indices])
        for images, target in DataLoader(subset, BATCH, num_workers=workers, collate_fn=fast_collate):
            images = images.to(self.loader.device, self.loader.img_dtype)
            yield images.sub_(self.loader.mean).div_(self.loader.std), target


@torch.no_grad()
def head_features(
    model: nn.Module, pictures: Pictures, indices: Sequence[int]
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """What the FAIM heads of a model get for some images, as their metrics see it.

    Token and map inputs of a head are averaged to one vector an image.

    Returns:
        Features [N, D] in float64 on the CPU, after `head.embed`, by head name, without heads that eval mode does not
        reach; and the classes [N] that came with the images.
    """
    heads = faim_heads(model)
    exact = {name: copy.deepcopy(head).cpu().double() for name, head in heads.items()}
    kept: dict[str, list[torch.Tensor]] = {}
    classes = []
    for inputs, target in layer_inputs(model, heads, pictures.batches(indices)):
        classes.append(target)
        for name, x in inputs.items():
            x = pooled(x, heads[name].in_features)
            kept.setdefault(name, []).append(exact[name].embed(x.cpu().double()))
    features = {name: torch.cat(parts) for name, parts in kept.items()}
    return features, torch.cat(classes).numpy() if classes else np.empty(0, dtype=np.int64)
