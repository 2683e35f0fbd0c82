"""Checkpoints to resume from: whole or not there, damaged ones recognised."""

import json
import os
import shutil

import pytest
import torch
from accelerate import Accelerator
from runs import fresh_accelerator
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from timm_faim.run.errors import RankError, UserError
from timm_faim.training import state
from timm_faim.training.checkpoints import FOLDER, check_checkpoint, epochs_done, find_checkpoint
from timm_faim.training.state import Checkpointer, Progress

LAYOUT = {"processes": 1, "batch_size": 4, "grad_accum_steps": 1, "images": 20}


class Run:
    """A small model with batch norm, its optimiser, average and schedule."""

    def __init__(self, folder, sched="plateau", keep=2, seed=0):
        fresh_accelerator()
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        self.ema = ModelEmaV3(self.model, decay=0.5)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=sched, num_epochs=20, warmup_epochs=0, patience_epochs=1
        )
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.checkpointer = Checkpointer(
            self.accelerator, folder, self.model, self.optimizer, LAYOUT, self.scheduler, self.ema, keep
        )

    def step(self, number):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        self.prepared(x).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.scheduler.step(number + 1, metric=1.0)  # never better: the rate falls after the patience

    def everything(self):
        return [
            *self.model.state_dict().values(),
            *self.ema.state_dict().values(),
            torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64),
        ]


