"""Runs that are killed, asked to stop, short of space or of memory, and what is left of them."""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from children import Launch, free_port, kill_tree, start_server
from runs import TINY, make_images, read_summary, train, train_tiny
from safetensors.torch import load_file

from timm_faim.run.errors import UserError
from timm_faim.training.checkpoints import FOLDER

# Everything that holds state or draws: a closed-form start, mixup, erasing, dropout, average, accumulation, batch norm.
FULL = [
    "--model",
    "faim_test_resnet",
    *TINY,
    "--epochs",
    "3",
    "-b",
    "2",
    "--mixup",
    "0.4",
    "--faim-cfg",
    "learn_metric=True",
    "lambda_init=0.1",
    "--head-init",
    "data",
    "--cutmix",
    "0.4",
    "--reprob",
    "0.5",
    "--drop",
    "0.2",
    "--model-ema",
    "--model-ema-decay",
    "0.9",
    "--grad-accum-steps",
    "2",
    "--hflip",
    "0.5",
    "--recovery-interval",
    "1",
    "--checkpoint-hist",
    "2",
    "--no-report",
    "--log-interval",
    "1",
]
FULL.remove("--no-aug")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), train=6)


def command(images, output, *argv):
    return ["--data-dir", images, "--output", output, "--experiment", "run", *FULL, "--resume", "auto", *argv]


def same_run(first, second):
    """Whether two run folders hold the same weights, bit for bit, and the same numbers."""
    for name in ("last.safetensors", "model_best.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        differ = [key for key in a if not torch.equal(a[key], b[key])]
        assert not differ, f"{name}: {differ}"
    varying = ("train_images_per_s", "train_seconds")
    rows = [
        [{k: v for k, v in row.items() if k not in varying} for row in read_summary(run)] for run in (first, second)
    ]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 process", "2 processes"])
def whole_run(request, images, tmp_path_factory):
    """An uninterrupted run: its folder, number of processes and seconds."""
    output = tmp_path_factory.mktemp("whole")
    start_server()
    started = time.monotonic()
    launch = Launch(command(images, output), output / "log", request.param)
    assert launch.wait() == [0] * request.param, launch.text()
    assert f"; {request.param} x cpu;" in launch.text()
    return output / "run", request.param, time.monotonic() - started


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_resumed_run_is_the_uninterrupted_one(whole_run, images, tmp_path, count):
    expected, processes, seconds = whole_run
    moments = random.Random(count)
    kills = resumed = 0
    for _ in range(10 * count):  # a launch may come to its end before it is killed
        launch = Launch(command(images, tmp_path), tmp_path / "log", processes)
        time.sleep(moments.uniform(0, 0.9) * seconds)
        is_alive = launch.is_alive()
        launch.kill()
        resumed += "resuming from" in launch.text()
        has_ended = "load it:" in launch.text()
        kills += is_alive and not has_ended
        (tmp_path / "log").unlink(missing_ok=True)
        if has_ended:
            shutil.rmtree(tmp_path / "run")
        elif kills >= count and resumed and any((tmp_path / "run" / FOLDER).glob("checkpoint-*")):
            break  # on a busy machine the first kills may all come before a checkpoint
    assert kills >= count and resumed
    launch = Launch(command(images, tmp_path), tmp_path / "log", processes)
    assert launch.wait() == [0] * processes, launch.text()
    assert "resuming from" in launch.text()
    same_run(tmp_path / "run", expected)


def accelerate_launch(argv, processes, log):
    """`accelerate launch` of train_faim.py on the CPU, in the background."""
    several = ["--multi_gpu", "--num_machines", "1", "--main_process_port", str(free_port())] if processes > 1 else []
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *several,
        "--num_processes",
        processes,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        Path(__file__).parents[1] / "train_faim.py",
        *argv,
    ]
    return subprocess.Popen(
        list(map(str, words)),
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_killed_under_accelerate_launch_the_resumed_run_is_the_uninterrupted_one(whole_run, images, tmp_path):
    expected, processes, _ = whole_run
    moments, log, kills, resumed = random.Random(7), tmp_path / "log", 0, 0
    for _ in range(40):
        log.write_text("")
        launch = accelerate_launch(command(images, tmp_path), processes, log)
        deadline = time.monotonic() + moments.uniform(4, 12)  # of which the imports take the first seconds
        while launch.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        is_alive = launch.poll() is None
        kill_tree(launch)
        has_begun, has_ended = "run folder" in log.read_text(), "load it:" in log.read_text()
        kills += is_alive and has_begun and not has_ended  # of a training, not of its imports
        resumed += "resuming from" in log.read_text()
        if has_ended:
            shutil.rmtree(tmp_path / "run")
        elif kills >= 5 and resumed and any((tmp_path / "run" / FOLDER).glob("checkpoint-*")):
            break
    launch = accelerate_launch(command(images, tmp_path), processes, log)
    assert launch.wait(timeout=300) == 0, log.read_text()
    assert kills >= 5 and resumed and "resuming from" in log.read_text()
    same_run(tmp_path / "run", expected)
    print(f"{kills} kills under accelerate launch, {processes} processes: bit-equal")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("flag", "option weight_decay has changed: "),
        ("images", "the training data had 18 images before and have 17 now"),
        ("classes", "class 1 is 'dog', 'zebra' here and 'cat', 'dog' in the run"),
        ("head", "was made with a head of margin="),
        ("model", "does not fit this run"),
    ],
)
def test_what_has_changed_on_resume_is_said_or_refused(tmp_path, change, said):
    images = make_images(tmp_path / "images", train=6)
    argv = command(images, tmp_path)
    first = Launch([*argv, "--stop-epoch", "1"], tmp_path / "log", 1)
    assert first.wait() == [0], first.text()
    if change == "images":
        (images / "train" / "cat" / "0.png").unlink()
    elif change == "classes":
        for split in ("train", "val"):
            (images / split / "cat").rename(images / split / "zebra")
    more = {"flag": ["--weight-decay", "0.3"], "model": ["--model", "faim_test_vit"], "head": []}.get(change, [])
    if change == "head":  # as if this version had another default
        config = tmp_path / "run" / "config.json"
        config.write_text(config.read_text().replace('"margin": 0.2', '"margin": 0.35'))
    second = Launch([*argv, *more], tmp_path / "log", 1)
    status = second.wait()
    assert said in second.text(), second.text()
    assert (status == [0]) == (change in ("flag", "images")), second.text()
    assert status == [0] or "Traceback" not in second.text()


