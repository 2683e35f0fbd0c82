"""--dry-run: two updates and one validation batch, and what the run would do."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from timm_faim.report.predictions import evaluate
from timm_faim.training.loop import Training, train_one_epoch
from timm_faim.training.optimiser import sizes_of_parts


class _Beginning:
    """The first batches of a loader or of an epoch's order."""

    def __init__(self, whole: Any, count: int) -> None:
        self.whole, self.count = whole, min(count, len(whole))
        self.sampler = None

    def batches(self, epoch: int, start: int) -> Iterator:
        return islice(self.whole.batches(epoch, start), self.count)

    def __iter__(self) -> Iterator:
        return islice(iter(self.whole), self.count)

    def __len__(self) -> int:
        return self.count


def dry_run(run: Training, val_loader: Any, epochs: int, log: Callable) -> None:
    """Make two updates, evaluate one batch, and print the plan with time and memory; nothing is written.

    Args:
        run: what the training would work with; its weights are changed.
        val_loader: validation batches, or None.
        epochs: length of the run.
        log: print of the main process.

    Raises:
        RankError: what training raises, for example for a loss that is not finite.
    """
    options, accelerator, model = run.options, run.accelerator, run.model
    batches, updates = len(run.order), run.updates_per_epoch
    per_update = options.run.batch_size * options.optimiser.grad_accum_steps * accelerator.num_processes
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained")
    log(
        f"updates: {epochs} epochs of {updates} updates of {per_update} images ({batches} batches a process); "
        f"{options.optimiser.opt}, {options.schedule.sched} schedule"
    )
    for part, count in sizes_of_parts(run.optimizer).items():
        rates = sorted(
            {group["initial_lr"] * group["lr_scale"] for group in run.optimizer.param_groups if group["part"] == part}
        )
        span = f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}"
        log(f"  {part}: {count:,} parameters, highest learning rate {span}")

    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for name in ("first", "second"):
        run.progress.step = run.progress.updates = 0
        beginning = _Beginning(run.order, options.optimiser.grad_accum_steps)
        trial = train_one_epoch(replace(run, order=beginning, checkpointer=None))
        run.progress.end_epoch()
        log(f"{name} update: loss {trial['loss']:.4f}, {trial['seconds']:.2f} s")
    log(f"memory of training: {_peak_memory(device)}")
    if val_loader is not None:
        metrics = evaluate(
            run.task.get_eval_model(),
            _Beginning(val_loader, 1),
            accelerator,
            run.task.create_evaluator,
            **options.reading,
        )
        log(f"validation batch: loss {metrics['loss']:.4f}")
    log(f"about {trial['seconds'] * updates * epochs / 60:.1f} minutes for the updates of the run, loading included")


def _peak_memory(device: torch.device) -> str:
    """Most memory used so far, of the device, or of the process on a CPU."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} of {total / 2**30:.0f} GiB on {device}"
    try:
        import resource  # not on Windows
    except ImportError:
        return "not known here"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.2f} GiB in this process"
