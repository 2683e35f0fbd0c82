"""Training of the head alone on features that are computed once (--cache-features): seconds instead of hours.

The frozen backbone sees every image once, or `--cache-views` times augmented; the features that it hands to its
classifier stay on the device and take the images' place in the ordinary training loop.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import evaluation_sample_limit
from tqdm import tqdm

from timm_faim.head.tap import layer_inputs
from timm_faim.run.errors import UserError
from timm_faim.run.gather import gather_rows
from timm_faim.training.options import Options
from timm_faim.training.sampling import TrainingOrder


class FeatureLoader:
    """Batches (features [B, D], target [B]) of tensors on the device, with the attributes of timm's loaders.

    Args:
        features: [N, D] of all images, the same in every process.
        target: [N].
        batch_size: B, per process.
        accelerator: number and rank of the processes.
        is_training: shuffled, incomplete batches dropped; otherwise in order and every sample once.
    """

    def __init__(
        self, features: torch.Tensor, target: torch.Tensor, batch_size: int, accelerator: Accelerator, is_training: bool
    ) -> None:
        self.features, self.target, self.batch_size, self.is_training = features, target, batch_size, is_training
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.dataset, self.sampler = self, self
        self.permutation: torch.Tensor | None = None
        mine = range(self.rank, len(target), self.world)
        self.num_valid_samples = len(mine)
        if is_training and len(self) == 0:
            raise UserError(
                f"--batch-size {batch_size} is larger than the training data ({len(target)} features for "
                f"{self.world} process(es)). Choose a smaller --batch-size"
            )

    def order(self, seed: int, epoch: int) -> None:
        """Shuffle for an epoch, the same in every process."""
        self.permutation = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(seed + epoch))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.batches(0)

    def batches(self, start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches from number `start` on."""
        everything = torch.arange(len(self.target)) if self.permutation is None else self.permutation
        mine = everything[self.rank :: self.world].to(self.target.device)
        for batch in range(start, len(self)):
            chosen = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.features[chosen], self.target[chosen]

    def __len__(self) -> int:
        if self.is_training:
            return len(self.target) // self.world // self.batch_size
        return -(-len(range(self.rank, len(self.target), self.world)) // self.batch_size)


class FeatureOrder:
    """`TrainingOrder` of a `FeatureLoader`."""

    def __init__(self, loader: FeatureLoader, seed: int) -> None:
        self.loader, self.seed = loader, seed

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of an epoch from number `start` on."""
        self.loader.order(self.seed, epoch)
        return self.loader.batches(start)

    def __len__(self) -> int:
        return len(self.loader)


def only_classifier(model: torch.nn.Module) -> torch.nn.Module:
    """The one classifier of a model.

    Raises:
        UserError: the model has several.
    """
    classifier = model.get_classifier()
    if isinstance(classifier, (tuple, list)):
        raise UserError(
            "--cache-features trains one classifier on the features that go into it, and this model has "
            f"{len(classifier)}. Use --head-only, which works with any model"
        )
    return classifier


def cache_features(
    options: Options,
    model: torch.nn.Module,
    train_order: TrainingOrder,
    clean_loader: Any,
    val_loader: Any,
    accelerator: Accelerator,
) -> tuple[FeatureOrder, FeatureLoader | None]:
    """Compute the classifier's inputs once.

    Args:
        options: --cache-views, batch sizes, seed.
        model: the model, on the device.
        train_order: augmented training images, used with --cache-views.
        clean_loader: all training images once, unaugmented, used without.
        val_loader: validation images, or None.
        accelerator: each process computes its share of the augmented views and of the validation features; all
            processes get everything.

    Returns:
        The order of training batches and the loader of validation batches, of features instead of images.
    """
    classifier, channels_last = only_classifier(model), options.model.channels_last
    if options.learning.cache_views:
        views = [
            _embed(model, classifier, train_order.batches(view), len(train_order), accelerator, channels_last)
            for view in range(options.learning.cache_views)
        ]
        features, target = (gather_rows(torch.cat(parts), accelerator) for parts in zip(*views, strict=True))
    else:
        features, target = _embed(model, classifier, clean_loader, len(clean_loader), accelerator, channels_last)
    order = FeatureOrder(FeatureLoader(features, target, options.run.batch_size, accelerator, True), options.run.seed)
    if val_loader is None:
        return order, None
    features, target = _embed(model, classifier, val_loader, len(val_loader), accelerator, channels_last)
    limit = evaluation_sample_limit(val_loader)
    features, target = (gather_rows(t[:limit], accelerator) for t in (features, target))
    batch_size = options.run.validation_batch_size or options.run.batch_size
    return order, FeatureLoader(features, target, batch_size, accelerator, False)


def _embed(
    model: torch.nn.Module,
    classifier: torch.nn.Module,
    batches: Any,
    count: int,
    accelerator: Accelerator,
    channels_last: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    def forward(images: torch.Tensor) -> None:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            model(images)

    features, targets = [], []
    bar = tqdm(
        batches,
        desc="features",
        total=count,
        unit="batch",
        leave=False,
        disable=None if accelerator.is_main_process else True,
    )
    for inputs, target in layer_inputs(model, {"classifier": classifier}, bar, forward):
        features.append(inputs["classifier"].float())
        targets.append(target)
    return torch.cat(features), torch.cat(targets)
