"""Who may write to a run folder, when a run is finished, and who is blamed for what has ended it."""

import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from children import in_group
from runs import TINY, make_images, train, train_tiny
from test_train_loop import Batches, linear_model, random_batches, training

import timm_faim
from timm_faim import hub
from timm_faim.run.errors import RankError, UserError, is_lost_process, resource_advice
from timm_faim.run.finished import FINISHED, FinishOptions, record_done, work_left
from timm_faim.run.lock import lock_run_folder, release_locks
from timm_faim.training import finish
from timm_faim.training.fits import build_refit
from timm_faim.training.loop import train_one_epoch
from timm_faim.training.state import Checkpointer, Progress

HOLD = """import sys, time
from pathlib import Path
from timm_faim.run.lock import lock_run_folder
lock_run_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)"""
HOLD_AND_FORK = HOLD.replace("import sys, time", "import os, sys, time").replace(
    'print("locked", flush=True)',
    """
if worker := os.fork():
    print(worker, flush=True)""",
)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def test_another_run_in_the_same_folder_is_refused_until_it_is_gone(images, tmp_path):
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    mine = run / ".summary.csv.1.tmp"
    other = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        mine.write_text("half written by the other run")
        with pytest.raises(UserError, match=rf"another run writes to {run} \(process {other.pid}\)"):
            train_tiny(images, tmp_path, "--resume", "auto")
        assert mine.exists()
    finally:
        other.kill()
        other.wait()
    train_tiny(images, tmp_path, "--resume", "auto")
    assert not mine.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_the_lock_dies_with_its_process_and_not_with_the_last_loader_worker(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", HOLD_AND_FORK, tmp_path], stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {owner.pid}"):  # the fork has not given it back
            lock_run_folder(tmp_path)
        owner.kill()
        owner.wait()
        os.kill(worker, 0)  # still there
        lock_run_folder(tmp_path)
    finally:
        owner.kill()
        os.kill(worker, signal.SIGKILL)
        release_locks()


def test_what_killed_runs_left_half_written_is_cleared(tmp_path):
    left_over = [tmp_path / ".last.safetensors.7.tmp", tmp_path / "checkpoints" / ".checkpoint-0001-00000000.tmp"]
    left_over[1].mkdir(parents=True)
    (left_over[1] / "model.safetensors").touch()
    left_over[0].touch()
    (tmp_path / "kept.tmp").touch()
    lock_run_folder(tmp_path)
    release_locks()
    assert not any(path.exists() for path in left_over) and (tmp_path / "kept.tmp").exists()


def test_a_run_is_finished_when_all_that_was_asked_is_done(images, tmp_path, monkeypatch, capsys):
    options = ["--data-dir", images, "--output", tmp_path / "out", "--model", "faim_test_resnet", *TINY, "--report"]
    write = finish.finish

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*options, "--resume", "auto")
    (run,) = (tmp_path / "out").iterdir()
    assert not (run / FINISHED).exists() and not (run / "report.html").exists()
    rows = (run / "summary.csv").read_bytes()
    monkeypatch.setattr(finish, "finish", write)
    train(*options, "--resume", "auto")
    assert "resuming from" in capsys.readouterr().out
    assert (run / FINISHED).exists() and (run / "report.html").exists() and (run / "summary.csv").read_bytes() == rows
    assert list((tmp_path / "out").iterdir()) == [run]
    train(*options, "--resume", "auto", "--epochs", "2")
    assert "no unfinished run with these options" in capsys.readouterr().out


def test_what_is_asked_for_later_is_all_that_a_finished_run_still_does(images, tmp_path, monkeypatch):
    options = [
        "--data-dir",
        images,
        "--output",
        tmp_path / "out",
        "--model",
        "faim_test_resnet",
        *TINY,
        "--resume",
        "auto",
    ]
    done = []
    monkeypatch.setattr(finish, "finish", lambda *args: done.append("report"))
    monkeypatch.setattr(hub, "check_target", lambda repo: None)
    monkeypatch.setattr(hub, "publish_run", lambda folder, repo, *args: done.append(repo))
    train(*options)
    (run,) = (tmp_path / "out").iterdir()
    rows = (run / "summary.csv").read_bytes()

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between report and push
        patch.setattr(hub, "publish_run", killed)
        train(*options, "--report", "--push-to-hub", "a/b")
    assert done == ["report"]
    train(*options, "--report", "--push-to-hub", "a/b")
    assert done == ["report", "a/b"]
    train(*options, "--report", "--push-to-hub", "a/c")
    assert done == ["report", "a/b", "a/c"]
    assert list((tmp_path / "out").iterdir()) == [run] and (run / "summary.csv").read_bytes() == rows


def test_a_run_that_trains_on_is_unfinished_again(images, tmp_path, monkeypatch):
    options = ["--data-dir", images, "--output", tmp_path / "out", "--model", "faim_test_resnet", *TINY, "--report"]
    done = []
    monkeypatch.setattr(finish, "finish", lambda *args: done.append("report"))
    train(*options, "--resume", "auto")
    (run,) = (tmp_path / "out").iterdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "finish", lambda *args: signal.raise_signal(signal.SIGINT))
        train(*options, "--resume", run, "--epochs", "3")
    assert done == ["report"]
    train(*options, "--resume", "auto", "--epochs", "3")
    assert done == ["report", "report"] and list((tmp_path / "out").iterdir()) == [run]
    train(*options, "--resume", run, "--epochs", "3", "--start-epoch", "2")  # the last epoch once more: other weights
    assert len(done) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"epochs": 2}', '{"epochs": 2, "done": 3}', "\xff"])
