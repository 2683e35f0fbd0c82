"""One epoch of training.

Accelerate prepares the model and the optimiser only. timm's loader prefetches one batch ahead, which puts
Accelerate's own accumulation out of step, so that the boundaries of accumulation are set here by hand.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from tqdm import tqdm

from timm_faim.run.errors import RankError
from timm_faim.run.weights import save_batch
from timm_faim.training.freeze import classifier_parameters
from timm_faim.training.options import Options
from timm_faim.training.sampling import TrainingOrder, seed_step
from timm_faim.training.start import Pull, StartWeights
from timm_faim.training.state import Checkpointer, Progress


class StopRequest:
    """Remembers SIGTERM, with which machines that are taken back announce their end, and a closed terminal's SIGHUP."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Catch the signal from now on; a second one ends the process at once."""
        signal.signal(signal.SIGTERM, self._handle)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup goes on
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        if number != signal.SIGTERM:  # what is printed from now on has no terminal to go to
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                if os.isatty(stream):
                    os.dup2(nowhere, stream)


@dataclass
class Training:
    """What an epoch of training works with; `progress` is what it changes beside tensors."""

    options: Options
    accelerator: Accelerator
    model: torch.nn.Module  # bare and whole
    part: torch.nn.Module  # what of it trains: the model, or its classifier on cached features
    task: TrainingTask  # its trainable module is the prepared part
    optimizer: Any  # prepared
    order: TrainingOrder
    run_folder: Path | None  # None in a dry run, which writes nothing
    scheduler: Any = None
    mixup: Callable | None = None
    frozen: list[torch.nn.Module] = field(default_factory=list)  # kept in eval mode
    checkpointer: Checkpointer | None = None
    starts_fitted: bool = False  # with heads in closed form, which are evaluated as epoch 0
    start: StartWeights | None = None  # where something is kept of it
    pull: Pull | None = None  # towards the start, after each update
    refit: "Callable[[Training], None] | None" = None  # after the last epoch
    stop: StopRequest = field(default_factory=StopRequest)
    is_stopping: bool = False  # some process was asked to stop; the same on all of them
    progress: Progress = field(default_factory=Progress)

    @property
    def evaluated(self) -> torch.nn.Module:
        """What is evaluated and saved: the average of the weights where there is one."""
        return self.task.get_eval_model(ema=self.task.has_ema())

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps an epoch."""
        return -(-len(self.order) // self.options.optimiser.grad_accum_steps)

    def whole_state(self) -> dict[str, torch.Tensor]:
        """State dict of the whole model as evaluated, without the names of wrappers; a collective call under FSDP."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            state = self.accelerator.get_state_dict(self.task.get_trainable_module())
        else:
            state = unwrap_model(self.evaluated).state_dict()
        # The batch norms of further splits (--split-bn) serve in training only.
        state = {name: tensor for name, tensor in state.items() if ".aux_bn." not in name}
        if self.part is self.model:
            return state
        prefix = next(name for name, module in self.model.named_modules() if module is self.part)
        return self.model.state_dict() | {f"{prefix}.{name}": tensor for name, tensor in state.items()}


class LateReader:
    """Hands each step's numbers to `consume` one step late, so that the device never waits for the host.

    The numbers are copied to pinned memory as soon as the device has them. By the time they are read the next step has
    been launched; waiting for the copy's own event does not wait for that step.
    """

    def __init__(self, consume: Callable[..., None]) -> None:
        self.consume = consume
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None, tuple] | None = None

    def push(self, numbers: torch.Tensor, *context: Any) -> None:
        """Queue this step's numbers [N]; consume those of the step before as `consume([...], *context)`."""
        event = None
        if numbers.is_cuda:
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
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
        self.consume(numbers.tolist(), *context)


