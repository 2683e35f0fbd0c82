"""Checkpoints to resume from: run/checkpoints/checkpoint-<epochs>-<images of the next>, each whole or not there.

A checkpoint is written beside its final name, flushed to disk and renamed; its manifest lists every file with size and
checksum, so that one damaged later is recognised. Accelerate saves optimiser, gradient scaler and what is registered
with it, and under FSDP the sharded model; the weights of other models are stored without wrappers' prefixes, so that
any number of processes can load them. The format holds pickles and is for the machine that trains, not for sharing.
"""

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_custom_state
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.scheduler import PlateauLRScheduler
from timm.utils import ModelEmaV3

from timm_faim.run.errors import LOST_PROCESS, RankError, UserError, is_disk_full, is_lost_process, lost_worker
from timm_faim.run.files import flush_to_disk, rename
from timm_faim.run.weights import whole_tensors
from timm_faim.training.checkpoints import FOLDER, MANIFEST, crc32, newest_first, position, read_manifest

_MODEL = "model.safetensors"
# What a person may change between the parts of a run; other entries of an optimiser's groups may be state.
_CHANGEABLE = ("weight_decay", "lr_scale", "initial_lr", "momentum", "dampening", "nesterov", "betas", "eps")


@dataclass
class Progress:
    """Where a run stands. The sums are over all processes and the batches of the epoch so far."""

    epoch: int = 0  # number of finished epochs; the one in progress is the next
    step: int = 0  # batches of it that have been trained on, per process
    updates: int = 0
    loss_sum: float = 0.0
    hits: float = 0.0
    samples: float = 0.0
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # sums of the single losses, where there are several
    best: float | None = None  # of --eval-metric
    top: list[dict[str, Any]] = field(default_factory=list)  # epochs whose weights are kept, {epoch, metric}; 0: start

    def lay_out(self, before: dict[str, int], now: dict[str, int], batches: int) -> None:
        """Convert the position from one layout (processes, batch_size, grad_accum_steps, images) to another.

        Args:
            before: layout of the run that made the checkpoint.
            now: layout of this run.
            batches: batches an epoch of each process now.
        """
        if before == now:
            return
        images = self.step * before["processes"] * before["batch_size"]
        accum = now["grad_accum_steps"]
        self.step = min(images // (now["processes"] * now["batch_size"]), batches) // accum * accum
        self.updates = self.epoch * -(-batches // accum) + self.step // accum

    def start_at(self, epoch: int, updates_per_epoch: int) -> None:
        """Stand where a person chose, after `epoch` epochs."""
        self.epoch = epoch - 1
        self.end_epoch()
        self.updates = epoch * updates_per_epoch
        self.top = [entry for entry in self.top if entry["epoch"] <= epoch]
        if self.best is not None:
            self.best = self.top[0]["metric"] if self.top else None

    def end_epoch(self) -> None:
        """Stand at the beginning of the next epoch."""
        self.epoch += 1
        self.step = 0
        self.loss_sum = self.hits = self.samples = self.seconds = 0.0
        self.parts = {}


class _PlateauState:
    """State of timm's plateau schedule: its counters are in a scheduler of torch, which timm's own state leaves out."""

    def __init__(self, scheduler: PlateauLRScheduler) -> None:
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        return {"counters": self.scheduler.lr_scheduler.state_dict(), "restore_lr": self.scheduler.restore_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.lr_scheduler.load_state_dict(state["counters"])
        self.scheduler.restore_lr = state["restore_lr"]


class Checkpointer:
    """Saves and loads the state of a run.

    Args:
        accelerator: has prepared the model and the optimiser.
        folder: the run folder, on a file system that all processes share.
        model: the bare trainable module, whose parameters the prepared one shares.
        optimizer: the prepared optimiser.
        layout: processes, batch_size, grad_accum_steps and number of training images of this run.
        scheduler: timm's schedule, or None. All but `plateau` are functions of epoch and update and have no state.
        ema: running average of the weights, or None.
        keep: number of checkpoints to keep, at least 1, beside the newest one at an epoch's end.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        model: torch.nn.Module,
        optimizer: Any,
        layout: dict[str, int],
        scheduler: Any = None,
        ema: ModelEmaV3 | None = None,
        keep: int = 2,
    ) -> None:
        self.accelerator, self.folder, self.model, self.ema, self.keep = accelerator, folder / FOLDER, model, ema, keep
        self.optimizer, self.layout, self.scheduler = optimizer, layout, scheduler
        if isinstance(scheduler, PlateauLRScheduler):
            accelerator.register_for_checkpointing(_PlateauState(scheduler))
        if ema is not None:
            accelerator.register_for_checkpointing(ema)
        if accelerator.distributed_type != DistributedType.FSDP:
            accelerator.register_save_state_pre_hook(self._save_weights)
            accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint (a collective call) and remove the oldest ones.

        Raises:
            RankError: it could not be written, for example for want of space; earlier checkpoints are untouched.
        """
        path = self.folder / self._name(progress)
        temporary = self.folder / f".{path.name}.tmp"
        if self.accelerator.is_main_process:
            for left_over in self.folder.glob(".*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            self.accelerator.save_state(str(temporary))
            if self.accelerator.num_processes > 1:
                save_file(whole_tensors(self._buffers()), temporary / self._rank_file())
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                self._publish(temporary, path, progress)
        except (OSError, RuntimeError, SafetensorError) as e:
            if lost_worker(e):  # not the checkpoint's fault
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            if is_lost_process(e):
                raise RankError(LOST_PROCESS) from e
            free = shutil.disk_usage(self.folder.parent).free / 2**20
            # torch reports a full disk as a file position that it did not expect.
            is_full = free < 1 or is_disk_full(e)
            reason = f"{os.strerror(errno.ENOSPC)} ({free:.1f} MiB free)" if is_full else " ".join(str(e).split())
            shutil.rmtree(temporary, ignore_errors=True)
            previous = newest_first(self.folder)
            kept = f"the last complete one is {previous[0]}" if previous else "there is no earlier one"
            mend = "Free some space and go" if is_full else "Go"
            raise RankError(f"cannot write checkpoint {path}: {reason}; {kept}. {mend} on with --resume auto") from e
        self.accelerator.wait_for_everyone()
        return path

    def load(self, path: Path, batches: int, with_optimizer: bool = True) -> Progress:
        """Load a verified checkpoint (a collective call).

        Args:
            path: the checkpoint.
            batches: batches an epoch of each process.
            with_optimizer: False loads weights and progress alone.

        Raises:
            UserError: it belongs to another model or was made with other options.
        """
        manifest = read_manifest(path)
        if not with_optimizer and self.accelerator.distributed_type == DistributedType.FSDP:
            raise UserError(
                "--no-resume-opt does not go with FSDP, whose checkpoints are sharded. Start a new run "
                "from the weights in the run folder with --initial-checkpoint"
            )
        before, now = manifest.get("optimizer"), self._optimizer_name()
        if with_optimizer and before not in (None, now):
            raise UserError(
                f"checkpoint {path} holds the state of {before}, and this run has {now}. Resume with the "
                "--opt it was made with, or without that state: --no-resume-opt"
            )
        kept = [{key: group[key] for key in _CHANGEABLE if key in group} for group in self.optimizer.param_groups]
        try:
            if with_optimizer:
                self.accelerator.load_state(str(path))
                for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
                    group.update(settings)
            else:
                self._load_weights([], str(path))
                if self.ema is not None:
                    registered = self.accelerator._custom_objects
                    load_custom_state(self.ema, str(path), next(n for n, o in enumerate(registered) if o is self.ema))
            rank_file = path / self._rank_file()
            if rank_file.exists():
                stored = load_file(rank_file)
                for name, buffer in self._buffers().items():
                    buffer.copy_(stored[name])
            progress = _read_progress(manifest)
        except (RuntimeError, ValueError, KeyError, TypeError, FileNotFoundError) as e:
            raise UserError(
                f"checkpoint {path} does not fit this run: {' '.join(str(e).split())[:300]}. Resume with "
                "the model and options it was made with, or start anew without --resume"
            ) from e
        progress.lay_out(manifest["layout"], self.layout, batches)
        self.place_schedule(progress)
        self.accelerator.wait_for_everyone()
        return progress

    def place_schedule(self, progress: Progress) -> None:
        """Set the learning rates for where the run stands."""
        if self.scheduler is None:
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * group["lr_scale"]
        elif not isinstance(self.scheduler, PlateauLRScheduler):
            if progress.epoch:
                self.scheduler.step(progress.epoch)
            self.scheduler.step_update(progress.updates)

    def set_later_aside(self, progress: Progress) -> list[str]:
        """Rename checkpoints of later positions, so that they are not taken for the continuation; returns their names.

        For the main process, when a run goes on from before its newest checkpoint.
        """
        here = position(self.folder / self._name(progress))
        later = [path for path in newest_first(self.folder) if position(path) > here]
        for path in later:
            aside = path.with_name(f"superseded-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            rename(path, aside)
        return [path.name for path in later]

    def _optimizer_name(self) -> str:
        return type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__

    def _name(self, progress: Progress) -> str:
        # Images, not updates: their number does not depend on how many processes share them.
        images = progress.step * self.layout["processes"] * self.layout["batch_size"]
        return f"checkpoint-{progress.epoch:04d}-{images:08d}"

    def _publish(self, temporary: Path, path: Path, progress: Progress) -> None:
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        manifest = {
            "progress": asdict(progress),
            "layout": self.layout,
            "optimizer": self._optimizer_name(),
            "versions": {name: version(name) for name in ("torch", "timm", "accelerate")},
            "files": {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "crc32": crc32(p)} for p in files},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*files, temporary / MANIFEST):
            flush_to_disk(file)
        if path.exists():  # a damaged one, which resuming has passed over
            shutil.rmtree(path)
        rename(temporary, path)
        checkpoints = newest_first(self.folder)
        at_an_end = [p for p in checkpoints if position(p)[1] == 0][:1]  # to go back to if the ones within are no good
        for old in (p for p in checkpoints[self.keep :] if p not in at_an_end):
            hidden = old.with_name(f".{old.name}.tmp")  # no half-removed checkpoint under a checkpoint's name
            rename(old, hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def _save_weights(self, models: list, weights: list, folder: str) -> None:
        weights.clear()  # Accelerate's copy, with the prefixes of wrappers
        if self.accelerator.is_main_process:
            save_file(whole_tensors(self.model.state_dict()), Path(folder, _MODEL))

    def _load_weights(self, models: list, folder: str) -> None:
        models.clear()
        self.model.load_state_dict(load_file(Path(folder, _MODEL)))

    def _buffers(self) -> dict[str, torch.Tensor]:
        """Buffers of the model and its average, which differ between processes (batch norm statistics)."""
        modules = [("model", self.model)] + ([("ema", self.ema)] if self.ema is not None else [])
        buffers = {}
        for kind, module in modules:
            parameters = dict(module.named_parameters())
            buffers |= {
                f"{kind}.{name}": tensor for name, tensor in module.state_dict().items() if name not in parameters
            }
        return buffers

    def _rank_file(self) -> str:
        return f"buffers_{self.accelerator.process_index}.safetensors"


def _read_progress(manifest: dict[str, Any]) -> Progress:
    stored = dict(manifest["progress"])
    if "kept" in stored:  # of an earlier version, which counted the epochs whose weights are kept from 0
        stored["top"] = [entry | {"epoch": entry["epoch"] + 1} for entry in stored.pop("kept")]
    return Progress(**stored)
