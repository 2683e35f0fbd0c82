"""Mean features of new classes at every head, from images.

Shapes: B images, K classes, D features.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_faim.head import FAIMHead
from timm_faim.head.fit import fitted_features
from timm_faim.head.tap import layer_inputs, pooled

IMAGES = 64  # of a tensor that go through the model at a time


@dataclass(frozen=True)
class Means:
    """Mean features [K, D] by head in float64, as a closed-form fit takes them, and the images of each class [K]."""

    features: dict[str, Tensor]
    counts: list[int]


def mean_features(
    model: nn.Module, heads: Mapping[str, FAIMHead], batches: Iterable[tuple[Tensor, Tensor]], names: Sequence[str]
) -> Means:
    """Run images through the model once.

    Args:
        model: left in its modes.
        heads: of the model, by name.
        batches: (images [B, ...], their classes [B]: places in ``names``; others are left out).
        names: of the classes.

    Raises:
        ValueError: a class without images, features that are not finite, a head that eval mode does not reach.
    """
    K = len(names)
    counts_K = torch.zeros(K, dtype=torch.int64)
    sums = {
        name: torch.zeros(K, head.in_features, dtype=torch.float64, device=head.mu.device)
        for name, head in heads.items()
    }
    for inputs, classes in layer_inputs(model, heads, batches):
        classes = classes.cpu()
        usable = (classes >= 0) & (classes < K)
        classes = classes[usable]
        counts_K += torch.bincount(classes, minlength=K)
        for name, head in heads.items():
            if name not in inputs:
                raise ValueError(
                    f"head {name!r} is not reached in eval mode, so that it sees no features of new classes"
                )
            x_BD = fitted_features(head, pooled(inputs[name], head.in_features))
            x_BD = x_BD[usable.to(x_BD.device)].double()
            if len(bad := (~x_BD.isfinite().all(1)).nonzero()):
                wrong = names[classes[bad[0, 0].cpu()]]
                raise ValueError(f"the features of an image of class {wrong!r} are not finite; check the image, and "
                                 "the weights of the model")  # fmt: skip
            sums[name].index_add_(0, classes.to(x_BD.device), x_BD)
    if without := [name for name, count in zip(names, counts_K.tolist(), strict=True) if not count]:
        raise ValueError(f"class {without[0]!r} has no images; give at least one")
    return Means(
        {name: sum_KD / counts_K.to(sum_KD)[:, None] for name, sum_KD in sums.items()}, [int(n) for n in counts_K]
    )


def in_batches(images_by_name: Mapping[str, Tensor | Iterable[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, ...], places of their names [B]) of tensors [n, 3, H, W], or iterables of such.

    Raises:
        ValueError: images of another form.
    """
    for k, (name, images) in enumerate(images_by_name.items()):
        for batch in [images] if isinstance(images, Tensor) else images:
            if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
                found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
                raise ValueError(f"class {name!r}: images are tensors [n, 3, H, W] of floating-point numbers, as the "
                                 f"model takes them, or iterables of such, got {found}")  # fmt: skip
            for piece in batch.split(IMAGES):
                yield piece, torch.full((len(piece),), k)
