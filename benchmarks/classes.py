"""What adding classes costs, and what it gives beside fitting the head to all images again.

    python benchmarks/classes.py
    python benchmarks/classes.py --weights lite0.safetensors --data leaf99=DIR grocery81=DIR

Time: a class of 5 images, beside the model's backbone on the same images; medians over rounds, in which both are
measured in turn. Accuracy: every fifth class is kept back, the head fitted in closed form to the others, and those
added with all their training images; images are read as in accuracy/features.py. Top-1 among all classes.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from accuracy.features import CENTRE, MODEL, list_images, named_folders
from machine import headline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from timm_faim import add_classes, faim_heads, fit_, remove_classes

ROUNDS, IMAGES, BATCH, EVERY = 7, 5, 64, 5
COMMAND = "python benchmarks/classes.py"
WITH_DATA = f"{COMMAND} --weights lite0.safetensors --data leaf99=DIR grocery81=DIR"


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def time_models(names: list[str], classes: int) -> None:
    print("| model | classes before | backbone, ms | add_classes, ms | more, ms |\n|---|---|---|---|---|")
    for name in names:
        model = timm.create_model(name, num_classes=classes).eval()
        model.pretrained_cfg["label_names"] = tuple(map(str, range(classes)))
        images = torch.randn(IMAGES, *model.pretrained_cfg["input_size"])
        times = []
        for _ in range(ROUNDS + 1):
            with torch.no_grad():
                alone = seconds(lambda m=model, x=images: m.forward_features(x))
            times.append((alone, seconds(lambda m=model, x=images: add_classes(m, {"new": x}))))
            remove_classes(model, ["new"])
        backbone, added, more = (1000 * statistics.median(column) for column in
                                 zip(*((a, b, b - a) for a, b in times[1:]), strict=True))  # fmt: skip
        print(f"| {name} | {classes} | {backbone:.0f} | {added:.0f} | {more:+.0f} |", flush=True)
    print()


class Batches:
    """(images [B, 3, 160, 160], classes [B]) of image files, read anew each time."""

    def __init__(self, paths: list[Path], classes: list[int]) -> None:
        self.paths, self.classes = paths, classes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.paths), BATCH):
            images = []
            for path in self.paths[start : start + BATCH]:
                with Image.open(path) as image:
                    images.append(CENTRE(image.convert("RGB")))
            yield torch.stack(images), torch.tensor(self.classes[start : start + BATCH])

    def of(self, classes: list[int]) -> "Batches":
        """Those of some classes, with their places among these for numbers."""
        place = {k: i for i, k in enumerate(classes)}
        kept = [(path, place[k]) for path, k in zip(self.paths, self.classes, strict=True) if k in place]
        return Batches(*map(list, zip(*kept, strict=True)))


def new_model(weights: Path, names: list[int]) -> nn.Module:
    """The backbone with its weights under a fresh head for some classes."""
    model = timm.create_model(f"faim_{MODEL}", num_classes=len(names)).eval()
    loaded = {key: value.float() if value.is_floating_point() else value for key, value in load_file(weights).items()}
    missing = model.load_state_dict(loaded, strict=False).missing_keys
    assert all(key.startswith(tuple(faim_heads(model))) for key in missing), missing
    model.pretrained_cfg["label_names"] = tuple(map(str, names))
    return model


@torch.no_grad()
def top1(model: nn.Module, batches: Batches, new: set[int]) -> list[str]:
    """In per cent: of all images, of those of the classes kept back, of the others."""
    order = torch.tensor([int(name) for name in model.pretrained_cfg["label_names"]])
    right = torch.cat([order[model(x).argmax(1)] == y for x, y in batches]).double()
    is_new = torch.tensor([k in new for k in batches.classes])
    return [f"{100 * share.mean():.1f}" for share in (right, right[is_new], right[~is_new])]


def compare(folder: Path, weights: Path) -> None:
    train, val = (Batches(*list_images(folder / split)) for split in ("train", "val"))
    classes = sorted(set(train.classes))
    new, old = classes[::EVERY], [k for k in classes if k % EVERY]
    print(f"{len(classes)} classes, {len(new)} of them kept back\n")
    print("| head | all, % | added classes, % | others, % |\n|---|---|---|---|")
    added = fit_(new_model(weights, old), train.of(old))
    add_classes(added, {str(k): (x for x, _ in train.of([k])) for k in new})
    fitted = fit_(new_model(weights, classes), train)
    for name, model in (("fitted to the others, classes added", added), ("fitted to all", fitted)):
        print(f"| {name} | {' | '.join(top1(model, val, set(new)))} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["faim_tf_efficientnet_lite0", "faim_resnet50"])
    parser.add_argument("--classes", type=int, default=1000, help="classes before, of the times")
    parser.add_argument("--weights", type=Path, help="safetensors file of tf_efficientnet_lite0")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=DIR", help="folders with train/ and val/")
    args = parser.parse_args()
    print(f"{headline(WITH_DATA if args.data else COMMAND, cuda=False)}\n")
    time_models(args.models, args.classes)
    for name, folder in named_folders(args.data).items():
        print(f"{name}: ", end="")
        compare(folder, args.weights)


if __name__ == "__main__":
    main()
