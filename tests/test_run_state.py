"""Who may write to a run folder, when a run is finished, and who is blamed for what has ended it."""
import errno
import json
import subprocess
import sys

import pytest
import torch
from runs import TINY, make_images, train, train_tiny
from test_train_loop import Batches, linear_model, random_batches, training

from timm_faim.training import reports
from timm_faim.training.errors import RankError, UserError, is_lost_process, resource_advice
from timm_faim.training.lock import lock_run_folder, release_locks
from timm_faim.training.loop import train_one_epoch
from timm_faim.training.resume import FINISHED
from timm_faim.training.state import Checkpointer, Progress

HOLD = """import sys, time
from pathlib import Path
from timm_faim.training.lock import lock_run_folder
lock_run_folder(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)"""


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
    finish = reports.finish

    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(reports, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        train(*options, "--resume", "auto")
    (run,) = (tmp_path / "out").iterdir()
    assert not (run / FINISHED).exists() and not (run / "report.html").exists()
    rows = (run / "summary.csv").read_bytes()
    monkeypatch.setattr(reports, "finish", finish)
    train(*options, "--resume", "auto")
    assert "resuming from" in capsys.readouterr().out
    assert (run / FINISHED).exists() and (run / "report.html").exists() and (run / "summary.csv").read_bytes() == rows
    assert list((tmp_path / "out").iterdir()) == [run]
    train(*options, "--resume", "auto", "--epochs", "2")
    assert "no unfinished run with these options" in capsys.readouterr().out


def checkpointer(run, folder):
    layout = {"processes": 1, "batch_size": 2, "grad_accum_steps": 1, "images": 8}
    return Checkpointer(run.accelerator, folder, run.model, run.optimizer, layout)


@pytest.mark.parametrize(("error", "said", "not_said"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device .*Free some space", "another process"),
    (OSError(errno.EACCES, "Permission denied"), "Permission denied; .*Go on with --resume", "Free some"),
    (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "another process of this run has ended", "Free"),
    (RuntimeError("unexpected pos 64 vs 0"), "unexpected pos", "Free some"),
])
def test_a_checkpoint_that_fails_is_blamed_on_its_cause(tmp_path, monkeypatch, error, said, not_said):
    run = training(linear_model(), random_batches(2), tmp_path)
    saver = checkpointer(run, tmp_path)

    def fail(folder):
        raise error
    monkeypatch.setattr(run.accelerator, "save_state", fail)
    with pytest.raises(RankError, match=said) as caught:
        saver.save(Progress())
    assert not_said not in str(caught.value)


@pytest.mark.parametrize(("error", "said"), [
    (RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed."), "loader worker 4711 was lost"),
    (RuntimeError("DataLoader worker (pid(s) 47, 11) exited unexpectedly"), "loader worker 47, 11 was lost"),
    (ValueError("Expected more than 1 value per channel when training, got input size torch.Size([1, 8, 1, 1])"),
     "batch norm cannot train on one value: --batch-size 1"),
])
def test_what_torch_says_in_many_lines_is_one(error, said):
    class Args:
        batch_size, grad_accum_steps, output = 1, 1, "."

    with pytest.raises(RankError, match=said), resource_advice(Args):
        raise error
    for other in (RuntimeError("something else"), ValueError("something else")):
        with pytest.raises(type(other), match="something else"), resource_advice(Args):
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
    run = training(short, Stream(random_batches(count)), tmp_path, grad_accum_steps=3)
    train_one_epoch(run)
    assert run.progress.updates == -(-count // 3)
    train_one_epoch(training(whole, random_batches(count), tmp_path, grad_accum_steps=3))
    for got, wanted in zip(short.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_config_of_a_run_is_json_for_anyone(images, tmp_path):
    run = train_tiny(images, tmp_path)
    assert json.loads((run / "config.json").read_text())["label_names"] == ["bird", "cat", "dog"]