class _EpochRecord:
    """Adds the steps' numbers to the progress, shows them, stops at a bad loss; the same on every process."""

    def __init__(self, run: Training) -> None:
        self.run = run
        self.images_before, self.start = run.progress.samples, time.perf_counter()
        self.seconds_before = run.progress.seconds
        self.bar = tqdm(
            desc=f"epoch {run.progress.epoch + 1}",
            total=len(run.order),
            initial=run.progress.step,
            unit="batch",
            leave=False,
            disable=None if run.accelerator.is_main_process else True,
        )

    def consume(self, numbers: list[float], step: int, images: torch.Tensor, target: torch.Tensor) -> None:
        local_loss, loss_sum, hits, samples, stop, *parts = numbers
        run, progress = self.run, self.run.progress
        if not math.isfinite(loss_sum):
            stop_at_bad_loss(local_loss, step, images, target, run)
        progress.loss_sum += loss_sum
        progress.hits += hits
        progress.samples += samples
        for name, part_sum in zip(getattr(run.task, "part_names", ()), parts, strict=True):
            progress.parts[name] = progress.parts.get(name, 0.0) + part_sum
        run.is_stopping |= stop > 0
        self.bar.update()
        if (step + 1) % run.options.logging.log_interval == 0 or step + 1 == len(run.order):
            rate = (progress.samples - self.images_before) / (time.perf_counter() - self.start)
            self.bar.set_postfix_str(
                f"loss {progress.loss_sum / progress.samples:.3f}, top-1 "
                f"{100 * progress.hits / progress.samples:.1f} %, {rate:.0f} images/s"
            )

    def keep_time(self) -> None:
        self.run.progress.seconds = self.seconds_before + time.perf_counter() - self.start


def train_one_epoch(run: Training) -> dict[str, Any] | None:
    """Train on the batches of the epoch in progress, from where the progress stands.

    Returns:
        `loss`, `top1` (per cent; under mixup against the label of the larger share), `images_per_s`, `seconds`, over
        all processes, and each single loss where there are several; or None when it stopped before the end because a
        process was asked to, after a checkpoint.

    Raises:
        RankError: the loss of a step was not finite (its batch is saved), or a label lies outside the classes.
    """
    options, accelerator, task, optimizer = run.options, run.accelerator, run.task, run.optimizer
    model = task.get_trainable_module()
    progress, batches, accum = run.progress, len(run.order), options.optimiser.grad_accum_steps
    every = options.checkpoints.recovery_interval
    task.train()
    for module in run.frozen:
        module.eval()
    base_optimizer = getattr(optimizer, "optimizer", optimizer)
    second_order = getattr(base_optimizer, "is_second_order", False)
    num_classes = getattr(accelerator.unwrap_model(model, keep_torch_compile=False), "num_classes", math.inf)
    if run.mixup is not None:  # switched off it still makes the soft targets that the loss expects
        run.mixup.mixup_enabled = not options.mixing.mixup_off_epoch or progress.epoch < options.mixing.mixup_off_epoch

    clipped = list(model.parameters())
    if options.optimiser.clip_mode == "agc":  # timm's own exclusion of the head leaves out the last two parameters
        exempt = classifier_parameters(run.model)
        head = {id(p) for name, p in run.model.named_parameters() if name in exempt}
        clipped = [p for p in clipped if id(p) not in head]
    # of an epoch that began with other losses (an option has changed since) the single losses are not known
    has_parts = progress.step == 0 or set(progress.parts) == set(getattr(task, "part_names", ()))
    record = _EpochRecord(run)
    reader = LateReader(record.consume)
    optimizer.zero_grad()
    first = progress.step
    given = _told_last(run.order.batches(progress.epoch, first), getattr(run.order, "is_stream", False))
    for step, ((images, target), is_last) in enumerate(given, first):
        seed_step(options.run.seed, accelerator.process_index, progress.epoch, step)
        # The last window of an epoch may be shorter than the others; it still makes an update, over its own size.
        window_start = step - step % accum
        window = min(accum, batches - window_start)
        is_update = step + 1 == window_start + window or is_last
        if not target.is_cuda or step == first:  # on a GPU the look would wait for the device
            check_labels(target, num_classes)
        if run.mixup is not None:
            images, target = run.mixup(images, target)
        if options.model.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)

        with nullcontext() if is_update else accelerator.no_sync(model):
            with accelerator.autocast():
                result = task(images, target)
            accelerator.backward(result["loss"] / window, create_graph=second_order)
        if is_update:
            if (short := step + 1 - window_start) < window:  # a stream has ended before its promised length
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(window / short)
            if options.optimiser.clip_grad is not None:
                accelerator.unscale_gradients(optimizer)
                dispatch_clip_grad(clipped, value=options.optimiser.clip_grad, mode=options.optimiser.clip_mode)
            optimizer.step()
            if run.pull is not None and not getattr(optimizer, "step_was_skipped", False):
                run.pull.step(optimizer)
            optimizer.zero_grad()
            progress.updates += 1
            task.update_ema(step=progress.updates)
            if run.scheduler is not None:
                run.scheduler.step_update(progress.updates)

        reader.push(step_numbers(result, target, run), step, images, target)
        progress.step = step + 1
        if is_update and step + 1 < batches and (run.is_stopping or every and progress.updates % every == 0):
            reader.flush()
            record.keep_time()
            if run.checkpointer is not None:
                check_weights(run)
                run.checkpointer.save(progress)
            if run.is_stopping:
                record.bar.close()
                return None
    if hasattr(base_optimizer, "sync_lookahead"):
        base_optimizer.sync_lookahead()
    reader.flush()
    record.keep_time()
    record.bar.close()
    parts = {name: value / progress.samples for name, value in progress.parts.items() if has_parts}
    return {
        "loss": progress.loss_sum / progress.samples,
        **parts,
        "top1": 100 * progress.hits / progress.samples,
        "images_per_s": round(progress.samples / progress.seconds, 1),
        "seconds": round(progress.seconds, 2),
    }


