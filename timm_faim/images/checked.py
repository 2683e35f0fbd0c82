"""Images that can be read by their number, with an error where timm would take another one silently."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset, add_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset

from timm_faim.images.pixels import read_image
from timm_faim.run.errors import RankError

add_img_extensions((".webp", ".bmp", ".tif", ".tiff"))  # timm looks for PNG and JPEG only

UNREADABLE = -1  # target of a validation image that could not be read; with several labels every entry


class CheckedImages(Dataset):
    """timm's `ImageDataset` without its silent replacement of unreadable images by their neighbours.

    An unreadable image is a `RankError` that names the file. With `skip` it is recorded in `unreadable`, a mask
    [N] in memory shared with the loader's workers. In training the next readable image takes its place (batches
    keep their size); in validation it comes out as a blank image with target `UNREADABLE`, to be left out.
    """

    def __init__(self, images: ImageDataset, *, skip: bool, is_training: bool) -> None:
        self.images = images
        self.skip = skip
        self.is_training = is_training
        self.unreadable = torch.zeros(len(images), dtype=torch.bool).share_memory_()

    @property
    def transform(self) -> Any:
        """The image transform; `create_loader` sets it."""
        return self.images.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.images.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        encode = self.images.target_transform
        for i in range(index, index + len(self)):
            i %= len(self)
            image, target = self._read(i)
            if image is not None:
                return self.transform(image), target if encode is None else encode(target)
            if not self.is_training:
                blank = Image.new(self.images.input_img_mode, (64, 64))
                return self.transform(blank), UNREADABLE if encode is None else torch.full_like(encode([]), UNREADABLE)
        raise RankError(f"none of the {len(self)} images can be read. Check the files in the data folder")

    def _read(self, index: int) -> tuple[Image.Image | None, Any]:
        try:
            reader = self.images.reader
            if isinstance(reader, ReaderImageFolder) and not stat.S_ISREG(os.stat(reader.samples[index][0]).st_mode):
                raise OSError("no regular file")  # opening a pipe would wait for a writer
            stream, target = reader[index]
            with stream:
                return read_image(stream, self.images.input_img_mode), target
        except MemoryError:
            raise
        except Exception as e:  # Pillow's decoders raise TypeError, struct.error, ... on damaged files
            if not self.skip:
                reason = "not an image" if isinstance(e, UnidentifiedImageError) else " ".join(str(e).split())
                reason = reason or type(e).__name__
                raise RankError(
                    f"cannot read image {self._name(index)} ({reason}). Repair or remove the file, or go "
                    "on without such images with --skip-unreadable"
                ) from e
            self.unreadable[index] = True
            return None, UNREADABLE

    def _name(self, index: int) -> str:
        name = self.images.filename(index, absolute=True)  # inside of the archive for tar files, None for bare bytes
        if not name or isinstance(self.images.reader, ReaderImageFolder):
            return name or f"number {index}"
        return str(Path(getattr(self.images.reader, "root", None) or "", name))


def reader_of(dataset: Dataset) -> Any:
    """timm's reader of a dataset; the dataset itself for torchvision's."""
    images = dataset.images if isinstance(dataset, CheckedImages) else dataset
    return getattr(images, "reader", images)


def layers_of(dataset: Any) -> Iterator[Any]:
    """A dataset and those that it wraps, from the outside in."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)
