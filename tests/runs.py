"""What the training tests share: a tiny image folder and training runs inside the test process."""

import csv
import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from timm_faim import train as training_script
from timm_faim.images.datasets import TrainingData, open_datasets
from timm_faim.training.args import parse_args
from timm_faim.training.options import Options

# A tiny model on 32-pixel images; the 12 training images of `make_images` in batches of 4 make 3 steps an epoch.
TINY = [
    "--img-size",
    "32",
    "--batch-size",
    "4",
    "--epochs",
    "2",
    "--workers",
    "0",
    "--opt",
    "adamw",
    "--lr",
    "0.003",
    "--warmup-epochs",
    "0",
    "--no-aug",
    "--log-interval",
    "1",
    "--cpu-threads",
    "1",
    "--no-report",
    "--no-calibrate",
]


def options_of(*argv) -> Options:
    """The options of a command line, on data that are not opened unless it names others."""
    return parse_args(["--data-dir", "d", *map(str, argv)])


def values_of(options: Options) -> SimpleNamespace:
    """The values of all options by name."""
    return SimpleNamespace(
        config=options.config, **{name: value for group in options.groups for name, value in vars(group).items()}
    )


def open_data(options: Options, in_chans: int = 3) -> TrainingData:
    """The data as train_faim.py opens them."""
    return open_datasets(
        options.data, options.run, in_chans, options.model.num_classes, options.augmentation.epoch_repeats
    )


def make_images(root: Path, train: int = 4, val: int = 2, extra_val: int = 1, classes=("bird", "cat", "dog")) -> Path:
    """root/{train,val}/<class>/<n>.png of 32 pixels, one colour per class plus noise; `extra_val` more of the first.

    With the defaults 12 training images and 7 validation images: an odd number.
    """
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count + (extra_val if split == "val" and k == 0 else 0)):
                pixels = torch.randint(0, 120, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., k % 3] += 120
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


def make_shards(images: Path, folder: Path, train: int = 2, validation: int = 2) -> Path:
    """The images of `make_images` as so many webdataset shards of each split, with their sizes in _info.json."""
    folder.mkdir(exist_ok=True)
    splits = {}
    for split, count in (("train", train), ("validation", validation)):
        paths = sorted((images / split[:5].replace("valid", "val")).rglob("*.png"))
        lengths = []
        for shard in range(count):
            members = paths[shard::count]
            lengths.append(len(members))
            with tarfile.open(folder / f"{split}-{shard}.tar", "w") as tar:
                for i, path in enumerate(members):
                    label = str(["bird", "cat", "dog"].index(path.parent.name)).encode()
                    tar.add(path, arcname=f"{i}.png")
                    info = tarfile.TarInfo(f"{i}.cls")
                    info.size = len(label)
                    tar.addfile(info, io.BytesIO(label))
        splits[split] = {
            "name": split,
            "num_samples": len(paths),
            "shard_lengths": lengths,
            "filenames": [f"{split}-{shard}.tar" for shard in range(count)],
        }
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return folder


def fresh_accelerator() -> None:
    """Forget the settings of the Accelerator before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(*argv: object) -> None:
    """One run in this process, with a fresh Accelerator and one thread (more only get in each other's way here)."""
    fresh_accelerator()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training_script.train([str(word) for word in argv])
    finally:
        torch.set_num_threads(threads)


def train_tiny(data: Path, output: Path, *argv: object, model: str = "faim_test_resnet") -> Path:
    """A tiny run in this process; returns its run folder."""
    train("--data-dir", data, "--output", output, "--experiment", "run", "--model", model, *TINY, *argv)
    return output / "run"


def read_summary(run: Path) -> list[dict[str, str]]:
    """The rows of summary.csv."""
    with (run / "summary.csv").open() as stream:
        return list(csv.DictReader(stream))
