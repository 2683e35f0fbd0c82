"""Features on disk, written once by any number of processes and read in blocks.

Process r of W holds the images r, r + W, r + 2 W, ... of the data set, as timm's loaders share them out. A store is
written under a temporary name and renamed when it is whole.

Shapes: N images, D features.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_faim import faim_heads
from timm_faim.data import cache_dir
from timm_faim.moments import Moments
from timm_faim.run.files import rename
from timm_faim.run.weights import hash_tensors
from timm_faim.version import __version__

_META, _STATE = "store.json", "state.safetensors"
_BLOCK = 4096  # images read at a time


class Features:
    """Features [N, D] (float32) and classes [N] of a split, in a store.

    Args:
        folder: of the store.
        split: its name there.
    """

    def __init__(self, folder: Path, split: str) -> None:
        meta = json.loads((folder / _META).read_text())[split]
        self.width, counts = meta["width"], meta["counts"]
        parts, W = [], len(counts)
        self.target = np.empty(sum(counts), np.int64)
        self.place = np.empty(sum(counts), np.int64)  # in the data set
        start = 0
        for rank, count in enumerate(counts):
            shape = (count, self.width)
            empty = np.empty(shape, np.float32)
            parts.append(np.memmap(folder / f"{split}-{rank}.f32", np.float32, "r", shape=shape) if count else empty)
            rows = np.fromfile(folder / f"{split}-{rank}.i64", np.int64).reshape(-1, 2)
            self.place[start : start + count] = rows[:, 0] * W + rank
            self.target[start : start + count] = rows[:, 1]
            start += count
        self._parts, self._starts = parts, np.cumsum([0, *counts])
        self._columns: np.ndarray | slice = slice(None)
        self._order = np.argsort(self.place, kind="stable")  # the same for any number of processes
        self.place, self.target = self.place[self._order], self.target[self._order]

    def __len__(self) -> int:
        return len(self.target)

    def parts(self, widths: Sequence[int], wanted: Sequence[int]) -> "Features":
        """The same images, of whose features side by side the wanted parts are read."""
        starts, chosen = np.cumsum([0, *widths]), copy(self)
        chosen._columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in wanted])
        return chosen

    def blocks(self, chosen: np.ndarray | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Features [B, D] and classes [B] of the chosen images (default: all), in their order."""
        chosen = np.arange(len(self)) if chosen is None else chosen
        for start in range(0, len(chosen), _BLOCK):
            block = chosen[start : start + _BLOCK]
            yield torch.from_numpy(self._rows(self._order[block])), torch.from_numpy(self.target[block])

    def _rows(self, stored: np.ndarray) -> np.ndarray:
        rows = np.empty((len(stored), self.width), np.float32)
        for part, start, end in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            here = (stored >= start) & (stored < end)
            rows[here] = part[stored[here] - start]
        return rows[:, self._columns]


class Writer:
    """Writes the rows of one process for one split of a store that is being made."""

    def __init__(self, folder: Path, split: str, rank: int) -> None:
        self._features = (folder / f"{split}-{rank}.f32").open("wb")
        self._rows = (folder / f"{split}-{rank}.i64").open("wb")
        self.count, self.width = 0, 0

    def add(self, x_BD: Tensor, place_B: Tensor, target_B: Tensor) -> None:
        """Append features, the images' places among those of this process, and their classes."""
        self.count, self.width = self.count + len(x_BD), x_BD.shape[1]
        x_BD.float().cpu().numpy().tofile(self._features)
        torch.stack([place_B.cpu(), target_B.cpu()], 1).numpy().astype(np.int64).tofile(self._rows)

    def close(self) -> None:
        """End of the split."""
        self._features.close()
        self._rows.close()


def finish_store(temporary: Path, folder: Path, splits: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Make a store of what all processes have written: their counts by split, and what was fitted before the heads."""
    (temporary / _META).write_text(json.dumps(splits), encoding="utf-8")
    save_file(dict(state), temporary / _STATE)
    shutil.rmtree(folder, ignore_errors=True)
    rename(temporary, folder)


def is_whole(folder: Path, splits: Iterable[str]) -> bool:
    """Whether there is a store with these splits."""
    try:
        meta = json.loads((folder / _META).read_text())
        for split in splits:
            for rank, count in enumerate(meta[split]["counts"]):
                sizes = {"f32": 4 * meta[split]["width"] * count, "i64": 16 * count}
                if any((folder / f"{split}-{rank}.{end}").stat().st_size != size for end, size in sizes.items()):
                    return False
        return (folder / _STATE).is_file()
    except (OSError, ValueError, TypeError, KeyError):
        return False


def stored_state(folder: Path) -> dict[str, Tensor]:
    """What was fitted before the heads, by name."""
    return load_file(folder / _STATE)


def fitted_before_heads(model: nn.Module) -> dict[str, Tensor]:
    """State of the second moments in front of the heads."""
    return {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, moments in model.named_modules()
        if isinstance(moments, Moments)
        for key, tensor in moments.state_dict().items()
    }


@contextmanager
def place(
    args: argparse.Namespace, model: nn.Module, settings: Mapping[str, Any], files: Sequence[str] | None
) -> Iterator[Path]:
    """The folder of a store: in the cache that the options name, or for this time alone, with --no-cache or where the
    images are no files."""
    if args.no_cache or files is None:
        with tempfile.TemporaryDirectory(prefix="features-") as folder:
            yield Path(folder, "store")
        return
    yield (args.cache or cache_dir() / "features") / key_of(model, settings, files)


def key_of(model: nn.Module, settings: Mapping[str, Any], files: Iterable[str]) -> str:
    """What the features depend on, in 32 characters: backbone, settings, and name, size and time of each file."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([__version__, settings], sort_keys=True, default=str).encode())
    own = [f"{name}." for name in faim_heads(model)]
    own += [f"{name}." for name, m in model.named_modules() if isinstance(m, Moments) and not m.is_fitted]
    hash_tensors(digest, {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(own))})
    for file in files:
        status = os.stat(file)
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
