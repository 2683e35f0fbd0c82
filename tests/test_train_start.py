"""A start in closed form: epoch 0 of the summary, a run of its own with --epochs 0, and resumed like any other."""

import pytest
import torch
from runs import TINY, make_images, read_summary, train, train_tiny
from safetensors.torch import load_file
from test_train_faults import same_run

from timm_faim.run.errors import UserError
from timm_faim.run.finished import FINISHED
from timm_faim.run.summary import append_summary, cut_summary
from timm_faim.run.summary import read_summary as rows_of
from timm_faim.run.weights import BEST
from timm_faim.training import ending, epochs, finish
from timm_faim.training.args import parse_args
from timm_faim.training.checkpoints import FOLDER
from timm_faim.training.state import Progress, _read_progress

START = ["--head-init", "data"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def test_a_run_of_no_epochs_fits_evaluates_and_saves(images, tmp_path, capsys):
    run = train_tiny(images, tmp_path, *START, "--epochs", "0", "--report")
    said = capsys.readouterr().out
    (row,) = read_summary(run)
    assert row["epoch"] == "0" and "train_loss" not in row and row["eval_samples"] == "7"
    assert f"start: validation loss {float(row['eval_loss']):.3f}, top-1 " in said
    assert f"best validation top1 {float(row['eval_top1']):.2f}" in said
    assert {"config.json", "model.safetensors", "last.safetensors", "report.html", FINISHED, "learning_curve.png"} <= {
        path.name for path in run.iterdir()
    }
    train("--resume", run)  # nothing is left to do
    assert read_summary(run) == [row]


def test_a_start_that_no_epoch_betters_is_the_best(images, tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(ending, "evaluate", lambda *_, **__: {"loss": next(losses)})
    run = train_tiny(images, tmp_path, *START, "--eval-metric", "loss", "--checkpoint-hist", "2")
    best, start = (load_file(run / name) for name in (BEST, "top/epoch_0000.safetensors"))
    assert all(torch.equal(best[name], start[name]) for name in best)
    assert sorted(path.name for path in (run / "top").iterdir()) == [f"epoch_000{n}.safetensors" for n in (0, 1)]


def test_more_epochs_go_on_from_the_start(images, tmp_path):
    whole = train_tiny(images, tmp_path / "whole", *START)
    run = train_tiny(images, tmp_path, *START, "--epochs", "0")
    train_tiny(images, tmp_path, *START, "--resume", "auto")
    same_run(run, whole)


@pytest.mark.parametrize("moment", ["row", "checkpoint", "first epoch"])
def test_killed_around_the_start_the_resumed_run_is_the_uninterrupted_one(images, tmp_path, monkeypatch, moment):
    whole = train_tiny(images, tmp_path / "whole", *START)
    where = {
        "row": (epochs, "check_weights"),
        "checkpoint": ("timm_faim.training.state.Checkpointer", "save"),
        "first epoch": (epochs, "train_one_epoch"),
    }[moment]

    def killed(*args):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises((MemoryError, UserError)):
        patch.setattr(*(f"{where[0]}.{where[1]}",) if isinstance(where[0], str) else where, killed)
        train_tiny(images, tmp_path, *START)
    has_checkpoint = any((tmp_path / "run" / FOLDER).glob("checkpoint-0000-00000000"))
    assert has_checkpoint == (moment == "first epoch")
    same_run(train_tiny(images, tmp_path, *START, "--resume", "auto"), whole)


def test_a_start_is_not_repeated_when_the_report_was_killed(images, tmp_path, monkeypatch, capsys):
    options = [
        "--data-dir",
        images,
        "--output",
        tmp_path / "out",
        "--model",
        "faim_test_resnet",
        *TINY,
        *START,
        "--epochs",
        "0",
        "--report",
        "--resume",
        "auto",
    ]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finish, "finish", killed)
        train(*options)
    assert capsys.readouterr().out.count("start: ") == 1
    train(*options)
    (run,) = (tmp_path / "out").iterdir()
    assert "start: " not in capsys.readouterr().out and (run / FINISHED).exists() and (run / "report.html").exists()


def test_without_validation_the_start_is_kept_and_the_loss_decides_later(images, tmp_path, capsys):
    run = train_tiny(images, tmp_path, *START, "--val-split=", "--epochs", "0")
    assert "start: not validated" in capsys.readouterr().out and (run / "model.safetensors").is_file()
    train_tiny(images, tmp_path, *START, "--val-split=", "--resume", "auto")
    assert [row["epoch"] for row in read_summary(run)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model faim_resnet18", "--epochs 0 trains nothing: give --head-init data"),
        ("--model resnet18", "--epochs 0 trains nothing"),
        (
            "--model faim_resnet18 --head-init data --head-refit 1",
            "--head-refit does not go with --epochs 0, whose heads",
        ),
    ],
)
def test_what_no_epochs_do_not_go_with(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(["--data-dir", "d", "--epochs", "0", *argv.split()])


def test_a_recipes_refit_and_warm_up_give_way(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{data_dir: d, epochs: 9, warmup_epochs: 3, head_refit: 2, head_init: data}")
    args = parse_args(["-c", str(tmp_path / "recipe.yaml"), "--epochs", "0"])
    assert (args.schedule.epochs, args.schedule.warmup_epochs, args.head.head_refit) == (0, 0, None)


def test_a_saved_plain_model_has_nothing_to_fit(images, tmp_path):
    plain = train_tiny(images, tmp_path, model="test_resnet")
    with pytest.raises(UserError, match="--epochs 0 fits FAIM heads in closed form, and local-dir:.* has none"):
        train_tiny(images, tmp_path / "b", *START, "--epochs", "0", "--pretrained", model=f"local-dir:{plain}")


def test_summaries_and_checkpoints_that_counted_from_0_are_read(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text("epoch,train_loss,lr\n0,3,0.1\n1,2,0.1\n2,1,0.1\n")
    cut_summary(path, 2)
    append_summary(path, 3, {"loss": 1.5}, {}, 0.1)
    assert [(row["epoch"], row["train_loss"]) for row in rows_of(path)] == [("1", "3"), ("2", "2"), ("3", "1.5")]
    old = {"epoch": 2, "best": 5.0, "kept": [{"epoch": 1, "metric": 5.0}]}
    assert _read_progress({"progress": old}) == Progress(epoch=2, best=5.0, top=[{"epoch": 2, "metric": 5.0}])