def test_asked_to_stop_it_saves_and_says_how_to_go_on(whole_run, images, tmp_path):
    expected, processes, _ = whole_run
    launch = Launch(command(images, tmp_path, "--recovery-interval", "0"), tmp_path / "log", processes)
    launch.wait_for("run folder")
    launch.children[-1].terminate()  # one process alone is told
    assert launch.wait() == [0] * processes, launch.text()
    assert re.search(
        rf"asked to stop: epoch \d, batch \d+ is saved in {tmp_path / 'run'}\. Go on with --resume auto", launch.text()
    )
    launch = Launch(command(images, tmp_path, "--recovery-interval", "0"), tmp_path / "log", processes)
    assert launch.wait() == [0] * processes, launch.text()
    same_run(tmp_path / "run", expected)


def test_processes_may_change_on_the_way(images, tmp_path):
    argv = command(images, tmp_path)
    first = Launch([*argv, "--stop-epoch", "1"], tmp_path / "log", 2)
    assert first.wait() == [0, 0], first.text()
    second = Launch(argv, tmp_path / "log", 1)
    assert second.wait() == [0], second.text()
    assert "the checkpoint was written by 2 processes, this run has 1" in second.text()
    assert [row["epoch"] for row in read_summary(tmp_path / "run")] == ["0", "1", "2", "3"]
    rates = [float(row["lr"]) for row in read_summary(tmp_path / "run")[1:]]
    assert rates[0] > rates[1] > rates[2] > 0  # one schedule, not one begun anew


def test_one_process_dying_ends_the_others_and_their_launcher(images, tmp_path, request):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
        str(Path(__file__).parents[1] / "train_faim.py"),
        "--data-dir",
        images,
        "--output",
        tmp_path,
        "--experiment",
        "run",
        *FULL,
        "--epochs",
        "10000",
    ]
    launch = subprocess.Popen(
        list(map(str, launcher)),
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    request.addfinalizer(lambda: kill_tree(launch))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / FOLDER).exists():
        assert launch.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(launch.pid).children() if "train_faim.py" in " ".join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    killed = time.monotonic()
    assert launch.wait(timeout=60) != 0
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    assert time.monotonic() - killed < 60
    assert "SIGKILL" in (tmp_path / "log").read_text() or "exitcode: -9" in (tmp_path / "log").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A small file system: room for three checkpoints of 4 MiB and the weights."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk, images, tmp_path):
    argv = ["--epochs", "3", "--checkpoint-hist", "1"]
    expected = train_tiny(images, tmp_path / "whole", *argv)
    (small_disk / "filler").write_bytes(bytes(2**20))
    train_tiny(images, small_disk, *argv, "--stop-epoch", "1")
    free = os.statvfs(small_disk)
    with (small_disk / "filler").open("ab") as stream:  # leave half a MiB
        stream.write(bytes(free.f_bavail * free.f_frsize - 2**19))
    with pytest.raises(UserError, match=r"cannot write .*No space left on device.*MiB free.*--resume auto"):
        train_tiny(images, small_disk, *argv, "--resume", "auto")
    (small_disk / "filler").unlink()
    run = train_tiny(images, small_disk, *argv, "--resume", "auto")
    same_run(run, expected)


