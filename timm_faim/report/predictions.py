"""The loop over the validation images, and the numbers of an epoch from it; evaluation.py looks at single images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import ClassificationEvaluator, evaluation_sample_limit

from timm_faim.images.checked import UNREADABLE


def predictions(
    model: torch.nn.Module,
    loader: Any,
    accelerator: Accelerator,
    *,
    skip_unreadable: bool = False,
    channels_last: bool = False,
    flips: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Logits [B, C], targets [B, ...] and places [B] among this process's images, batch by batch; each image once.

    Left out are the repetitions with which timm's sampler makes the processes even, after the forward pass that keeps
    them in step, and with --skip-unreadable the images that could not be read.

    Args:
        model: gives logits [B, C], or a tuple that begins with them; left in eval mode.
        loader: timm's validation loader.
        accelerator: where and in which precision to run.
        skip_unreadable: leave out images that could not be read.
        channels_last: memory layout of the images.
        flips: average the logits of each image and its mirror image.
    """
    model.eval()
    limit, seen = evaluation_sample_limit(loader), 0
    for images, target in loader:
        if channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            outputs = [model(each) for each in ((images, images.flip(-1)) if flips else (images,))]
        outputs = [each[0] if isinstance(each, (tuple, list)) else each for each in outputs]
        output = torch.stack(outputs).mean(0) if flips else outputs[0]
        count = len(target) if limit is None else max(0, min(len(target), limit - seen))
        output, target = output[:count], target[:count]
        place = torch.arange(seen, seen + count, device=target.device)
        seen += count
        if skip_unreadable:
            is_read = target != UNREADABLE
            is_read = is_read if target.ndim == 1 else is_read.any(1)
            output, target, place = output[is_read], target[is_read], place[is_read]
        yield output, target, place


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Any,
    accelerator: Accelerator,
    create_evaluator: Callable | None = None,
    **options: bool,
) -> dict[str, Any]:
    """Loss and accuracy over the images of `predictions`, whose arguments these are; a collective call.

    Args:
        create_evaluator: timm's evaluator of the task; None is single-label classification.
        **options: those of `predictions`.

    Returns:
        `loss`, `top1`, `top5` (per cent; of a multi-label task what timm's evaluator gives) and `samples`, the number
        of images counted, over all processes.
    """
    evaluator = (create_evaluator or partial(ClassificationEvaluator, accelerator.device))()
    for output, target, _ in predictions(model, loader, accelerator, **options):
        evaluator.update(output, target)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    metrics["samples"] = int(accelerator.reduce(evaluator.counts[0], "sum"))
    return metrics
