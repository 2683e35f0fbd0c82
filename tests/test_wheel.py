"""The installed package, far from its repository: every command works from a wheel in an empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import runs
from fitted import save_backbone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's files alone, in front of the packages of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return wheel, folder / "site"


@pytest.fixture(scope="module")
def call(installed, tmp_path_factory):
    """Run the console script in an empty folder; what it printed."""
    _, site = installed
    here = tmp_path_factory.mktemp("empty")

    environment = os.environ | {"PYTHONPATH": str(site), "ACCELERATE_USE_CPU": "true"}
    code = "import timm_faim; print(timm_faim.__file__)"
    where = subprocess.check_output([sys.executable, "-c", code], cwd=here, env=environment, text=True)
    assert Path(where.strip()).is_relative_to(site)  # and not the repository

    def call(*words: object) -> str:
        script = [sys.executable, str(site / "bin" / "timm-faim")]
        done = subprocess.run([*script, *map(str, words)], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    call.folder = here
    return call


@pytest.mark.slow
def test_it_carries_recipes_entries_and_data(installed):
    names = set(zipfile.ZipFile(installed[0]).namelist())
    assert {
        "timm_faim/hub_configs/template.yaml",
        "timm_faim/configs/omniglot.yaml",
        "timm_faim/data/omniglot242.tar.gz",
        "timm_faim/commands/predict.py",
    } <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "examples/")) for name in names)


@pytest.mark.slow
def test_from_the_first_command_to_the_last(call, tmp_path):
    data, backbone = runs.make_images(tmp_path / "data"), save_backbone(tmp_path / "backbone.safetensors")
    quick = ["--img-size", "32", "--batch-size", "4", "--workers", "0"]
    assert call("--version").startswith("timm-faim ")
    small = ["--model", "faim_test_resnet", "--img-size", "32", "--workers", "0"]
    call("train", *small, "--epochs", "1", "--experiment", "sample", "--no-report")  # on the bundled data
    assert "top-1" in call("evaluate", "output/sample", "--workers", "0", "--experiment", "evaluated")
    call("fit", data, "--model", "faim_test_resnet", "--pretrained-path", backbone, "--experiment", "fit", *quick)
    images = [data / "val", "--workers", "0"]
    call("predict", *images, "--model", "output/fit", "-o", "found.jsonl", "--html", "found.html")
    assert len((call.folder / "found.jsonl").read_text().splitlines()) == 7
    call("classes", "rename", "output/fit", "cat", "lynx", "-o", "renamed")
    assert json.loads((call.folder / "renamed" / "config.json").read_text())["label_names"] == ["bird", "lynx", "dog"]
    call("export", "renamed", "-o", "model.pt2")
    assert "7 images" in call("predict", *images, "--model", "model.pt2")
    call("retrieve", data / "train", "--model", "output/fit", "--workers", "0", "--recall-at", "1")
    call("hub", "push", "output/fit", "--repo", "me/faim_test_resnet.pets", "--dry-run", "package")
    assert "timm-faim predict" in (call.folder / "package" / "README.md").read_text()