def test_out_of_memory_names_the_batch_size_to_try(images, tmp_path, monkeypatch):
    def forward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("timm.task.ClassificationTask.forward", forward)
    with pytest.raises(UserError, match=r"out of memory with --batch-size 4\. Try --batch-size 2 --grad-accum-steps 2"):
        train_tiny(images, tmp_path)


@pytest.mark.gpu
def test_real_shortage_of_device_memory(images, tmp_path):
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(UserError, match=r"out of memory with --batch-size 16\. Try --batch-size 8"):
            train(
                "--data-dir",
                images,
                "--output",
                tmp_path,
                "--model",
                "faim_resnet50",
                "--img-size",
                "224",
                "-b",
                "16",
                "--workers",
                "0",
                "--epochs",
                "1",
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.parametrize("resume", ["folder", "checkpoint"])
def test_resuming_by_name_needs_no_other_option(images, tmp_path, resume):
    whole = train_tiny(images, tmp_path / "whole")
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    (checkpoint,) = (run / FOLDER).iterdir()
    train("--resume", run if resume == "folder" else checkpoint)
    same_run(run, whole)


def test_automatic_resuming_finds_the_run_by_its_options(images, tmp_path, capsys):
    options = ["--data-dir", images, "--output", tmp_path, "--model", "faim_test_resnet", *TINY, "--resume", "auto"]
    train(*options, "--stop-epoch", "1")
    assert "no unfinished run with these options" in capsys.readouterr().out
    train(*options, "--lr", "0.1", "--stop-epoch", "1")  # another run
    train(*options)
    assert "resuming from" in capsys.readouterr().out
    assert sorted(len(read_summary(run)) for run in tmp_path.iterdir()) == [1, 2]
    train(*options)  # the first is at its end
    assert len(list(tmp_path.iterdir())) == 3


def test_automatic_resuming_does_not_choose_between_runs(images, tmp_path):
    for name in "ab":
        train_tiny(images, tmp_path / name, "--stop-epoch", "1").rename(tmp_path / f"run_{name}")
    with pytest.raises(UserError, match=r"2 unfinished runs.*run_a, run_b.*--resume FOLDER"):
        train("--data-dir", images, "--output", tmp_path, "--model", "faim_test_resnet", *TINY, "--resume", "auto")


def test_changed_options_are_said(images, tmp_path, capsys):
    train_tiny(images, tmp_path, "--stop-epoch", "1")
    train_tiny(images, tmp_path, "--resume", "auto", "--weight-decay", "0.3")
    assert "option weight_decay has changed: 2e-05 before, 0.3 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("resume", "message"),
    [("nowhere", r"--resume .*nowhere is no folder"), ("empty", r"--resume .*empty: no whole checkpoint in")],
)
def test_nothing_to_resume_from(images, tmp_path, resume, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        train_tiny(images, tmp_path, "--resume", tmp_path / resume)


def test_a_truncated_checkpoint_is_passed_over(images, tmp_path, capsys):
    whole = train_tiny(images, tmp_path / "whole")
    run = train_tiny(images, tmp_path, "--stop-epoch", "1", "--recovery-interval", "1")
    before, newest = sorted((run / FOLDER).iterdir())[-2:]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    train_tiny(images, tmp_path, "--resume", "auto")
    output = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged (model.safetensors has 1000 of" in output
    assert f"resuming from {before}" in output
    same_run(run, whole)


@pytest.mark.parametrize(("processes", "number"), [(1, signal.SIGTERM), (2, signal.SIGTERM), (1, signal.SIGHUP)])
def test_a_signal_to_the_whole_group_leaves_the_loader_workers_at_work(images, tmp_path, processes, number):
    """As sent by schedulers of clusters; the workers of a training that still has to save must not die of it."""
    launch = Launch(command(images, tmp_path, "--workers", "2", "--epochs", "500"), tmp_path / "log", processes)
    launch.wait_for("epoch   1/500")
    for child in launch.children:
        os.killpg(child.pid, number)
    assert launch.wait() == [0] * processes, launch.text()
    assert "asked to stop" in launch.text()


def test_weights_that_are_not_finite_are_never_saved(images, tmp_path, monkeypatch):
    """An update may overflow after a loss that was finite."""
    step = torch.optim.AdamW.step
    calls = []

    def overflowing(optimizer, *args, **kwargs):
        step(optimizer, *args, **kwargs)
        calls.append(None)
        if len(calls) == broken:
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    for broken, argv in ((6, ["--recovery-interval", "1"]), (8, ["--val-split", ""])):  # 4 updates an epoch
        calls.clear()
        output = tmp_path / str(broken)
        with pytest.raises(UserError, match=r"weights are not finite after update \d .*earlier checkpoints are kept"):
            train_tiny(images, output, "--epochs", "2", *argv)
        run = output / "run"
        for path in [*run.glob("*.safetensors"), *run.glob("checkpoints/*/model.safetensors")]:
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path
        assert list(run.glob("checkpoints/*"))


def test_a_run_repeats_from_its_options_though_it_was_itself_resumed(images, tmp_path):
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    train("--resume", run)
    train("--config", run / "args.yaml", "--output", tmp_path / "again", "--experiment", "run")
    same_run(tmp_path / "again" / "run", run)


def test_another_optimiser_leaves_the_run_resumable(images, tmp_path):
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    with pytest.raises(UserError, match="holds the state of AdamW, and this run has SGD"):
        train("--resume", run, "--opt", "sgd")
    train("--resume", run)
    assert len(read_summary(run)) == 2


def test_a_damaged_summary_is_named(images, tmp_path):
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    (run / "summary.csv").write_text("loss\n1\n")
    with pytest.raises(UserError, match=r"summary\.csv is damaged"):
        train("--resume", run)


def test_a_chosen_first_epoch_has_its_learning_rate(images, tmp_path):
    argv = ["--epochs", "4", "--warmup-epochs", "2"]
    whole = read_summary(train_tiny(images, tmp_path / "whole", *argv))
    late = read_summary(train_tiny(images, tmp_path / "late", *argv, "--start-epoch", "2"))
    assert [row["lr"] for row in late] == [row["lr"] for row in whole[2:]]


def test_automatic_resuming_does_not_take_other_data(images, tmp_path):
    options = ["--output", tmp_path / "out", "--model", "faim_test_resnet", *TINY, "--resume", "auto"]
    train("--data-dir", images, *options, "--stop-epoch", "1")
    train("--data-dir", make_images(tmp_path / "other"), *options, "--stop-epoch", "1")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_checkpoint_named_from_its_own_folder(images, tmp_path, monkeypatch):
    run = train_tiny(images, tmp_path, "--stop-epoch", "1")
    (checkpoint,) = (run / FOLDER).iterdir()
    monkeypatch.chdir(run / FOLDER)
    train("--resume", checkpoint.name)
    assert len(read_summary(run)) == 2


def test_a_checkpoint_that_does_not_fit_leaves_the_run_as_it_was(images, tmp_path):
    run = train_tiny(images, tmp_path, "--epochs", "2")
    before = sorted(path.name for path in (run / FOLDER).iterdir())
    with pytest.raises(UserError, match="does not fit this run"):
        train("--resume", run / FOLDER / before[0], "--model", "test_resnet")
    assert sorted(path.name for path in (run / FOLDER).iterdir()) == before


def test_distillation_of_features_resumes_with_its_projection(images, tmp_path):
    teacher = train_tiny(images, tmp_path / "teacher", "--epochs", "1", model="test_vit")
    argv = ["--kd-model-name", f"local-dir:{teacher}", "--kd-distill-type", "feature"]
    whole = train_tiny(images, tmp_path / "whole", *argv)
    train_tiny(images, tmp_path, *argv, "--stop-epoch", "1")
    same_run(train_tiny(images, tmp_path, *argv, "--resume", "auto"), whole)


def test_a_dry_run_with_a_bad_loss_writes_nothing(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", lambda self, output, target: output.sum() * math.nan)
    with pytest.raises(UserError, match="the loss is nan"):
        train_tiny(images, tmp_path / "out", "--dry-run", "--smoothing", "0")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stopped_before_its_first_validation_can_be_opened(images, tmp_path, capsys):
    run = train_tiny(images, tmp_path, "--val-interval", "2", "--stop-epoch", "1")
    assert "not yet validated, after" in capsys.readouterr().out
    assert (run / "model_best.safetensors").is_file() and (run / "model.safetensors").is_file()


def test_going_back_takes_the_best_weights_along(images, tmp_path):
    run = train_tiny(images, tmp_path, "--epochs", "3", "--stop-epoch", "2", "--eval-metric", "loss")
    first = load_file(run / "top" / "epoch_0001.safetensors")
    checkpoints = sorted((run / FOLDER).iterdir())
    train("--resume", checkpoints[0], "--stop-epoch", "1")
    assert [p.name for p in (run / "top").iterdir()] == ["epoch_0001.safetensors"]
    best = load_file(run / "model_best.safetensors")
    assert all(torch.equal(best[key], first[key]) for key in first)
    assert [path.name for path in (run / FOLDER).glob("superseded-*")] == [f"superseded-{checkpoints[1].name}"]
