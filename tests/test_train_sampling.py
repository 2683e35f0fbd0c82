"""Seeds by position: the same batches whatever the workers, and from the middle of an epoch on."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from timm.data import create_loader
from torch.utils.data import Dataset, IterableDataset

from timm_faim.training.sampling import PositionedSampler, SeededSamples, TrainingOrder, derive_seed, seed_step


class Draws(Dataset):
    """Images whose pixels say which sample it is and what each generator drew."""

    transform = None

    def __len__(self):
        return 13

    def __getitem__(self, index):
        draws = [random.randrange(256), np.random.randint(256), int(torch.randint(256, ()))]
        return np.array([index, *draws], dtype=np.uint8).reshape(1, 2, 2), index


def order(workers=0, seed=3, reprob=0.0, batch_size=4):
    dataset = SeededSamples(Draws())
    loader = create_loader(
        dataset,
        (1, 2, 2),
        batch_size,
        is_training=True,
        num_workers=workers,
        mean=(0.0,),
        std=(1 / 255,),
        device=torch.device("cpu"),
        no_aug=True,
        persistent_workers=workers > 0,
    )
    dataset.transform = None
    if reprob:
        loader.random_erasing = Erasing()
    return TrainingOrder(loader, seed, rank=0)


class Erasing:
    def __call__(self, images):
        return images + random.random() + torch.rand(())


def batches(order, epoch, start=0):
    return [images.flatten(1).clone() for images, _ in order.batches(epoch, start)]


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_workers_do_not_change_what_is_drawn():
    alone, helped = order(), order(workers=2)
    for epoch in range(2):
        assert same(batches(alone, epoch), batches(helped, epoch))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 2])
def test_an_epoch_goes_on_in_its_middle(workers, start):
    whole = batches(order(reprob=1.0), 1)
    assert len(whole) == 3
    resumed = order(workers, reprob=1.0)
    random.seed(7), torch.manual_seed(7)
    assert same(whole[start:], batches(resumed, 1, start))
    assert same(batches(order(reprob=1.0), 2), batches(resumed, 2))  # and the next epoch begins at its beginning


def test_epochs_seeds_and_samples_draw_differently():
    one, other = order(), order(seed=4)
    first, second, third = batches(one, 0), batches(one, 1), batches(other, 0)
    assert not same(first, second) and not same(first, third)
    draws = Counter(tuple(row.tolist()[1:]) for batch in first + second for row in batch)
    assert max(draws.values()) == 1


def test_every_sample_is_drawn_once_an_epoch():
    indices = torch.cat(batches(order(batch_size=1), 5))[:, 0]
    assert sorted(indices.tolist()) == list(range(13))


def test_processes_share_one_permutation():
    """A single process's order is that of the processes of a DistributedSampler put together."""
    alone = torch.cat(batches(order(batch_size=1), 2))[:, 0].int().tolist()
    sampler = torch.utils.data.DistributedSampler(Draws(), num_replicas=1, rank=0, seed=3)
    sampler.set_epoch(2)
    assert alone == list(sampler)


def test_reading_a_sample_leaves_the_generators_alone():
    seed_step(0, 0, 0, 0)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_step(0, 0, 0, 0)
    _ = SeededSamples(Draws())[(1, 99)]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_positions_and_ranks_have_their_own_seeds():
    keys = {(rank, index, seed) for rank in range(2) for index, seed in PositionedSampler([5, 5, 5], 0, rank)}
    assert len({seed for _, _, seed in keys}) == 6  # a repeated sample is augmented anew each time


def test_hash_is_stable():
    """Runs resumed with another version of Python must draw the same numbers."""
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3) != derive_seed(1, 3, 2)
    assert 0 <= derive_seed(-1) < 2**63


class Stream(IterableDataset):
    transform = None

    def __iter__(self):
        for i in range(6):
            yield np.full((1, 2, 2), i, dtype=np.uint8), i


def test_a_stream_is_read_up_to_the_position():
    loader = create_loader(
        Stream(),
        (1, 2, 2),
        2,
        is_training=True,
        num_workers=0,
        mean=(0.0,),
        std=(1 / 255,),
        device=torch.device("cpu"),
        no_aug=True,
        persistent_workers=False,
    )
    targets = [target.tolist() for _, target in TrainingOrder(loader, 0, 0).batches(0, 2)]
    assert targets == [[4, 5]]
