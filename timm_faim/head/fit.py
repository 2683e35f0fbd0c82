"""Heads in closed form from images: what fits them, and the second moments in front of them, in one pass each."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from timm_faim.moments import MapStatistics, Moments

from .closed_form import fit_from_statistics_
from .head import FAIMHead
from .margin import faim_heads
from .statistics import HeadStatistics
from .tap import layer_inputs, pooled

_logger = logging.getLogger(__name__)


def fitted_features(head: FAIMHead, x: Tensor) -> Tensor:
    """What the moments are taken of: on the indicatrix, which the fit itself decides, the features as they come."""
    return x if head.center is not None else head.embed(x)


@torch.no_grad()
def fit_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    shrinkage: float = 0.3,
    device: torch.device | None = None,
    share: float = 0.0,
) -> nn.Module:
    """Set every FAIM head of ``model``, in place and in closed form, from (images [B, ...], class indices [B]).

    A head alone is such a model, of features [B, D]: ``fit_(head, [(features, targets)])``.

    The model runs in eval mode and is left in its modes. In an initialised process group the moments are summed over
    the ranks, whether each reads its own shard or all read everything (the result is a ratio of sums); what is wrong
    with the data of one rank raises on all of them. Inputs [B, N, D] of a head (token heads) are averaged over the
    tokens; a head that eval mode does not reach keeps its start, with a warning. Second moments of maps that nothing
    has set yet are fitted first, from the first 512 images, for which the batches are read twice.

    Args:
        model: changed in place.
        batches: of images and class indices.
        shrinkage: of the covariance within classes, in (0, 1].
        device: where the images go (default: where the model is).
        share: strength in [0, 100] at which prototypes of few images are shared with look-alikes; see
            :func:`timm_faim.head.sharing.share_prototypes`.

    Returns:
        The model.

    Raises:
        ValueError: a model without FAIM heads, soft targets, no batches, targets outside the classes, features that
            are not finite, and as :func:`fit_from_statistics_`; batches that can be read only once where they must be
            twice.
    """
    heads = faim_heads(model)
    if not heads:
        raise ValueError("the model has no FAIM head to fit; create it under its faim_ name")
    forward = None if device is None else lambda images: model(images.to(device))
    fit_moments_(model, batches, forward)
    stats = {name: HeadStatistics(head) for name, head in heads.items()}

    def add(inputs: dict[str, Tensor], targets: Tensor) -> None:
        for name, x in inputs.items():
            x = pooled(x, heads[name].in_features)
            stats[name].update(fitted_features(heads[name], x), targets.to(x.device))

    _add_all(layer_inputs(model, heads, batches, forward), add, stats.values())
    reached = [name for name in heads if stats[name].counts_C.any()]
    for name, head in heads.items():
        if reached and name not in reached:
            _logger.warning(f"head {name!r} is not reached in eval mode and keeps its start")
            continue
        fit_from_statistics_(head, stats[name], shrinkage, share)
    return model


def fit_moments_(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Any]],
    forward: Callable[[Tensor], Any] | None = None,
    images: int = 512,
) -> None:
    """Set the projections of second moments that nothing has set yet, from the first ``images`` of the batches.

    Raises:
        ValueError: batches that can be read only once; constant maps or such that are not finite.
    """
    moments = {name: m for name, m in model.named_modules() if isinstance(m, Moments) and not m.is_fitted}
    if not moments:
        return
    if iter(batches) is batches:
        raise ValueError("second moments are fitted before the head, from the same images: give batches that can be "
                         "read twice (a DataLoader or a list)")  # fmt: skip
    stats = {name: MapStatistics(m) for name, m in moments.items()}

    def first() -> Iterator[tuple[Tensor, Any]]:
        seen = 0
        for batch in batches:
            if seen >= images:
                return
            seen += len(batch[0])
            yield batch

    def add(inputs: dict[str, Tensor], _: Any) -> None:
        for name, x in inputs.items():
            stats[name].update(x)

    _add_all(layer_inputs(model, moments, first(), forward), add, stats.values())
    for name, m in moments.items():
        m.fit_(stats[name])


def _add_all(seen: Iterable[tuple[dict[str, Tensor], Any]], add: Callable[..., None], sums: Iterable[Any]) -> None:
    """Add what layers see to sums, and those over the ranks; what one rank raises is raised on all of them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    problem: str | None = None
    for inputs, rest in seen:
        try:
            add(inputs, rest)
        except ValueError as e:
            if not distributed:
                raise
            problem = problem or str(e)  # the other ranks may wait in this one's forward passes: go on with them
    if distributed:
        _raise_together(problem)
        for each in sums:
            each.all_reduce()


def _raise_together(problem: str | None) -> None:
    """Raise the first rank's problem on every rank; a collective call."""
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for rank, found in enumerate(problems):
        if found is not None:
            raise ValueError(f"{found} (process {rank})")
