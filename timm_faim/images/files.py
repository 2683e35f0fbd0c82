"""Images named one by one: files, folders and patterns in one list, and timm's reader of them."""

import glob
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from timm.data import ImageDataset, get_img_extensions
from timm.data.readers.reader import Reader

from timm_faim.images.checked import CheckedImages
from timm_faim.images.folders import HIDDEN, total_order
from timm_faim.run.errors import UserError


def list_images(places: Iterable[str]) -> list[str]:
    """The image files of places, each once, in the order of the places and by name within one.

    Args:
        places: files of any name; folders, whose files with an image's ending are taken at any depth but for hidden
            ones; patterns such as ``shots/**/*.jpg``.

    Raises:
        UserError: a place that is not there, or no images at all.
    """
    found: dict[str, None] = {}
    places = list(places)
    for place in places:
        if os.path.isdir(place):
            found |= dict.fromkeys(_in_folder(place))
        elif os.path.lexists(place):
            found[place] = None
        elif glob.has_magic(place):
            files = sorted(filter(os.path.isfile, glob.glob(place, recursive=True)), key=total_order)
            found |= dict.fromkeys(files)
        else:
            raise UserError(f"{place} does not exist. Give image files, folders, or patterns in quotes")
    if not found:
        raise UserError(f"no images in {', '.join(places) or 'an empty list'}. Files are taken that end in "
                        f"{' '.join(sorted(get_img_extensions()))}, and any that are named one by one")  # fmt: skip
    return list(found)


def _in_folder(folder: str) -> list[str]:
    files, endings, seen = [], tuple(get_img_extensions()), set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN))
        files += [os.path.join(root, name) for name in names if name.lower().endswith(endings)
                  and not name.startswith(HIDDEN)]  # fmt: skip
    return sorted(files, key=total_order)


class FileList(Reader):
    """timm's reader of a list of files; the target of an image is its number in the list."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.paths = list(paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        if not stat.S_ISREG(os.stat(self.paths[index]).st_mode):
            raise OSError("no regular file")  # opening a pipe would wait for a writer
        return Path(self.paths[index]).open("rb"), index

    def __len__(self) -> int:
        return len(self.paths)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return os.path.basename(self.paths[index]) if basename else self.paths[index]


def images_of(paths: Sequence[str], mode: str) -> CheckedImages:
    """A data set of files, in Pillow's ``mode``; one that cannot be read comes out with the target `UNREADABLE`."""
    return CheckedImages(ImageDataset("", FileList(paths), input_img_mode=mode), skip=True, is_training=False)


def why_unreadable(path: str, mode: str) -> str:
    """What is wrong with a file that could not be read, in a few words."""
    images = images_of([path], mode)
    images.skip = False
    try:
        images[0]
    except MemoryError:
        raise
    except Exception as e:
        return str(e).partition(" (")[2].partition("). Repair")[0] or " ".join(str(e).split())
    return "not readable at the first try"
