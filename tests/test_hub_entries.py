"""Entries of hub_configs/: their form, and the tags that they become in timm's registry."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_faim.commands import run_command
from timm_faim.hub import entries, save_model
from timm_faim.hub.entries import check_entry, probe_logits, write_entry
from timm_faim.models.published import EntryError, entry_files, read_entry
from timm_faim.run.errors import UserError
from timm_faim.training.args import parse_args

ROOT = Path(__file__).parents[1]
NAME = "faim_resnet10t.my_data"
command = partial(run_command, "hub")


@pytest.fixture
def template():
    return yaml.safe_load((ROOT / "hub_configs" / "template.yaml").read_text())


def write(folder, content, name=NAME):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_template_is_a_valid_entry(template, tmp_path):
    entry = read_entry(write(tmp_path, template))
    assert (entry.name, entry.repo_id, entry.revision) == (NAME, f"timm-faim/{NAME}", None)
    cfg = entry.cfg()
    assert cfg.input_size == (1, 56, 56) and cfg.num_classes == 3 and not cfg.has_weights
    assert check_entry(entry.path).state == "form; not published"


def test_every_shipped_entry_is_usable():
    for path in entry_files():
        verdict = check_entry(path, offline=True)
        assert not verdict.problem, verdict
        entry = read_entry(path)
        assert not entry.recipe or parse_args(["-c", str(ROOT / entry.recipe), "--data-dir", "d"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archtecture": "x"}, "unknown key 'archtecture'. Did you mean 'architecture'"),
        ({"license": None}, "license is missing"),
        ({"num_classes": "3"}, "num_classes must be int, got '3'"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"architecture": "resnet10t"}, "architecture must begin with faim_, got 'resnet10t'"),
        ({"architecture": "../x"}, "architecture must be faim_ and an architecture"),
        ({"tag": "a/b"}, "tag must be letters, digits"),
        ({"repo_id": "only_name"}, "repo_id must be ORG/NAME"),
        ({"revision": "main", "sha256": "0" * 64}, "revision must be a commit of 40 hex digits, got 'main'"),
        ({"revision": "0" * 40}, "revision and sha256 belong together"),
        ({"revision": "0" * 40, "sha256": "0" * 63}, "sha256 must be 64 hex digits"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "pretrained_cfg.file is not known"),
        (
            {"pretrained_cfg": {"input_sizes": [1]}},
            "pretrained_cfg.input_sizes is not known. Did you mean 'input_size'",
        ),
        ({"probe_logits": [1.0, "2"]}, "probe_logits must hold numbers"),
        ({"probe_logits": [10**400]}, "probe_logits must hold numbers"),
        ({"probe_logits": [float("nan")]}, "probe_logits must hold numbers"),
        ({"metrics": {"top1": "high"}}, "metrics must hold numbers"),
        ({"metrics": {"top1": float("inf")}}, "metrics must hold numbers"),
        ({"license": ""}, "license must be an identifier of the Hub such as apache-2.0, got ''"),
        ({"dataset": {"name": ["x"]}}, "dataset must hold a name and an id, got 'name'"),
        ({"dataset": {"path": "/srv/x"}}, "dataset must hold a name and an id, got 'path'"),
        ({"dataset": {"id": "a/b/c"}}, "dataset.id must be a name on the Hub, NAME or ORG/NAME, got 'a/b/c'"),
        ({"pretrained_cfg": {"input_size": 5}}, "pretrained_cfg: input_size must be three whole numbers"),
        ({"pretrained_cfg": {"mean": "x"}}, "pretrained_cfg: mean must be a list of finite numbers"),
        ({"pretrained_cfg": {"std": [0]}}, "pretrained_cfg: std must be a list of finite numbers above 0"),
        ({"pretrained_cfg": {"crop_pct": -5}}, "pretrained_cfg: crop_pct must be a number in 0.01..10"),
        ({"pretrained_cfg": {"interpolation": "cubic"}}, "pretrained_cfg: interpolation must be one of"),
        ({"pretrained_cfg": {"crop_mode": "middle"}}, "pretrained_cfg: crop_mode must be one of"),
        (
            {"label_file": "../labels.txt"},
            "label_file must be the name of a file beside the entry, got '../labels.txt'",
        ),
        ({"label_file": "none.txt"}, "label_file none.txt cannot be read"),
        ({"label_file": "two.txt"}, "label_file two.txt has 2 names, num_classes is 3"),
    ],
)
def test_a_wrong_entry_names_the_key(template, tmp_path, change, message):
    (tmp_path / "two.txt").write_text("a\nb\n")
    with pytest.raises(EntryError, match=message) as error:
        read_entry(write(tmp_path, template | change))
    assert str(tmp_path) in str(error.value)


def test_the_file_has_the_name_of_the_checkpoint(template, tmp_path):
    with pytest.raises(EntryError, match=f"must be called {NAME}.yaml"):
        read_entry(write(tmp_path, template, "faim_resnet10t.other"))


@pytest.mark.parametrize("text", ["[", "- a", ""])
def test_files_that_are_no_entries(tmp_path, text):
    (tmp_path / "faim_x.yaml").write_text(text)
    with pytest.raises(EntryError, match="cannot be read|must hold"):
        read_entry(tmp_path / "faim_x.yaml")
    assert check_entry(tmp_path / "faim_x.yaml").problem


def test_an_architecture_that_does_not_exist(template, tmp_path):
    path = write(tmp_path, template | {"architecture": "faim_resnet10x"}, "faim_resnet10x.my_data")
    assert "timm_faim has no faim_resnet10x; faim_resnet10t?" in check_entry(path).problem


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg=dict(space="sphere", margin=0.1))
    return save_model(model, tmp_path / "run", label_names=["a", "b", "c"])


def test_an_entry_written_from_a_run(run, tmp_path, capsys):
    argv = ["entry", str(run), "--tag", "mine", "--license", "mit", "--dataset-name", "Pets", "--folder", str(tmp_path)]
    assert command(argv) == 0
    entry = read_entry(tmp_path / "faim_test_resnet.mine.yaml")
    assert entry.label_names() == ["a", "b", "c"] and entry.dataset == {"name": "Pets"} and entry.license == "mit"
    assert entry.model_args["faim_cfg"]["margin"] == 0.1
    assert entry.probe_logits == probe_logits(timm.create_model(f"local-dir:{run}", pretrained=True))
    with pytest.raises(UserError, match="exists. Choose another --tag"):
        command(argv)
    assert command(["check", "--offline", str(entry.path)]) == 0
    assert "1 entries, 0 failed" in capsys.readouterr().out


def test_push_all_refuses_weights_that_the_entry_does_not_describe(run, tmp_path, capsys):
    runs = tmp_path / "runs"
    command(["entry", str(run), "--tag", "mine", "--license", "mit", "--folder", str(tmp_path)])
    torch.manual_seed(1)
    save_model(timm.create_model("faim_test_resnet", num_classes=3), runs / "faim_test_resnet.mine", ["a", "b", "c"])
    assert command(["push-all", str(runs), "--folder", str(tmp_path)]) == 1
    assert "the probe's logits differ" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert command(["push-all", str(tmp_path / "none"), "--folder", str(tmp_path)]) == 0
    assert "left out, no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runs", "folder", "message"),
    [
        (".", "missing", "--folder .*missing is no folder. Name the folder that holds the entries"),
        ("missing", ".", "RUNS_DIR .*missing is no folder. Name the folder that holds the runs"),
    ],
)
def test_push_all_of_a_folder_that_is_not_there(tmp_path, runs, folder, message):
    with pytest.raises(UserError, match=message):
        command(["push-all", str(tmp_path / runs), "--folder", str(tmp_path / folder)])


REGISTRY = """
import json, logging, timm
logging.basicConfig(level="WARNING")
import timm_faim