def _told_last(batches: Iterable, is_stream: bool) -> Iterator[tuple[Any, bool]]:
    """Batches, each with whether it is known to be the last: a stream may end before its length, and is read ahead."""
    if not is_stream:
        yield from ((batch, False) for batch in batches)
        return
    batches = iter(batches)
    current = next(batches, None)
    while current is not None:
        following = next(batches, None)
        yield current, following is None
        current = following


def step_numbers(result: dict[str, Any], target: torch.Tensor, run: Training) -> torch.Tensor:
    """This process's loss, then summed over all processes: loss, hits, samples, requests to stop, each single loss of
    the task; float64 [5 + number of single losses]."""
    loss, output = result["loss"].detach().double(), result["output"].detach()
    output = output[0] if isinstance(output, (tuple, list)) else output
    if target.ndim == 2 and run.options.data.multi_label:
        hits = ((output > 0) == (target > 0.5)).double().mean(1).sum()
    else:
        labels = target if target.ndim == 1 else target.argmax(1)
        hits = (output.argmax(1) == labels).sum().double()
    count = len(target)
    # Filled on the device: a tensor made from numbers of the host would wait for the device.
    parts = [part.detach().double() * count for part in result.get("parts", {}).values()]
    sums = torch.stack(
        [loss * count, hits, torch.full_like(loss, count), torch.full_like(loss, run.stop.requested), *parts]
    )
    return torch.cat([loss[None], run.accelerator.reduce(sums, "sum")])


def check_weights(run: Training) -> None:
    """Raise `RankError` on every process where some weight is no number: before anything is saved from them."""
    module = run.accelerator.unwrap_model(run.task.get_trainable_module(), keep_torch_compile=False)
    finite = [torch.isfinite(_local(t)).all() for t in module.state_dict().values() if t.is_floating_point()]
    bad = run.accelerator.reduce((~torch.stack(finite)).sum().float(), "sum")
    if bad > 0:
        raise RankError(
            f"weights are not finite after update {run.progress.updates} (epoch {run.progress.epoch + 1}), "
            "and are not saved; earlier checkpoints are kept. Try a lower --lr, a longer --warmup-epochs, "
            "or --clip-grad"
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_labels(target: torch.Tensor, num_classes: float) -> None:
    """Raise `RankError` where class indices [B] lie outside the model's classes: data sets that list no classes."""
    if target.ndim == 1 and not (int(target.min()) >= 0 and int(target.max()) < num_classes):
        raise RankError(
            f"the data have labels from {int(target.min())} to {int(target.max())}, outside the "
            f"{num_classes} classes of the model. Give --num-classes {int(target.max()) + 1} or mend them"
        )


def stop_at_bad_loss(local_loss: float, step: int, images: torch.Tensor, target: torch.Tensor, run: Training) -> None:
    """Save the batch where the loss is not finite, and end all processes; each has seen the sum of the losses."""
    is_here = not math.isfinite(local_loss)
    where = "" if is_here else " It was met by another process;"
    if is_here and run.run_folder is not None:
        rank = f"_rank{run.accelerator.process_index}" if run.accelerator.num_processes > 1 else ""
        path = run.run_folder / f"nan_batch{rank}.safetensors"
        save_batch(path, images, target)
        where = f" Its batch is saved as {path};"
    run.accelerator.wait_for_everyone()  # none ends before the batches are saved: a launcher then ends the others
    raise RankError(
        f"the loss is {local_loss if is_here else math.nan} in epoch {run.progress.epoch + 1}, step "
        f"{step + 1}.{where} checkpoints of earlier epochs are kept. Try a lower --lr, a longer "
        "--warmup-epochs, --clip-grad, or --amp-dtype bfloat16"
    )
