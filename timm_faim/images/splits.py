"""One split of the data, opened by timm."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, MultiLabelTarget, create_dataset
from torch.utils.data import Dataset

from timm_faim.data import OMNIGLOT242, omniglot242_root
from timm_faim.images.checked import CheckedImages
from timm_faim.images.folders import put_in_order
from timm_faim.images.pixels import InMode, mode_of
from timm_faim.run.common import RunOptions
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import Number, available_cores, flag, option, whole

# Types of --dataset, and the package that each needs beside timm.
PACKAGES = {"torch": None, "hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
FOLDER_NAMES = ("", "folder", "imagefolder", "image_folder")  # names without a slash that timm reads as a folder


@dataclass
class DataOptions:
    """Data."""

    data_dir: str | None = option(
        "folder with train/ and val/, one folder of images per class in each; or tar files, "
        "with --train-split train.tar --val-split val.tar",
        metavar="DIR",
        marks="usual",
    )
    dataset: str = option(
        "hfds/, hfids/ (streamed), wds/, tfds/ or torch/ and a name; empty: image folder or tar; "
        "omniglot242: the bundled data",
        "",
        metavar="TYPE/NAME",
        marks="usual",
    )
    dataset_download: bool = flag(
        "let a torch/ or tfds/ data set download itself, a hfids/ one download before it streams"
    )
    dataset_trust_remote_code: bool = flag("let a hfds/ data set run its loading script")
    train_split: str = option("training split or folder", "train", metavar="NAME")
    val_split: str = option(
        "validation split or folder; empty: no validation", "validation", metavar="NAME", marks="usual"
    )
    train_num_samples: int | None = option("training images of a streamed data set", None, whole(1, 10**12), "N")
    val_num_samples: int | None = option("validation images of a streamed data set", None, whole(1, 10**12), "N")
    class_map: str = option("class names in the order of their indices", "", metavar="FILE")
    input_img_mode: str | None = option("PIL mode of the images (default: L for one channel, else RGB)", metavar="MODE")
    input_key: str | None = option("field of the image in a hfds/, hfids/, wds/ or tfds/ data set", metavar="KEY")
    target_key: str | None = option("field of the label; several joined by commas: one class each", metavar="KEY")
    multi_label: bool = flag(
        "any number of classes per image: targets are lists of indices, or as --target-format says"
    )
    target_format: str = option("form of multi-label targets", "indices", choices=("indices", "multihot"))
    multilabel_threshold: float = option(
        "probability from which a label counts", 0.5, Number(float, 0, 1, above=True, below=True), "P"
    )
    skip_unreadable: bool = flag(
        "go on without images that cannot be read, and count them; otherwise they are an error"
    )
    workers: int = option(
        "loader processes per training process",
        min(4, available_cores()),
        whole(0, 1024),
        "N",
        alias="-j",
        marks="usual runtime",
    )

    @property
    def kind(self) -> str:
        """What stands before the slash in --dataset: hfds, wds, torch and so on; empty for an image folder."""
        prefix, slash, _ = self.dataset.partition("/")
        return prefix.lower() if slash else ""


def set_targets(options: DataOptions, dataset: Dataset, num_classes: int) -> None:
    """With --multi-label, make the dataset's targets dense [C]."""
    if options.multi_label:
        images = dataset.images if isinstance(dataset, CheckedImages) else dataset
        images.target_transform = MultiLabelTarget(num_classes, dense=options.target_format == "multihot")


def open_split(
    options: DataOptions,
    run: RunOptions,
    is_training: bool,
    in_chans: int,
    in_order: bool = False,
    repeats: float = 0.0,
) -> Dataset:
    """One split as a timm dataset, wrapped in `CheckedImages` where images can be read by their number.

    Args:
        options: what to open.
        run: batch size and seed, for streams.
        is_training: the training split instead of the validation split.
        in_chans: channels of the model's input.
        in_order: a streamed training split comes once and in order, instead of shuffled and for ever.
        repeats: passes per epoch of a stream.

    Raises:
        UserError: unknown type, missing package, or whatever timm says about the data.
    """
    name, root = options.dataset, options.data_dir
    split = options.train_split if is_training else options.val_split
    _check_name(options)
    mode = options.input_img_mode or mode_of(in_chans)
    as_stored = options.kind in ("hfids", "wds")  # these readers would convert, with clipping
    from_fields = {
        key: value
        for key, value in (
            ("input_key", options.input_key),
            ("target_key", options.target_key),
            ("target_format", options.target_format if options.multi_label else None),
        )
        if value is not None
    }
    try:
        if name == OMNIGLOT242:
            name, root = "", str(omniglot242_root())
        elif options.kind == "" and not Path(root or "").exists():
            raise UserError(f"--data-dir {root} does not exist. Give a folder with train/ and val/ in it")
        dataset = create_dataset(
            name,
            root=root,
            split=split,
            is_training=is_training and not in_order,
            class_map=options.class_map,
            download=options.dataset_download,
            batch_size=run.batch_size,
            seed=run.seed,
            repeats=repeats,
            input_img_mode="" if as_stored else mode,
            num_samples=options.train_num_samples if is_training else options.val_num_samples,
            trust_remote_code=options.dataset_trust_remote_code,
            **from_fields,
        )
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, OSError, ImportError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"cannot open the {split} data of {options.dataset or root}: {reason}") from e
    put_in_order(getattr(dataset, "reader", None), bool(options.class_map))
    if options.kind == "hfds":
        _check_fields(options, dataset.reader)
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset, skip=options.skip_unreadable, is_training=is_training)
    if as_stored:
        dataset.reader = InMode(dataset.reader, mode)
    return dataset


def _check_name(options: DataOptions) -> None:
    name, kind = options.dataset, options.kind
    if kind == "" and name.lower() not in (*FOLDER_NAMES, OMNIGLOT242):
        near = did_you_mean(name, [OMNIGLOT242]) or f" For one of torchvision's: torch/{name}"
        raise UserError(f"unknown --dataset {name}.{near}. Leave it out for an image folder")
    if name.lower() in {f"torch/{folder}" for folder in FOLDER_NAMES}:
        raise UserError(f"--dataset {name}: image folders are read by timm. Leave --dataset out")
    if kind and kind not in PACKAGES:
        raise UserError(
            f"unknown type of --dataset {name}.{did_you_mean(kind, PACKAGES)} Types are "
            f"{'/, '.join(PACKAGES)}/ and, without --dataset, an image folder"
        )
    package = PACKAGES.get(kind)
    if package and find_spec(package) is None:
        also = " tensorflow" if kind == "tfds" else ""
        raise UserError(f"--dataset {name} needs the package {package}: pip install {package.replace('_', '-')}{also}")
    if kind in ("torch", "wds", "tfds") and not options.data_dir:
        raise UserError(f"--dataset {name} needs --data-dir, the folder where the data are or are to be kept")


def _check_fields(options: DataOptions, reader: Any) -> None:
    """Read the first sample: timm takes a field that is not there for an empty one."""
    try:
        reader[0][0].close()
    except (LookupError, TypeError) as e:
        fields = ", ".join(name for name in reader.dataset.column_names if name != options.input_key)
        raise UserError(
            f"--dataset {options.dataset}: no image in field {reader.image_key} or no label in field "
            f"{reader.label_key}. Choose from {fields} with --input-key and --target-key"
        ) from e
