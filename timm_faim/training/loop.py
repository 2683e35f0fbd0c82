"""One epoch of training and one evaluation.

Accelerate prepares the model and the optimiser only. timm's loader prefetches one batch ahead, which puts
Accelerate's own accumulation out of step, so that the boundaries of accumulation are set here by hand.
"""
import argparse
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.models import model_parameters
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import AverageMeter, ModelEmaV3, dispatch_clip_grad
from tqdm import tqdm

from timm_faim.training.checkpoint import save_batch
from timm_faim.training.data import UNREADABLE
from timm_faim.training.errors import RankError


class LateReader:
    """Hands each step's loss and hit count to `consume` one step late, so that the device never waits for the host.

    The two numbers are copied to pinned memory as soon as the device has them. By the time they are read the next
    step has been launched; waiting for the copy's own event does not wait for that step.
    """

    def __init__(self, consume: Callable[..., None]) -> None:
        self.consume = consume
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None, tuple] | None = None

    def push(self, loss: torch.Tensor, hits: torch.Tensor, *context: Any) -> None:
        """Queue this step's scalars; consume those of the step before as `consume(loss, hits, *context)`."""
        numbers = torch.stack([loss.detach().double(), hits.double()])
        event = None
        if numbers.is_cuda:
            host = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
            numbers, event = host.copy_(numbers, non_blocking=True), torch.cuda.Event()
            event.record()
        previous, self.pending = self.pending, (numbers, event, context)
        self._read(previous)

    def flush(self) -> None:
        """Consume the last step."""
        previous, self.pending = self.pending, None
        self._read(previous)

    def _read(self, step: tuple[torch.Tensor, torch.cuda.Event | None, tuple] | None) -> None:
        if step is None:
            return
        numbers, event, context = step
        if event is not None:
            event.synchronize()
        self.consume(*numbers.tolist(), *context)


