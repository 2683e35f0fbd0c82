"""Whole runs of train_faim.py on a tiny image folder, in one process and in two."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from children import free_port, run_group
from runs import TINY, make_images, read_summary, train, train_tiny
from safetensors.torch import load_file
from timm.data import create_dataset, create_loader, resolve_model_data_config

from timm_faim import faim_heads
from timm_faim.report import plots
from timm_faim.report.predictions import evaluate
from timm_faim.run.errors import UserError
from timm_faim.training import ending, epochs, loop, tasks
from timm_faim.training.args import parse_args

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def evaluate_run(run, images):
    """Validation metrics of a run folder, opened by timm and nothing else of ours."""
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    config = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset("", root=str(images), split="validation"),
        batch_size=3,
        num_workers=0,
        device=torch.device("cpu"),
        is_training=False,
        **{k: config[k] for k in ("input_size", "interpolation", "mean", "std", "crop_pct")},
    )
    return model, evaluate(model, loader, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def faim_run(images, tmp_path_factory):
    return train_tiny(
        images,
        tmp_path_factory.mktemp("out"),
        "--faim-cfg",
        "space=sphere",
        "margin=0.2",
        "--head-init",
        "data",
        "--epochs",
        "3",
        "--report",
    )


def test_run_folder_is_complete(faim_run):
    assert {p.name for p in faim_run.iterdir()} == {
        "args.yaml",
        "checkpoints",
        "config.json",
        "eval",
        "learning_curve.png",
        "last.safetensors",
        "model.safetensors",
        "model_best.safetensors",
        "report",
        "report.html",
        "summary.csv",
        "top",
        ".lock",
        ".finished",
    }
    assert (faim_run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((faim_run / "checkpoints").iterdir())) == 2
    assert sorted(p.name for p in (faim_run / "top").iterdir()) == [f"epoch_000{n}.safetensors" for n in range(4)]


def test_summary_has_one_row_an_epoch(faim_run):
    start, *rows = read_summary(faim_run)
    assert start["epoch"] == "0" and start["train_loss"] == start["lr"] == "" and start["eval_samples"] == "7"
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and list(start)[:2] == ["epoch", "train_loss"]
    assert set(rows[0]) == {
        "epoch",
        "train_loss",
        "train_top1",
        "train_images_per_s",
        "train_seconds",
        "train_lambda",
        "train_gamma",
        "eval_loss",
        "eval_top1",
        "eval_top5",
        "eval_samples",
        "lr",
    }
    assert all(row["eval_samples"] == "7" for row in rows)
    rates = [float(row["lr"]) for row in rows]
    assert rates[0] > rates[1] > rates[2] > 0


def test_timm_opens_the_best_weights_with_their_preprocessing(faim_run, images):
    model, metrics = evaluate_run(faim_run, images)
    best = max(read_summary(faim_run), key=lambda row: float(row["eval_top1"]))
    assert metrics["top1"] == pytest.approx(float(best["eval_top1"]))
    assert metrics["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-5)
    assert model.num_classes == 3 and len(faim_heads(model)) == 1
    assert model.faim_cfg["space"] == "sphere" and model.faim_cfg["margin"] == 0.2
    assert model.pretrained_cfg["label_names"] == ["bird", "cat", "dog"]
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 32)


def test_config_leaves_out_what_breaks_other_readers(faim_run):
    config = json.loads((faim_run / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["num_classes"] == 3
    assert "tag" not in config["pretrained_cfg"]  # the tag of weights that this run did not start from


def test_options_are_saved_and_repeat_the_run_exactly(faim_run, tmp_path):
    train("--config", faim_run / "args.yaml", "--output", tmp_path, "--experiment", "again")
    varying = ("train_images_per_s", "train_seconds")
    first, second = (
        [{k: v for k, v in row.items() if k not in varying} for row in read_summary(run)]
        for run in (faim_run, tmp_path / "again")
    )
    assert first == second


def test_another_seed_is_another_run(faim_run, tmp_path):
    train("--config", faim_run / "args.yaml", "--output", tmp_path, "--experiment", "again", "--seed", "1")
    assert read_summary(tmp_path / "again")[1]["train_loss"] != read_summary(faim_run)[1]["train_loss"]


def test_plain_timm_model_runs_in_the_same_script(images, tmp_path):
    run = train_tiny(images, tmp_path, "--epochs", "1", model="test_resnet")
    assert "train_lambda" not in read_summary(run)[0]
    model, metrics = evaluate_run(run, images)
    assert not faim_heads(model) and metrics["top1"] == pytest.approx(float(read_summary(run)[0]["eval_top1"]))


def test_one_channel_images_keep_one_mean_in_the_config(images, tmp_path):
    run = train_tiny(images, tmp_path, "--epochs", "1", "--in-chans", "1", "--mixup", "0.2", "--grad-accum-steps", "2")
    config = resolve_model_data_config(timm.create_model(f"local-dir:{run}", pretrained=True))
    assert config["input_size"] == (1, 32, 32) and len(config["mean"]) == len(config["std"]) == 1


def test_image_size_reaches_models_of_fixed_size(images, tmp_path):
    run = train_tiny(
        images, tmp_path, "--epochs", "1", "--layer-decay", "0.7", "--drop-path", "0.1", model="faim_test_vit"
    )
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_average_of_the_weights_is_what_is_evaluated_and_saved(images, tmp_path):
    plain = train_tiny(images, tmp_path / "a", "--epochs", "1")
    run = train_tiny(images, tmp_path / "b", "--epochs", "1", "--model-ema", "--model-ema-decay", "0.5")
    assert not torch.equal(load_file(run / "last.safetensors")["fc.mu"], load_file(plain / "last.safetensors")["fc.mu"])
    _, metrics = evaluate_run(run, images)
    assert metrics["loss"] == pytest.approx(float(read_summary(run)[0]["eval_loss"]), rel=1e-5)


def test_bad_loss_in_a_later_epoch_keeps_the_checkpoint(images, tmp_path, monkeypatch):
    forward = tasks.ClassificationTask.forward
    calls = []

    def breaking(task, images, target):
        calls.append(None)
        result = forward(task, images, target)
        return result | {"loss": result["loss"] * (float("nan") if len(calls) == 5 else 1)}  # 3 steps an epoch

    monkeypatch.setattr(tasks.ClassificationTask, "forward", breaking)
    with pytest.raises(UserError, match=r"loss is nan in epoch 2, step 2.*earlier epochs are kept"):
        train_tiny(images, tmp_path)
    run = tmp_path / "run"
    assert len(read_summary(run)) == 1 and load_file(run / "nan_batch.safetensors")["input"].shape == (4, 3, 32, 32)
    assert all(v.isfinite().all() for v in load_file(run / "last.safetensors").values())


def test_weights_that_break_in_the_last_step_are_not_saved(images, tmp_path, monkeypatch):
    def bad_evaluation(*_, **__):
        return {"loss": float("nan"), "top1": 0.0, "top5": 0.0, "samples": 7}

    monkeypatch.setattr(ending, "evaluate", bad_evaluation)
    with pytest.raises(UserError, match="validation loss is nan after epoch 1"):
        train_tiny(images, tmp_path)
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_ctrl_c_says_what_is_kept(images, tmp_path, monkeypatch, capsys):
    one_epoch = loop.train_one_epoch

    def interrupted(run):
        if run.progress.epoch == 1:
            raise KeyboardInterrupt
        return one_epoch(run)

    monkeypatch.setattr(epochs, "train_one_epoch", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train_tiny(images, tmp_path)
    assert stopped.value.code == 130
    said = f"stopped by Ctrl-C in epoch 2; 1 finished epochs are kept in {tmp_path / 'run'}. Go on from the last"
    assert said in capsys.readouterr().out


def test_without_matplotlib_the_run_says_so_once(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    run = train_tiny(images, tmp_path, "--report")
    output = capsys.readouterr().out
    for name in ("learning_curve.png", "report.html"):
        assert output.count(f"no {name}: matplotlib is not installed") == 1
    assert len(read_summary(run)) == 2 and not list(run.rglob("*.png")) and not (run / "report.html").exists()


def test_last_line_says_how_to_load_the_result(images, tmp_path, capsys):
    run = train_tiny(images, tmp_path, "--epochs", "1")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == f"load it: import timm, timm_faim; model = timm.create_model('local-dir:{run}', pretrained=True)"
    scope: dict = {}
    exec(last.removeprefix("load it: "), scope)
    assert scope["model"].num_classes == 3


def test_skipped_images_are_reported_after_each_epoch(tmp_path, capsys):
    images = make_images(tmp_path / "images")
    (images / "val" / "dog" / "1.png").write_bytes(b"no image")
    run = train_tiny(images, tmp_path, "--skip-unreadable")
    assert [row["eval_samples"] for row in read_summary(run)] == ["6", "6"]
    assert capsys.readouterr().out.count("1 unreadable images left out so far") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "faim_resnet10x"], r"unknown model 'faim_resnet10x'\. Did you mean faim_resnet10t"),
        (["--model", "resnet10x"], r"unknown model 'resnet10x'\. Did you mean resnet10t"),
        (["--faim-cfg", "margn=0.2"], r"cannot create faim_test_resnet: unknown faim_cfg key 'margn'.*margin"),
        (["--faim-cfg", "lambda_init=-0.1"], r"lambda_init.*-0\.1"),
        (["--faim-cfg", "scale_init=0"], r"scale_init.*0"),
        (["--opt", "adamww"], r"unknown --opt adamww\. Did you mean.* adamw"),
        (["--mean", "0.5", "0.5"], r"--mean and --std need one number, or one per channel \(3\)"),
        (["--model-kwargs", "no_such=1"], r"cannot create faim_test_resnet.*no_such"),
        (["--initial-checkpoint", "no/such.safetensors"], r"--initial-checkpoint no/such\.safetensors is no file"),
        (["--initial-checkpoint", __file__], r"cannot create faim_test_resnet"),
        (["--aug", "--aa", "nonsense"], r"timm cannot make the image transforms: AssertionError.*Check --aa"),
        (["--interpolation", "foo"], r"timm cannot make the image transforms: KeyError.*--interpolation"),
        (["--opt-betas", "0.9"], r"--opt adamw: "),
        (["--skip-unreadable", "--dataset", "wds/"], r"--skip-unreadable is for images that are read"),
    ],
)
def test_bad_input_stops_before_any_work(images, tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(epochs, "train_one_epoch", lambda *_: pytest.fail("training has begun"))
    with pytest.raises(UserError, match=message):
        train_tiny(images, tmp_path, *argv)


def command(*argv, launcher=(sys.executable,), **env):
    return run_group([*launcher, str(ROOT / "train_faim.py"), *map(str, argv)], {**os.environ, **env}, timeout=150)


def two_processes(*argv):
    # `accelerate launch --cpu --num_processes 2` runs one process without a word; this starts two.
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
    ]
    return command(*argv, launcher=launcher, ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")


def test_errors_are_one_line_and_exit_status_1(tmp_path):
    result = command("--data-dir", tmp_path / "nowhere")
    assert result.returncode == 1
    assert re.fullmatch(r"train_faim: error: --data-dir .*nowhere does not exist.*\n", result.stderr)


def test_two_processes_count_each_image_once_and_agree_with_one(images, tmp_path):
    result = two_processes(
        "--data-dir",
        images,
        "--output",
        tmp_path,
        "--experiment",
        "run",
        "--model",
        "faim_test_resnet",
        *TINY,
        "--faim-cfg",
        "margin=0.1",
        "--grad-accum-steps",
        "2",
        "--model-ema",
        "--model-ema-decay",
        "0.5",
        "-b",
        "2",
    )
    assert result.returncode == 0, result.stderr
    assert "; 2 x cpu;" in result.stdout
    assert result.stdout.count("load it:") == 1
    rows = read_summary(tmp_path / "run")
    assert [row["eval_samples"] for row in rows] == ["7", "7"]

    _, alone = evaluate_run(tmp_path / "run", images)
    best = max(rows, key=lambda row: float(row["eval_top1"]))
    assert alone["samples"] == 7
    assert alone["top1"] == pytest.approx(float(best["eval_top1"]))
    assert alone["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-5)


def test_two_processes_report_a_shared_error_once(tmp_path):
    result = two_processes("--data-dir", tmp_path / "nowhere")
    assert result.returncode != 0
    assert result.stderr.count("train_faim: error:") == 1


def test_two_processes_stop_when_one_meets_an_unreadable_image(tmp_path):
    images = make_images(tmp_path / "images")
    (images / "val" / "dog" / "1.png").write_bytes(b"no image")  # the last of 7: only the first process reads it
    result = two_processes("--data-dir", images, "--output", tmp_path, "--model", "faim_test_resnet", *TINY, "-b", "2")
    assert result.returncode != 0
    assert re.search(r"train_faim: error \(process 0\): cannot read image .*dog/1\.png", result.stderr)


def test_a_wrong_option_does_not_cost_the_name_of_the_run(images, tmp_path):
    with pytest.raises(UserError, match="adamww.*adamw"):
        train_tiny(images, tmp_path, "--opt", "adamww")
    run = train_tiny(images, tmp_path, "--epochs", "1")
    assert (run / "model_best.safetensors").is_file()


def test_the_rate_that_follows_the_batch_is_on_record(images, tmp_path):
    run = tmp_path / "run"
    words = [word for word in TINY if word not in ("--lr", "0.003")]
    train(
        "--data-dir",
        images,
        "--output",
        tmp_path,
        "--experiment",
        "run",
        "--model",
        "faim_test_resnet",
        *words,
        "--epochs",
        "1",
        "--lr-base",
        "0.01",
    )
    assert yaml.safe_load((run / "args.yaml").read_text())["lr"] == pytest.approx(0.01 * (4 / 256) ** 0.5)


def evaluation_in(folder):
    (written,) = folder.glob("*/eval.json")
    return json.loads(written.read_text())["metrics"]


def test_evaluation_alone_is_that_of_the_run(faim_run, images, tmp_path):
    best = max(read_summary(faim_run), key=lambda row: float(row["eval_top1"]))
    shutil.copytree(images / "val", tmp_path / "data" / "val")  # no training images are needed
    train("--eval-only", "--resume", faim_run, "--output", tmp_path / "a")  # not into the run's own folder
    model = f"local-dir:{faim_run}"
    train("--eval-only", "--model", model, "--data-dir", tmp_path / "data", "--output", tmp_path / "b", "-j", "0")
    for folder in ("a", "b"):
        metrics = evaluation_in(tmp_path / folder)
        assert metrics["samples"] == 7
        assert metrics["top1"] == pytest.approx(float(best["eval_top1"]))
        assert metrics["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-5)


def test_evaluation_alone_ignores_options_of_training(faim_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(faim_run, run)
    with (run / "args.yaml").open("a") as recipe:
        recipe.write("fsdp: true\nwandb_resume_id: x\npush_to_hub: me/pets\nhub_private: true\n")
    train("--eval-only", "--resume", run, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="--push-to-hub publishes a training"):
        train("--eval-only", "--resume", run, "--push-to-hub", "me/pets", "--output", tmp_path / "out")
    with pytest.raises(UserError, match=r"checkpoint-0003-00000000 holds those that training goes on from.*--resume"):
        train("--eval-only", "--resume", run / "checkpoints" / "checkpoint-0003-00000000", "--output", tmp_path / "out")


def test_evaluation_on_other_classes_is_refused(faim_run, tmp_path):
    for classes, message in [
        (("bird", "cat"), "model has 3 classes and the validation data 2"),
        (("bird", "cat", "wolf"), "class 2 is 'wolf' here and 'dog' in the model"),
    ]:
        data = make_images(tmp_path / f"{len(classes)}{classes[-1]}", classes=classes)
        with pytest.raises(UserError, match=message):
            train("--eval-only", "--model", f"local-dir:{faim_run}", "--data-dir", data, "--output", tmp_path)


def test_a_dry_run_shows_the_plan_and_writes_nothing(images, tmp_path, capsys):
    train_tiny(images, tmp_path, "--dry-run", "--lr-scale-mu", "10")
    output = capsys.readouterr().out
    for part in (
        "2 epochs of 3 updates of 4 images",
        "mu: 288 parameters, highest learning rate 0.03",
        "memory of training:",
        "validation batch: loss",
    ):
        assert part in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["--cache-views", "2"], ["--model-ema", "--model-ema-decay", "0.5"]])
def test_cached_features_train_the_head_alone(images, tmp_path, argv):
    options = ["--head-only", "--cache-features", "--epochs", "3", "--lr", "0.01", *argv]
    run = train_tiny(images, tmp_path, *options)
    saved = load_file(run / "last.safetensors")
    start = timm.create_model("faim_test_resnet", num_classes=3).state_dict().keys()
    assert saved.keys() == set(start)
    _, again = evaluate_run(run, images)
    best = max(read_summary(run), key=lambda row: float(row["eval_top1"]))
    assert again["top1"] == pytest.approx(float(best["eval_top1"]))
    assert again["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-4)


def test_cached_features_are_those_of_training_the_head_on_clean_images(images, tmp_path):
    """With --no-aug and no random crop the cached run computes what --head-only computes."""
    options = ["--head-only", "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0", "--crop-pct", "1"]
    cached = train_tiny(images, tmp_path / "a", *options, "--cache-features")
    slow = train_tiny(images, tmp_path / "b", *options)
    for a, b in zip(read_summary(cached), read_summary(slow), strict=True):
        assert float(a["eval_loss"]) == pytest.approx(float(b["eval_loss"]), rel=1e-4)
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)


def test_a_frozen_backbone_stays_as_it_was(images, tmp_path):
    first = load_file(train_tiny(images, tmp_path / "a", "--head-only", "--epochs", "1") / "last.safetensors")
    second = load_file(train_tiny(images, tmp_path / "b", "--head-only", "--epochs", "2") / "last.safetensors")
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed and all(key.startswith("fc.") for key in changed)


def test_trackers_get_the_numbers_of_every_epoch(images, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_tiny(images, tmp_path, "--log-with", "tensorboard")
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents*") if path.parent.name == "timm_faim"}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    logged = [event.value for event in events.Scalars("eval_loss")]
    assert logged == pytest.approx([float(row["eval_loss"]) for row in read_summary(run)])


def test_a_tracker_that_is_not_installed(images, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--log-with swanlab needs its package: pip install swanlab"):
        train_tiny(images, tmp_path, "--log-with", "swanlab")


def test_an_epoch_without_validation_leaves_its_cells_empty(images, tmp_path):
    run = train_tiny(images, tmp_path, "--epochs", "4", "--val-interval", "3")
    rows = read_summary(run)
    assert [row["eval_top1"] != "" for row in rows] == [False, False, True, True]  # the last epoch is always evaluated
    assert all(float(row["lr"]) >= 0 and row["train_loss"] for row in rows)
    assert {p.name for p in (run / "top").iterdir()} == {"epoch_0003.safetensors", "epoch_0004.safetensors"}


def test_refitted_heads_are_class_statistics_of_the_trained_features(images, tmp_path):
    run = train_tiny(images, tmp_path, "--head-refit", "1", "--epochs", "2", "--lr", "1e-2")
    model, metrics = evaluate_run(run, images)
    (head,) = faim_heads(model).values()
    assert head.center is not None and model.faim_cfg["preset"] == "indicatrix"
    last = load_file(run / "last.safetensors")
    names = [name for name in last if name.endswith("center")]
    assert len(names) == 1 and last[names[0]].abs().sum() > 0
    prototypes = last[names[0].replace("center", "mu")]
    head.load_state_dict({name: last[names[0].replace("center", name)] for name in head.state_dict()})
    torch.testing.assert_close(head.metric.norm(prototypes), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("other", ["--cache-features --head-only", "--fsdp", "--aug-splits 2"])
def test_refit_needs_whole_models(other):
    assert parse_args([]).head.head_refit == 3  # the demo
    assert parse_args(["--head-refit", "-1"]).head.head_refit is None
    assert parse_args(other.split()).head.head_refit is None, "what the recipe asks for gives way"
    with pytest.raises(UserError, match=f"--head-refit does not go with {other.split()[0]}"):
        parse_args(f"--data-dir d --model faim_resnet18 --head-refit 1 {other}".split())


def test_too_many_workers_are_said_once(tmp_path):
    images = make_images(tmp_path / "images")
    script = Path(__file__).parents[1] / "train_faim.py"
    options = ["--data-dir", images, "--output", tmp_path, "--model", "faim_test_resnet", *TINY, "--workers", "8",
               "--dry-run"]  # fmt: skip
    got = subprocess.run([sys.executable, "-W", "always", script, *map(str, options)], capture_output=True, text=True)
    assert got.returncode == 0 and got.stderr.count("This DataLoader will create 8 worker") <= 1, got.stderr
