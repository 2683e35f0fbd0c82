"""What a retrieval works on: a model with one FAIM head, image folders, and the features that the head gets.

Shapes: B images of a batch, N images, D features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from torch import Tensor, nn
from tqdm import tqdm

from timm_faim import FAIMHead, faim_heads
from timm_faim.head.tap import layer_inputs, pooled
from timm_faim.images.checked import UNREADABLE, CheckedImages, reader_of
from timm_faim.images.folders import check_one_level, put_in_order
from timm_faim.images.loaders import clean_loader
from timm_faim.images.pictures import Pictures
from timm_faim.images.pixels import mode_of
from timm_faim.run import opening
from timm_faim.run.errors import UserError


@dataclass(frozen=True)
class Folder:
    """An image folder before its images are read: timm's data set, and the class of each image by its folder."""

    images: CheckedImages
    class_names: list[str]


@dataclass(frozen=True)
class Images:
    """The readable images of a folder as the model sees them, in the order of their names.

    ``features_ND`` are the raw inputs of the head (float32, on the device of the model), ``class_names`` the classes,
    ``numbers`` the images' places in ``pictures``.
    """

    features_ND: Tensor
    class_names: list[str]
    numbers: list[int]
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.class_names)

    @property
    def unreadable(self) -> int:
        """Images of the folder that are not among these."""
        return len(self.pictures) - len(self)

    def labels(self, classes: list[str]) -> Tensor:
        """Class numbers [N] in a list of class names, on the device of the features."""
        number = {name: k for k, name in enumerate(classes)}
        return torch.tensor([number[name] for name in self.class_names], device=self.features_ND.device)


def open_model(checkpoint: str) -> tuple[nn.Module, FAIMHead]:
    """A model with its weights, in eval mode on the CPU, and its FAIM head.

    Args:
        checkpoint: a run folder, ``local-dir:`` or ``hf-hub:`` and a place, or a timm name.

    Raises:
        UserError: it cannot be opened, has no FAIM head or several, or a metric with parameters that are not finite.
    """
    model = opening.open_model(checkpoint, "--model").model
    heads = faim_heads(model)
    if not heads:
        raise UserError(
            f"--model {checkpoint} has no FAIM head. Train one under a faim_ name, or convert the "
            "model with timm_faim.convert"
        )
    if len(heads) > 1:
        raise UserError(
            f"--model {checkpoint} has {len(heads)} FAIM heads ({', '.join(heads)}), and retrieval "
            "needs the features of one. Use a model with one classifier"
        )
    head = next(iter(heads.values()))
    if not all(torch.isfinite(parameter).all() for parameter in head.metric.parameters()):
        raise UserError(
            f"the metric of --model {checkpoint} has parameters that are not finite. Use the weights "
            "of an earlier epoch"
        )
    return model, head


def open_folder(folder: str, flag: str, channels: int, skip_unreadable: bool) -> Folder:
    """List the images of a folder, searched to any depth; the folder that an image lies in is its class.

    Args:
        folder: the place.
        flag: what the command line calls it.
        channels: of the model's input; 1 makes the images grey.
        skip_unreadable: leave images out that cannot be read, instead of an error on reading.

    Raises:
        UserError: no such folder, or no images in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder} is no folder. Give a folder with one folder of images per class")
    try:
        dataset = create_dataset("", root=folder, search_split=False, input_img_mode=mode_of(channels))
    except (RuntimeError, OSError) as e:
        raise UserError(
            f"cannot open the images of {flag} {folder}: {' '.join(str(e).split())}. Give a folder with "
            "one folder of images per class"
        ) from e
    images = CheckedImages(dataset, skip=skip_unreadable, is_training=False)
    reader = reader_of(images)
    put_in_order(reader, has_class_map=False)
    check_one_level(reader, f"images of {flag}", allow_distinct=True)
    name_of = {k: name or Path(folder).resolve().name for name, k in reader.class_to_idx.items()}  # "": right in it
    return Folder(images, [name_of[k] for _, k in reader.samples])


def read_images(
    folder: Folder,
    model: nn.Module,
    head: FAIMHead,
    config: dict[str, Any],
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    amp: bool,
) -> Images:
    """The features of all images of a folder.

    Args:
        folder: the images.
        model: in eval mode, on ``device``.
        head: its FAIM head.
        config: its preprocessing, of timm's ``resolve_input_data_config``.
        device: where the model runs.
        batch_size, workers: of timm's loader.
        amp: run the model under autocast in bfloat16; the features come out in float32.

    Raises:
        UserError: an image that cannot be read, or features that are not finite; the image is named.
    """
    loader = clean_loader(folder.images, config, device, batch_size, workers)
    features_ND, targets_N = _features(model, head, loader, folder.images, amp)
    readable = (targets_N != UNREADABLE).nonzero().flatten().tolist()
    return Images(features_ND[readable], [folder.class_names[i] for i in readable], readable, Pictures(loader))


def _features(model: nn.Module, head: FAIMHead, loader: Any, images: CheckedImages, amp: bool) -> tuple[Tensor, Tensor]:
    def forward(batch: Tensor) -> None:
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=amp):
            model(batch)

    features, targets, seen_images = [], [], 0
    bar = tqdm(loader, desc="features", unit="batch", leave=False, disable=None)
    for inputs, target in layer_inputs(model, {"head": head}, bar, forward):
        x_BD = pooled(inputs["head"], head.in_features).float()
        bad = ((~torch.isfinite(x_BD).all(1)).cpu() & (target.cpu() != UNREADABLE)).nonzero()
        if len(bad):
            name = images.images.filename(seen_images + int(bad[0]), absolute=True)
            raise UserError(
                f"the features of {name} are not finite. Check the image; if all images are like that, "
                "the weights of the model"
            )
        features.append(x_BD)
        targets.append(target.cpu())
        seen_images += len(target)
    return torch.cat(features), torch.cat(targets)