@pytest.mark.parametrize("sched", ["plateau", "cosine"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, sched):
    whole = Run(tmp_path, sched)
    for n in range(8):
        if n == 3:
            path = whole.checkpointer.save(Progress(epoch=n, updates=n, loss_sum=1 / 3, best=2 / 3))
        whole.step(n)
    resumed = Run(tmp_path, sched, seed=9)
    assert resumed.checkpointer.load(path, batches=5) == Progress(epoch=3, updates=3, loss_sum=1 / 3, best=2 / 3)
    for n in range(3, 8):
        resumed.step(n)
    assert all(torch.equal(a, b) for a, b in zip(whole.everything(), resumed.everything(), strict=True))


def test_weights_alone(tmp_path):
    first = Run(tmp_path)
    for n in range(3):
        first.step(n)
    path = first.checkpointer.save(Progress(epoch=1, updates=1))
    second = Run(tmp_path, seed=9)
    second.checkpointer.load(path, batches=5, with_optimizer=False)
    for a, b in ((first.model, second.model), (first.ema.module, second.ema.module)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(second.ema.module[0].weight, second.model[0].weight)
    assert not second.optimizer.state_dict()["state"]


def test_options_that_have_changed_take_effect(tmp_path):
    path = Run(tmp_path, "cosine").checkpointer.save(Progress(epoch=1, updates=1))
    second = Run(tmp_path, "cosine")
    changed = {"weight_decay": 0.7, "betas": (0.5, 0.6), "eps": 1e-3}
    for group in second.optimizer.param_groups:
        group.update(changed)
    second.checkpointer.load(path, batches=5)
    assert {key: second.optimizer.param_groups[0][key] for key in changed} == changed


def test_another_optimiser_is_refused(tmp_path):
    path = Run(tmp_path, "cosine").checkpointer.save(Progress(epoch=1, updates=1))
    second = Run(tmp_path, "cosine")
    second.checkpointer.optimizer = torch.optim.SGD(second.model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(UserError, match="holds the state of AdamW, and this run has SGD.*--no-resume-opt"):
        second.checkpointer.load(path, batches=5)
    second.checkpointer.load(path, batches=5, with_optimizer=False)


def saved(folder, updates=(1, 2, 3), keep=5):
    run = Run(folder, keep=keep)
    for n in updates:
        run.step(n)
        run.checkpointer.save(Progress(epoch=n, updates=n))
    return run


def names(folder):
    return sorted(p.name for p in (folder / FOLDER).iterdir())


def test_the_oldest_are_removed(tmp_path):
    saved(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-0002-00000000", "checkpoint-0003-00000000"]
    assert epochs_done(tmp_path) == 3


def test_the_newest_end_of_an_epoch_is_kept_beside_those_within_one(tmp_path):
    run = Run(tmp_path)
    for step in range(4):
        run.checkpointer.save(Progress(epoch=1, step=step))
    assert names(tmp_path) == ["checkpoint-0001-00000000", "checkpoint-0001-00000008", "checkpoint-0001-00000012"]
    run.checkpointer.save(Progress(epoch=2))
    assert names(tmp_path) == ["checkpoint-0001-00000012", "checkpoint-0002-00000000"]


def damage(path, how):
    file = path / "model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
        return rf"model\.safetensors has {file.stat().st_size} of {file.stat().st_size + 7} bytes"
    if how == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return r"model\.safetensors has changed"
    if how == "missing":
        (path / "optimizer.bin").unlink()
        return r"optimizer\.bin is missing"
    (path / "manifest.json").write_text("{")
    return r"manifest\.json cannot be read"


HOW = ["truncated", "changed", "missing", "manifest"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, how):
    accelerator = saved(tmp_path).accelerator
    newest, before = (tmp_path / FOLDER / f"checkpoint-000{n}-00000000" for n in (3, 2))
    reason = damage(newest, how)
    said = []
    assert find_checkpoint(tmp_path, accelerator, said.append) == before
    assert len(said) == 1 and str(newest) in said[0]
    with pytest.raises(UserError, match=rf"{newest} is damaged \({reason}.*Resume from {before}, which is whole"):
        check_checkpoint(newest, accelerator)


def test_no_whole_checkpoint(tmp_path):
    accelerator = saved(tmp_path, updates=[1]).accelerator
    path = tmp_path / FOLDER / "checkpoint-0001-00000000"
    damage(path, "truncated")
    with pytest.raises(UserError, match="all 1 checkpoints in .* are damaged"):
        find_checkpoint(tmp_path, accelerator, lambda _: None)
    assert find_checkpoint(tmp_path / "empty", accelerator, print) is None
    with pytest.raises(UserError, match="There is no other whole one"):
        check_checkpoint(path, accelerator)


def test_clocks_do_not_decide(tmp_path):
    accelerator = saved(tmp_path).accelerator
    for n, age in ((1, 0), (2, 10**6), (3, 2 * 10**9)):
        path = tmp_path / FOLDER / f"checkpoint-000{n}-00000000"
        os.utime(path, (2 * 10**9 - age,) * 2)
    assert find_checkpoint(tmp_path, accelerator, print).name == "checkpoint-0003-00000000"


@pytest.mark.parametrize("moment", ["save_state", "manifest", "rename"])
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, moment):
    run = saved(tmp_path, updates=[1])

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if moment == "save_state":
        monkeypatch.setattr(run.accelerator, "save_state", fail)
    else:
        monkeypatch.setattr(state, "flush_to_disk" if moment == "manifest" else "rename", fail)
    with pytest.raises(
        RankError,
        match=r"cannot write checkpoint .*checkpoint-0002-00000000.*No space left.*MiB free.*"
        r"last complete one is .*checkpoint-0001-00000000",
    ):
        run.checkpointer.save(Progress(epoch=2, updates=2))
    assert names(tmp_path) == ["checkpoint-0001-00000000"]


def test_left_overs_of_a_killed_run_are_cleared(tmp_path):
    run = saved(tmp_path, updates=[1])
    shutil.copytree(tmp_path / FOLDER / "checkpoint-0001-00000000", tmp_path / FOLDER / ".checkpoint-0002-00000000.tmp")
    assert find_checkpoint(tmp_path, run.accelerator, print).name == "checkpoint-0001-00000000"
    run.checkpointer.save(Progress(epoch=3, updates=3))
    assert names(tmp_path) == ["checkpoint-0001-00000000", "checkpoint-0003-00000000"]


def test_another_model_is_refused(tmp_path):
    path = saved(tmp_path, updates=[1]).checkpointer.folder / "checkpoint-0001-00000000"
    run = Run(tmp_path)
    run.checkpointer.model = torch.nn.Linear(3, 5)
    with pytest.raises(UserError, match=rf"{path} does not fit this run.*Resume with the model"):
        run.checkpointer.load(path, batches=5)


def test_going_back_sets_the_later_ones_aside(tmp_path):
    run = saved(tmp_path)
    assert run.checkpointer.set_later_aside(Progress(epoch=1, updates=1)) == [
        "checkpoint-0003-00000000",
        "checkpoint-0002-00000000",
    ]
    assert names(tmp_path) == [
        "checkpoint-0001-00000000",
        "superseded-checkpoint-0002-00000000",
        "superseded-checkpoint-0003-00000000",
    ]
    assert epochs_done(tmp_path) == 1


def test_a_position_is_converted_to_another_number_of_processes():
    progress = Progress(epoch=2, step=6, updates=2 * 10 + 6)
    progress.lay_out(
        {"processes": 2, "batch_size": 4, "grad_accum_steps": 1},
        {"processes": 1, "batch_size": 4, "grad_accum_steps": 5},
        batches=20,
    )
    assert (progress.step, progress.updates) == (10, 2 * 4 + 2)  # 48 images are 12 batches, 10 of them whole updates


def test_manifest_lists_every_file(tmp_path):
    saved(tmp_path, updates=[1])
    path = tmp_path / FOLDER / "checkpoint-0001-00000000"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["layout"] == LAYOUT and manifest["progress"]["epoch"] == 1
    assert set(manifest["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
