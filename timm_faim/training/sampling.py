"""The randomness of training as a function of seed, process, epoch and position instead of generator states.

Every training sample, every random erasing and every step draws from generators seeded with a hash of where it stands.
So the run does not depend on the number of loader workers, and one that is resumed at step k of an epoch draws what
the uninterrupted run drew, without reading the samples before. timm's loaders keep their own samplers and transforms.
"""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, RandomSampler

_SAMPLE, _ERASING, _STEP = range(3)  # what a seed is for


def derive_seed(*numbers: int) -> int:
    """A 63-bit hash of integers: near counters give unrelated seeds."""
    return int.from_bytes(blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, rank: int, epoch: int, step: int) -> None:
    """Seed all generators of this process, devices included, for one training step (dropout, mixup, erasing)."""
    value = derive_seed(_STEP, seed, rank, epoch, step)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@contextmanager
def _sample_seed(value: int) -> Iterator[None]:
    """Seed the generators that image transforms draw from; the caller's come back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # `torch.manual_seed` would also seed the devices
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededSamples(Dataset):
    """A map-style dataset whose samples are drawn under the seed that the sampler gives them.

    Takes keys (index, seed) of `PositionedSampler`, or a plain index, which draws from the generators as they are.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: int | tuple[int, int]) -> Any:
        if not isinstance(key, tuple):
            return self.dataset[key]
        index, seed = key
        with _sample_seed(seed):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def transform(self) -> Any:
        """The image transform of the dataset; `create_loader` sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


class PositionedSampler:
    """Gives the indices of a sampler from `start` on, each with a seed made from its position in the epoch."""

    def __init__(self, sampler: Any, seed: int, rank: int) -> None:
        self.sampler = sampler
        self.seed, self.rank = seed, rank
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, derive_seed(_SAMPLE, self.seed, self.rank, self.epoch, position)

    def __len__(self) -> int:
        return len(self.sampler)


class SeededErasing:
    """timm's random erasing of a batch on the device, seeded by the number of the batch.

    timm's loader erases one batch ahead of the training step, so the generators' states at a step would not do.
    """

    def __init__(self, erasing: Any, seed: int, rank: int) -> None:
        self.erasing = erasing
        self.seed, self.rank = seed, rank
        self.epoch, self.batch = 0, 0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        value = derive_seed(_ERASING, self.seed, self.rank, self.epoch, self.batch)
        self.batch += 1
        random.seed(value)
        torch.manual_seed(value)
        return self.erasing(images)


class TrainingOrder:
    """Puts a training loader of timm under positions and seeds.

    Args:
        loader: timm's prefetching loader; a map-style dataset must be wrapped in `SeededSamples`.
        seed: seed of the run, the same in every process. Processes share one permutation and take every W-th image.
        rank: number of this process.
        sampler: gives the indices instead of the loader's own.
    """

    def __init__(self, loader: Any, seed: int, rank: int, sampler: Any = None) -> None:
        self.loader, self.seed, self.rank = loader, seed, rank
        self.sampler = loader.sampler if sampler is None else sampler
        self.is_stream = isinstance(loader.dataset, IterableDataset)
        self.positions = self.erasing = None
        if not self.is_stream:
            self.positions = PositionedSampler(self.sampler, seed, rank)
            loader.batch_sampler.sampler = self.positions
            if hasattr(self.sampler, "seed"):
                self.sampler.seed = seed
        if getattr(loader, "random_erasing", None) is not None:
            self.erasing = loader.random_erasing = SeededErasing(loader.random_erasing, seed, rank)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from number `start` on; a stream has to read and drop the ones before."""
        sampler = self.sampler
        for holder in (self.loader.dataset, sampler):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
        if isinstance(sampler, RandomSampler):  # the permutation of a DistributedSampler
            sampler.generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.positions is not None:
            self.positions.epoch, self.positions.start = epoch, start * self.loader.batch_sampler.batch_size
        if self.erasing is not None:
            self.erasing.epoch, self.erasing.batch = epoch, 0 if self.is_stream else start
        seed_step(self.seed, self.rank, epoch, -1)  # for the base seed of loader workers, which a stream draws from
        batches = iter(self.loader)
        for _ in range(start if self.is_stream else 0):
            next(batches, None)
        return batches

    def __len__(self) -> int:
        """Batches an epoch in this process."""
        return len(self.loader)
