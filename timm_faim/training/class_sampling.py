"""Batches of P classes with K images each (Hermans et al. 2017), for losses that compare images of a class, or of
classes drawn equally often (K = 1), for classes of unequal size."""

from collections.abc import Iterator, Sequence

import numpy as np
from accelerate import Accelerator

from timm_faim.images.datasets import TrainingData, targets_of
from timm_faim.run.common import RunOptions
from timm_faim.run.errors import UserError
from timm_faim.training.contrastive import ContrastiveOptions


class _Deck:
    """Deals cards in random order, each as often as the others: a new shuffle when all are dealt."""

    def __init__(self, cards: Sequence[int] | np.ndarray, generator: np.random.Generator) -> None:
        self.cards, self.generator = np.asarray(cards), generator
        self.rest = self.cards[:0]

    def deal(self, count: int) -> np.ndarray:
        """`count` cards, all different unless there are fewer."""
        hand, self.rest = self.rest[:count], self.rest[count:]
        while len(hand) < count:
            shuffled = self.generator.permutation(self.cards)
            new = shuffled[~np.isin(shuffled, hand)] if count <= len(self.cards) else shuffled
            new = new[: count - len(hand)]
            self.rest = shuffled[~np.isin(shuffled, new)]
            hand = np.concatenate([hand, new])
        return hand


class ClassSampler:
    """Indices of this process's batches, each of P = batch_size / K classes with K images each.

    In one step no class comes in two processes; with K = 1 this and different classes in a batch hold only where there
    are classes enough. Over the steps all classes come equally often, and so do all images of a class; one with fewer
    than K images repeats some within the batch. An epoch has as many batches as without.

    Args:
        targets: class of each image.
        batch_size: images of a batch, per process.
        samples_per_class: K.
        processes: number of processes.
        rank: number of this process.
        seed: the same in every process.

    Raises:
        UserError: a batch that is no multiple of K, fewer classes than one step takes with K > 1, or too few images for
            a step.
    """

    def __init__(
        self, targets: Sequence[int], batch_size: int, samples_per_class: int, processes: int, rank: int, seed: int
    ) -> None:
        targets = np.asarray(targets)
        self.images = {int(c): np.flatnonzero(targets == c) for c in np.unique(targets)}
        self.batch_size, self.samples_per_class = batch_size, samples_per_class
        self.processes, self.rank, self.seed, self.epoch = processes, rank, seed, 0
        if batch_size % samples_per_class:
            raise UserError(f"--samples-per-class {samples_per_class} must divide --batch-size {batch_size}")
        self.classes = batch_size // samples_per_class  # P
        if samples_per_class > 1 and self.classes * processes > len(self.images):
            raise UserError(
                f"--batch-size {batch_size} with --samples-per-class {samples_per_class} takes "
                f"{self.classes * processes} classes a step, and the data have {len(self.images)}. Choose "
                "a smaller --batch-size or more --samples-per-class"
            )
        self.steps = -(-len(targets) // processes) // batch_size  # as with timm's samplers
        if not self.steps:
            raise UserError(
                f"--batch-size {batch_size} is larger than the training data ({len(targets)} images for "
                f"{processes} process(es)). Choose a smaller --batch-size"
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch from now on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))  # the same in every process
        classes = _Deck(list(self.images), generator)
        decks = {c: _Deck(images, generator) for c, images in self.images.items()}
        for _ in range(self.steps):
            hands = [decks[c].deal(self.samples_per_class) for c in classes.deal(self.classes * self.processes)]
            mine = hands[self.rank * self.classes : (self.rank + 1) * self.classes]
            yield from np.concatenate(mine).tolist()

    def __len__(self) -> int:
        return self.steps * self.batch_size


def build_class_sampler(
    options: ContrastiveOptions, run: RunOptions, data: TrainingData, accelerator: Accelerator
) -> ClassSampler | None:
    """The sampler of --samples-per-class, or None without.

    Raises:
        UserError: see `ClassSampler`; data that do not tell their classes without being read.
    """
    if not options.samples_per_class:
        return None
    targets = targets_of(data.train)
    if targets is None:
        raise UserError(
            "--samples-per-class needs to know the class of every image, which these data do not "
            "tell. Leave it out and compare views of images: --views 2"
        )
    return ClassSampler(
        targets,
        run.batch_size,
        options.samples_per_class,
        accelerator.num_processes,
        accelerator.process_index,
        run.seed,
    )
