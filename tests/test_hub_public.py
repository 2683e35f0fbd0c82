"""What of a run is published, and what of it is refused or left out."""

import json
import re
from functools import partial

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from timm_faim.commands import run_command
from timm_faim.hub import Release, build_package, save_model
from timm_faim.hub.entries import write_entry
from timm_faim.hub.package import _dataset_of
from timm_faim.hub.public import public_options
from timm_faim.run.errors import UserError

command = partial(run_command, "hub")

REPO = "me/faim_test_resnet.pets"


@pytest.fixture
def saved(tmp_path):
    """A folder with a model in memory, to put other files beside."""
    torch.manual_seed(0)
    folder = save_model(timm.create_model("faim_test_resnet", num_classes=3), tmp_path / "saved", ["a", "b", "c"])
    (folder / "eval").mkdir()
    return folder


def changed(saved, **changes):
    config = json.loads((saved / "config.json").read_text())
    for key, value in changes.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    (saved / "config.json").write_text(json.dumps(config))


SECRET = "/home/me/<b>secret"


def test_no_file_says_more_than_is_known_to_be_public(saved, tmp_path):
    changed(
        saved,
        class_order=[SECRET],
        trained_at=SECRET,
        notes=["secret"],
        pretrained_cfg={
            "description": "secret",
            "paper_name": "secret",
            "notes": [SECRET],
            "first_conv": SECRET,
            "crop_pct": 0.9,
        },
    )
    (saved / "eval" / "eval.json").write_text(
        json.dumps(
            {
                "weights": SECRET,
                "num_classes": 3,
                "versions": {"torch": "2.1+cpu", "driver": SECRET, SECRET: "1"},
                "metrics": {"top1": 50.0, "top5": SECRET, SECRET: 1.0, "samples": float("nan"), "loss": 10**400},
            }
        )
    )
    (saved / "summary.csv").write_text(
        f"epoch,train_stage,train_loss,eval_top1,host secret,{SECRET},lr\n"
        f"0,warm-up,1.5,{SECRET},secret,1,0.1\n1,{SECRET},high,50.0,secret,1,nan\n"
    )
    (saved / "args.yaml").write_text(
        yaml.safe_dump(
            {
                "lr": 0.1,
                "pretrained": True,
                "model": "faim_test_resnet.no_such_tag",
                SECRET: 1,
                "epochs": float("inf"),
                "secret": 3,
            }
        )
    )
    weights = load_file(saved / "model.safetensors")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt", "host": "secret"})
    (saved / "learning_curve.png").write_text("secret")
    package = tmp_path / "package"
    build_package(saved, package, Release("me/plain"))
    assert [path.name for path in package.iterdir() if b"secret" in path.read_bytes()] == []
    config = json.loads((package / "config.json").read_text())
    assert (
        config.keys()
        == {"architecture", "num_classes", "num_features", "global_pool", "label_names", "model_args", "pretrained_cfg"}
        and config["pretrained_cfg"]["crop_pct"] == 0.9
    )
    assert json.loads((package / "eval.json").read_text()) == {
        "metrics": {"top1": 50.0},
        "num_classes": 3,
        "versions": {"torch": "2.1+cpu"},
    }
    assert (package / "summary.csv").read_text() == (
        "epoch,train_stage,train_loss,eval_top1,lr\n1,,1.5,,0.1\n2,,,50.0,\n"
    )
    assert yaml.safe_load((package / "train_args.yaml").read_text()) == {
        "lr": 0.1,
        "pretrained": True,
        "model": "faim_test_resnet.no_such_tag",
    }
    assert "| 1 | 1.5 |" in (package / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.csv", b"train_loss\n1.5\n", "summary.csv is damaged: a row lacks its epoch"),
        ("summary.csv", b"epoch,train_loss\nfirst,1.5\n", "summary.csv is damaged: a row lacks its epoch"),
        ("summary.csv", b"epoch,train_loss\n0,\xff\n", "cannot read .*summary.csv.*Mend it, or remove it"),
        ("eval/eval.json", b'{"metrics": [1]}', "cannot read .*eval.json.*Evaluate the run again with --eval-only"),
        ("eval/eval.json", b"[]", "cannot read .*eval.json.*Evaluate the run again"),
        ("args.yaml", b"\xff\xfe", "cannot read .*args.yaml.*Mend it, or remove it"),
        ("args.yaml", b"[" * 3000, "cannot read .*args.yaml: nested too deeply"),
    ],
)
def test_damaged_files_of_a_run_are_one_line(saved, tmp_path, name, content, message):
    (saved / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_package(saved, tmp_path / "package", Release("me/plain"))
    if name.startswith("eval"):
        with pytest.raises(UserError, match=message):
            write_entry(saved, tmp_path, "t", license="mit", dataset={})


def test_an_argument_of_the_model_that_is_a_place_is_refused(saved, tmp_path):
    changed(saved, model_args={"act_layer": SECRET})
    with pytest.raises(UserError, match="model_args may hold names and numbers, got 'act_layer': '/home"):
        build_package(saved, tmp_path / "package", Release("me/plain"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset", "me/pets", "a b"], "'a b' is no name of data or of a model on the Hub. Give NAME or ORG/NAME"),
        (["--dataset", "../pets"], "'../pets' is no name"),
        (["--base-model", "x](http://bad)"], "is no name of data or of a model"),
        (["--license", ""], "'' is no licence. Give an identifier of the Hub such as apache-2.0"),
    ],
)
def test_wrong_names_on_the_command_line(saved, tmp_path, words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command(["push", str(saved), "--repo", REPO, "--dry-run", str(tmp_path / "dry"), *words])


def test_only_what_is_known_to_be_public_is_published():
    options = {
        "model": "faim_resnet50",
        "lr": 0.1,
        "sched": "cosine",
        "amp": True,
        "mean": [0.5, 0.5, 0.5],
        "faim_cfg": {"margin": 0.2, "preset": "flat", "note": "/home/me/x"},
        "dataset": "hfds//home/me/cars",
        "log_with": ["/home/me"],
        "project_name": "secret project",
        "data_dir": "cars",
        "class_map": "names.txt",
        "model_kwargs": {"file": "/srv/w.pth", "deep": {"path": ["C:\\Users\\me", "avg"]}, "img_size": 64},
        "opt_kwargs": {"x": "~/w", "y": "secretdir/w", "amsgrad": True},
        "input_key": "../k",
        "kd_model_name": "local-dir:/home/me/run",
        "pretrained_path": "w.pth",
        "kd_distill_type": "logit",
        "train_split": "/data",
        "invented_later": "anything",
        "wandb_tags": ["me"],
    }
    assert public_options(options) == {
        "model": "faim_resnet50",
        "lr": 0.1,
        "sched": "cosine",
        "amp": True,
        "mean": [0.5, 0.5, 0.5],
        "faim_cfg": {"margin": 0.2, "preset": "flat"},
        "model_kwargs": {"deep": {"path": ["avg"]}, "img_size": 64},
        "opt_kwargs": {"amsgrad": True},
        "kd_distill_type": "logit",
    }


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"dataset": "hfds//home/me/cars"}, "cars"),
        ({"dataset": "hfds/org/cars"}, "cars"),
        ({"dataset": "omniglot242"}, "omniglot242"),
        ({"dataset": "secretdir/cars"}, "cars"),
        ({"data_dir": "/home/me/leaves/"}, "leaves"),
        ({"data_dir": "C:\\me\\leaves"}, "leaves"),
        ({}, "image folder"),
        ({"data_dir": "/x/<b>"}, "image folder"),
        ({"dataset": ["x y"]}, "image folder"),
    ],
)
def test_the_name_of_the_data_is_no_path(options, name):
    assert _dataset_of(options) == name