def train_one_epoch(
        epoch: int, model: torch.nn.Module, loader: Any, criterion: torch.nn.Module, optimizer: Any, scheduler: Any,
        accelerator: Accelerator, args: argparse.Namespace, run_folder: Path,
        mixup: Callable | None = None, ema: ModelEmaV3 | None = None,
) -> dict[str, float]:
    """Train on every batch once.

    Args:
        epoch: number from 0.
        model: the prepared model; returns logits [B, C].
        loader: timm's loader of (images [B, channels, H, W], target [B]).
        criterion: loss of (logits, target).
        optimizer: the prepared optimiser.
        scheduler: timm's schedule, or None.
        accelerator: where and in which precision to run.
        args: options (accumulation, clipping, logging).
        run_folder: where the batch of a non-finite loss is saved.
        mixup: timm's Mixup, applied to (images, target).
        ema: running average of the weights, updated after every update.

    Returns:
        `loss`, `top1` (per cent; under mixup against the label of the larger share), `images_per_s`, `seconds`,
        over all processes.

    Raises:
        RankError: the loss of a step was not finite (its batch is saved), or a label lies outside the classes.
    """
    model.train()
    batches, accum = len(loader), args.grad_accum_steps
    updates = epoch * -(-batches // accum)
    losses, top1 = AverageMeter(), AverageMeter()
    start, images_seen = time.perf_counter(), 0
    bar = tqdm(total=batches, desc=f"epoch {epoch + 1}", unit="batch", leave=False,
               disable=None if accelerator.is_main_process else True)

    def record(loss: float, hits: float, step: int, images: torch.Tensor, target: torch.Tensor) -> None:
        if not math.isfinite(loss):
            stop_at_bad_loss(loss, epoch, step, images, target, run_folder, accelerator)
        losses.update(loss, len(images))
        top1.update(100 * hits / len(images), len(images))
        bar.update()
        if (step + 1) % args.log_interval == 0 or step + 1 == batches:
            rate = images_seen * accelerator.num_processes / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {losses.avg:.3f}, top-1 {top1.avg:.1f} %, {rate:.0f} images/s")

    num_classes = getattr(accelerator.unwrap_model(model, keep_torch_compile=False), "num_classes", math.inf)
    reader = LateReader(record)
    optimizer.zero_grad()
    for step, (images, target) in enumerate(loader):
        # The last window of an epoch may be shorter than the others; it still makes an update, over its own size.
        window_start = step - step % accum
        window = min(accum, batches - window_start)
        is_update = step + 1 == window_start + window
        if not target.is_cuda or step == 0:  # on a GPU the look would wait for the device
            check_labels(target, num_classes)
        if mixup is not None:
            images, target = mixup(images, target)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)

        with nullcontext() if is_update else accelerator.no_sync(model):
            with accelerator.autocast():
                output = model(images)
                loss = criterion(output, target)
            accelerator.backward(loss / window)
        if is_update:
            if args.clip_grad is not None:
                accelerator.unscale_gradients(optimizer)
                dispatch_clip_grad(model_parameters(model, exclude_head="agc" in args.clip_mode),
                                   value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            if ema is not None:
                ema.update(accelerator.unwrap_model(model, keep_torch_compile=False), step=updates)
            if scheduler is not None:
                scheduler.step_update(updates)

        images_seen += len(images)
        labels = target if target.ndim == 1 else target.argmax(1)
        reader.push(loss, (output.detach().argmax(1) == labels).sum(), step, images, target)
    reader.flush()
    bar.close()

    sums = torch.tensor([losses.sum, top1.sum, losses.count], device=accelerator.device)
    loss_sum, hit_sum, count = accelerator.reduce(sums, "sum").tolist()
    seconds = time.perf_counter() - start
    return {"loss": loss_sum / count, "top1": hit_sum / count, "images_per_s": round(count / seconds, 1),
            "seconds": round(seconds, 2)}


def check_labels(target: torch.Tensor, num_classes: float) -> None:
    """Raise `RankError` where class indices [B] lie outside the model's classes: data sets that list no classes."""
    if target.ndim == 1 and not (int(target.min()) >= 0 and int(target.max()) < num_classes):
        raise RankError(f"the data have labels from {int(target.min())} to {int(target.max())}, outside the "
                        f"{num_classes} classes of the model. Give --num-classes {int(target.max()) + 1} or mend them")


def stop_at_bad_loss(
        loss: float, epoch: int, step: int, images: torch.Tensor, target: torch.Tensor, run_folder: Path,
        accelerator: Accelerator,
) -> None:
    """Save the batch and end this process; a launcher then ends the others."""
    rank = f"_rank{accelerator.process_index}" if accelerator.num_processes > 1 else ""
    path = run_folder / f"nan_batch{rank}.safetensors"
    save_batch(path, images, target)
    raise RankError(f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}. Its batch is saved as {path}; "
                    "checkpoints of earlier epochs are kept. Try a lower --lr, a longer --warmup-epochs, --clip-grad, "
                    "or --amp-dtype bfloat16")


@torch.inference_mode()
def evaluate(model: torch.nn.Module, loader: Any, accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """Cross entropy and accuracy, every image counted exactly once on any number of processes.

    timm's sampler repeats images at the end to make the processes even; the evaluator leaves the repetitions out.

    Returns:
        `loss`, `top1`, `top5` (per cent) and `samples`, the number of images counted, over all processes.
    """
    model.eval()
    limit = evaluation_sample_limit(loader)
    # Unreadable images are left out here by hand, which would put the evaluator's own count of images off.
    evaluator = ClassificationEvaluator(accelerator.device, max_samples=None if args.skip_unreadable else limit)
    seen = 0
    for images, target in loader:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            output = model(images)
        if args.skip_unreadable:
            real = len(target) if limit is None else max(0, min(len(target), limit - seen))
            seen += real
            output, target = output[:real], target[:real]
            output, target = output[target != UNREADABLE], target[target != UNREADABLE]
        evaluator.update(output, target)
    metrics = dict(evaluator.compute(distributed=accelerator.num_processes > 1))
    metrics["samples"] = int(accelerator.reduce(evaluator.counts[0], "sum"))
    return metrics