name = "faim_test_resnet.mine"
cfg = timm.models.get_pretrained_cfg(name)
model = timm.create_model(name, num_classes=None)
fresh = timm.create_model(name, num_classes=7, faim_cfg=dict(margin=0.3))
try:
    timm.create_model(name, pretrained=True)
except RuntimeError as e:
    error = str(e)
print(json.dumps({
    "hub_id": cfg.hf_hub_id, "size": cfg.input_size, "listed": timm.list_pretrained("faim_test_resnet*"),
    "classes": model.num_classes, "margin": model.faim_cfg["margin"], "names": model.pretrained_cfg["label_names"],
    "fresh": [fresh.num_classes, fresh.faim_cfg["margin"]], "error": error,
    "default": timm.models.get_pretrained_cfg("faim_test_resnet").tag,
}))
"""


def test_entries_become_tags_of_the_registry(run, tmp_path):
    command(["entry", str(run), "--tag", "mine", "--license", "mit", "--folder", str(tmp_path)])
    published = yaml.safe_load((tmp_path / "faim_test_resnet.mine.yaml").read_text())
    published |= {"tag": "out", "revision": "a" * 40, "sha256": "b" * 64}
    write(tmp_path, published, "faim_test_resnet.out")
    (tmp_path / "faim_broken.yaml").write_text("[")
    environment = {**os.environ, "TIMM_FAIM_HUB_CONFIGS": str(tmp_path), "TIMM_FAIM_HUB_ORG": "me"}
    result = subprocess.run(
        [sys.executable, "-c", REGISTRY], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["listed"] == ["faim_test_resnet.out", "faim_test_resnet.r160_in1k"]
    assert found["hub_id"] is None and found["size"] == [3, 160, 160] and found["default"] == "r160_in1k"
    assert (found["classes"], found["margin"], found["names"]) == (3, 0.1, ["a", "b", "c"])
    assert found["fresh"] == [7, 0.3]
    assert "faim_test_resnet.mine is not published yet" in found["error"]
    assert "left out" in result.stderr and "faim_broken.yaml" in result.stderr  # and the others are there all the same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 10**9, "label_file": None}, "num_classes must be a whole number in 0..1000000"),
        ({"model_args": {"faim_cfg": {"foo": 1}}}, "unknown faim_cfg key 'foo'"),
        ({"model_args": {"layers": [100_000, 1, 1, 1]}}, "layers must not exceed 1000"),
        ({"model_args": {"act_layer": "reluu"}}, "model_args do not build faim_resnet10t"),
        ({"model_args": {"no_such_argument": 1}}, "unexpected keyword argument 'no_such_argument'"),
    ],
)
def test_offline_checks_see_what_opening_would_refuse(template, tmp_path, change, message):
    verdict = check_entry(write(tmp_path, template | change), offline=True)
    assert verdict.state == "form" and message in verdict.problem


def test_a_folder_of_entries_that_is_not_there(tmp_path):
    model = timm.create_model("faim_test_resnet", num_classes=3)
    run = save_model(model, tmp_path / "run", ["a", "b", "c"])
    with pytest.raises(UserError, match="--folder .*missing is no folder"):
        write_entry(run, tmp_path / "missing", "t", license="mit", dataset={"name": "x"})


@pytest.mark.parametrize(
    ("tag", "license", "labels", "message"),
    [
        ("a.b", "mit", ["a", "b", "c"], "entries/faim_test_resnet.a.b.yaml: tag must be letters"),
        ("t", "", ["a", "b", "c"], "license must be an identifier of the Hub"),
        ("t", "mit", ["a", "b\nc", "d"], "has 4 names, num_classes is 3"),
        ("mine", "", ["a", "b", "c"], "mine.labels.txt exists. Choose another --tag"),
    ],
)
def test_an_entry_that_is_not_valid_leaves_nothing(tmp_path, tag, license, labels, message):
    model = timm.create_model("faim_test_resnet", num_classes=3)
    run = save_model(model, tmp_path / "run", labels)
    (tmp_path / "entries").mkdir()
    there = tmp_path / "entries" / "faim_test_resnet.mine.labels.txt"
    there.write_text("mine")
    with pytest.raises(UserError, match=message):
        write_entry(run, tmp_path / "entries", tag, license=license, dataset={"name": "x"})
    assert list((tmp_path / "entries").iterdir()) == [there] and there.read_text() == "mine"


def test_publishing_and_checking_allow_what_machines_differ_by(template, tmp_path):
    entry = read_entry(write(tmp_path, template | {"probe_logits": [10.0, -20.0]}))
    assert entries._other_logits([10.0 + 0.015, -20.0], entry) == ""
    assert "differ by 0.0015 of their size" in entries._other_logits([10.03, -20.0], entry)
    assert "differ by nan" in entries._other_logits([float("nan"), -20.0], entry)
    assert "has 1 logits, recorded are 2" in entries._other_logits([10.0], entry)