def test_a_damaged_record_says_that_nothing_is_done(tmp_path, content):
    (tmp_path / FINISHED).write_bytes(content.encode("latin-1"))
    args = FinishOptions(push_to_hub="a/b")
    assert work_left(args, tmp_path, 2) == ["calibration", "report", "push to a/b"]
    record_done(tmp_path, 2, "calibration", "report")
    assert work_left(args, tmp_path, 2) == ["push to a/b"] and work_left(args, tmp_path, 3) != ["push to a/b"]


def _refit_with_one_unreadable_image() -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    head = timm_faim.FAIMHead(4, 3, space="indicatrix")
    model = torch.nn.Sequential(torch.nn.Identity(), head)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    clean = random_batches(2, size=8)

    def batches(epoch):
        yield from random_batches(1, size=8, seed=epoch)
        if accelerator.process_index == 1:
            raise RankError("cannot read image x.png")

    run = SimpleNamespace(evaluated=model, accelerator=accelerator, order=SimpleNamespace(batches=batches))
    with pytest.raises(UserError, match=r"cannot read image x\.png \(process 1\)"):
        build_refit(clean, 1, 3)(run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    accelerator.wait_for_everyone()  # the processes are in step


def test_an_image_that_one_process_cannot_read_ends_the_refit_of_all():
    in_group(_refit_with_one_unreadable_image)


def checkpointer(run, folder):
    layout = {"processes": 1, "batch_size": 2, "grad_accum_steps": 1, "images": 8}
    return Checkpointer(run.accelerator, folder, run.model, run.optimizer, layout)


@pytest.mark.parametrize(
    ("error", "said", "not_said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device .*Free some space",
            "another process",
        ),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied; .*Go on with --resume", "Free some"),
        (
            RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"),
            "another process of this run has ended",
            "Free",
        ),
        (RuntimeError("unexpected pos 64 vs 0"), "unexpected pos", "Free some"),
    ],
)
def test_a_checkpoint_that_fails_is_blamed_on_its_cause(tmp_path, monkeypatch, error, said, not_said):
    run = training(linear_model(), random_batches(2), tmp_path)
    saver = checkpointer(run, tmp_path)

    def fail(folder):
        raise error

    monkeypatch.setattr(run.accelerator, "save_state", fail)
    with pytest.raises(RankError, match=said) as caught:
        saver.save(Progress())
    assert not_said not in str(caught.value)


def test_a_worker_lost_during_a_checkpoint_is_not_the_checkpoints_fault(images, tmp_path, monkeypatch):
    def killed(*args):
        raise RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed.")

    monkeypatch.setattr("accelerate.Accelerator.save_state", killed)
    with pytest.raises(RankError, match=r"^loader worker 4711 was lost: killed, .*--resume auto$"):
        train_tiny(images, tmp_path)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed."), "loader worker 4711 was lost"),
        (RuntimeError("DataLoader worker (pid(s) 47, 11) exited unexpectedly"), "loader worker 47, 11 was lost"),
        (
            ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 8, 1, 1])"),
            "batch norm cannot train on one value: --batch-size 1",
        ),
    ],
)
def test_what_torch_says_in_many_lines_is_one(error, said):
    with pytest.raises(RankError, match=said), resource_advice(1, 1, "."):
        raise error
    for other in (RuntimeError("something else"), ValueError("something else")):
        with pytest.raises(type(other), match="something else"), resource_advice(1, 1, "."):
            raise other


def test_lost_processes_are_told_from_other_errors():
    assert is_lost_process(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:99"))
    assert is_lost_process(RuntimeError("failed to recv, got 0 bytes"))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_process(OSError("Broken pipe"))


def test_a_batch_of_one_with_batch_norm_is_one_line(images, tmp_path):
    with pytest.raises(UserError, match="--batch-size 1 is too small"):
        train_tiny(images, tmp_path, "--batch-size", "1", "--img-size", "8", model="faim_resnet10t")


class Stream(Batches):
    """Ends before its promised length."""

    is_stream = True

    def __len__(self):
        return super().__len__() + 2


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_stream_that_ends_early_loses_no_images(tmp_path, count):
    short, whole = linear_model(), linear_model()
    run = training(short, Stream(random_batches(count)), tmp_path, argv=["--grad-accum-steps", "3"])
    train_one_epoch(run)
    assert run.progress.updates == -(-count // 3)
    train_one_epoch(training(whole, random_batches(count), tmp_path, argv=["--grad-accum-steps", "3"]))
    for got, wanted in zip(short.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_config_of_a_run_is_json_for_anyone(images, tmp_path):
    run = train_tiny(images, tmp_path)
    assert json.loads((run / "config.json").read_text())["label_names"] == ["bird", "cat", "dog"]
