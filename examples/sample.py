"""What the examples share: options, loaders of an image folder, an epoch loop and an accuracy.

The images are the bundled handwritten characters unless --data-dir names a folder with train/ and val/, one folder of
images a class in each. They are squashed to a square and not augmented, to keep the examples short;
``train_faim.py --help`` shows what a real training has.
"""

import argparse
from pathlib import Path

import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils.misc import natural_key
from torch import nn
from torch.utils.data import DataLoader

from timm_faim.data import omniglot242_root
from timm_faim.run.options import whole


def parser(doc: str, model: str = "faim_resnet10t", img_size: int = 56, epochs: int = 6) -> argparse.ArgumentParser:
    """The options that every example has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data-dir", type=Path, help="folder with train/ and val/ (default: the bundled characters)")
    found.add_argument("--model", default=model, help="faim_ and the name of a timm model (default: %(default)s)")
    found.add_argument("--pretrained", action="store_true", help="start from the model's published weights")
    found.add_argument(
        "--classes", type=whole(2, 10**6), default=12, help="the first so many classes (default: %(default)s)"
    )
    found.add_argument("--img-size", type=whole(16, 4096), default=img_size, help="pixels (default: %(default)s)")
    found.add_argument(
        "--epochs", type=whole(1, 10**6), default=epochs, help="epochs of training (default: %(default)s)"
    )
    found.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="of weights and order (default: %(default)s)"
    )
    return found


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options, with the data folder set and the seed sown."""
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or omniglot242_root()
    if not all((args.data_dir / split).is_dir() for split in ("train", "val")):
        parser.error(f"--data-dir {args.data_dir} has no folders train/ and val/: make them, with one folder a class")
    torch.manual_seed(args.seed)
    return args


def class_names(args: argparse.Namespace) -> list[str]:
    """The first classes in timm's order, which is not the alphabet's: 2 comes before 10."""
    folders = [path.name for path in (args.data_dir / "train").iterdir() if path.is_dir()]
    return sorted(folders, key=lambda name: (natural_key(name), name))[: args.classes]


def loaders(args: argparse.Namespace, model: nn.Module, batch_size: int = 16) -> tuple[DataLoader, DataLoader]:
    """Training and validation batches: images [B, 3, S, S] as the model wants them, class indices [B]."""
    config = resolve_model_data_config(model) | {"input_size": (3, args.img_size, args.img_size)}
    transform = create_transform(**config | {"crop_pct": 1.0, "crop_mode": "squash"})
    numbers = {name: k for k, name in enumerate(class_names(args))}
    train, val = (
        create_dataset("", str(args.data_dir), split, class_map=numbers, transform=transform)
        for split in ("train", "val")
    )
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, 4 * batch_size)


def train_epochs(model: nn.Module, batches: DataLoader, epochs: int, criterion: nn.Module, lr: float = 3e-3) -> None:
    """The usual loop, of what learns in the model; AdamW without weight decay on the head, as timm makes it."""
    optimizer = create_optimizer_v2(model, "adamw", lr=lr, weight_decay=0.05)
    for _ in range(epochs):
        model.train()
        for images, targets in batches:
            optimizer.zero_grad()
            criterion(model(images), targets).backward()
            optimizer.step()
    model.eval()


@torch.inference_mode()
def top1(model: nn.Module, batches: DataLoader) -> float:
    """Per cent of the images that are given their class; leaves the model in eval mode."""
    model.eval()
    right = [(model(images).argmax(1) == targets).double() for images, targets in batches]
    return 100 * float(torch.cat(right).mean())
