"""Image folders and their frozen features of timm's tf_efficientnet_lite0, cached.

Folders are ``DIR/train/<class>/*`` and ``DIR/val/<class>/*`` with the same classes. The weights are a local safetensors
file (half precision is cast to float32), loaded strictly. Images are resized to 184 (short side, bicubic), cropped to
160 and scaled to [-1, 1]; a view is a random resized crop of 0.35 to 1 of the area, mirrored half of the time, drawn
from a generator seeded by the image's place in the list.

Shapes: N images, V views, D features.
"""

import argparse
import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms import v2

MODEL = "tf_efficientnet_lite0"
CACHE = Path(tempfile.gettempdir()) / "timm_faim_accuracy"  # where scratch goes unless told otherwise
RESIZE, CROP, VIEW_AREA = 184, 160, (0.35, 1.0)

_BICUBIC = v2.InterpolationMode.BICUBIC
_TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
CENTRE = v2.Compose([v2.Resize(RESIZE, interpolation=_BICUBIC), v2.CenterCrop(CROP), *_TO_TENSOR])
VIEW = v2.Compose(
    [v2.RandomResizedCrop(CROP, VIEW_AREA, interpolation=_BICUBIC), v2.RandomHorizontalFlip(), *_TO_TENSOR]
)


@dataclass
class FrozenFeatures:
    """Features of one data set: ``train_ND``, ``val_ND``, class indices, and views [V, N, D] of the training images."""

    train_ND: Tensor
    train_N: Tensor
    val_ND: Tensor
    val_N: Tensor
    views_VND: Tensor | None
    data_hash: str


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """--weights, --data, --cache and --views of the scripts on frozen features."""
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=DIR", help="folders with train/ and val/")
    parser.add_argument("--cache", type=Path, default=CACHE, help="scratch folder for features")
    parser.add_argument("--views", type=int, default=4, help="augmented views of each training image")


def cut(targets_N: Tensor, count: int | None, seed: int) -> Tensor:
    """Indices of ``count`` images of each class, drawn by the seed; all for None."""
    if count is None:
        return torch.arange(len(targets_N))
    order = torch.randperm(len(targets_N), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[targets_N[order] == label][:count] for label in targets_N.unique()]).sort().values


def named_folders(entries: list[str]) -> dict[str, Path]:
    """Paths by name of words NAME=PATH."""
    return {name: Path(folder) for name, folder in (entry.split("=", 1) for entry in entries)}


def list_images(folder: Path) -> tuple[list[Path], list[int]]:
    """Sorted image paths below ``folder/<class>/`` and their class indices, by sorted class name."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    paths = [(image, label) for label, c in enumerate(classes) for image in sorted(c.iterdir()) if image.is_file()]
    return [image for image, _ in paths], [label for _, label in paths]


def hash_folder(folder: Path) -> str:
    """SHA-256 over the relative names and the bytes of all files below ``folder``, sorted by name."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_backbone(weights: Path, name: str = MODEL, **options) -> nn.Module:
    """A backbone without its classifier, in eval mode: images [B, 3, H, W] -> features [B, D]."""
    model = timm.create_model(name, pretrained=False, **options)
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in load_file(weights).items()})
    model.reset_classifier(0)
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def extract(model: nn.Module, paths: list[Path], transform: v2.Transform, seed: int = 0, batch: int = 64) -> Tensor:
    """Features [N, D] of image files; the random transforms of image i are seeded by (seed, i)."""
    rows = []
    for start in range(0, len(paths), batch):
        images = []
        for i, path in enumerate(paths[start : start + batch], start):
            torch.manual_seed(seed * 1_000_003 + i)
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
        rows.append(model(torch.stack(images).contiguous(memory_format=torch.channels_last)))
    return torch.cat(rows).clone()


def frozen_features(name: str, folder: Path, weights: Path, cache: Path, views: int) -> FrozenFeatures:
    """Features of a data set with ``views`` augmented views of the training images, from the cache where it has them.

    A cache file is named by the hashes of data and weights, so that neither can change unnoticed.
    """
    data_hash = hash_folder(folder)
    weights_hash = hash_file(weights)
    cache.mkdir(parents=True, exist_ok=True)
    model: nn.Module | None = None

    def cached(part: str, paths: list[Path], transform: v2.Transform, seed: int = 0) -> Tensor:
        nonlocal model
        file = cache / f"{name}-{data_hash[:12]}-{weights_hash[:12]}-{part}.pt"
        if file.exists():
            return torch.load(file)
        model = model or load_backbone(weights)
        features = extract(model, paths, transform, seed)
        torch.save(features, file)
        return features

    train, train_labels = list_images(folder / "train")
    val, val_labels = list_images(folder / "val")
    parts = [cached(f"view{v}", train, VIEW, v + 1) for v in range(views)]
    return FrozenFeatures(
        cached("train", train, CENTRE),
        torch.tensor(train_labels),
        cached("val", val, CENTRE),
        torch.tensor(val_labels),
        torch.stack(parts) if parts else None,
        data_hash,
    )
