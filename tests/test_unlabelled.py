"""`timm-faim fit --unlabelled` and `timm-faim predict --adapt`."""

import json
import shutil

import pytest
import runs
import torch
from fitted import fit, save_backbone
from PIL import Image
from safetensors.torch import load_file

from timm_faim.fitting.unlabelled import without
from timm_faim.run.errors import UserError
from timm_faim.run.record import record_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("unlabelled") / "data", train=6, val=6)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone") / "test_resnet.safetensors")


@pytest.fixture
def photos(data, tmp_path):
    """The validation images in one folder and one below it, as they come from a camera."""
    for i, path in enumerate(sorted((data / "val").glob("*/*.png"))):
        folder = tmp_path / "photos" / ("trip" if i % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def train_only(data, tmp_path):
    shutil.copytree(data / "train", tmp_path / "train_only")
    return tmp_path / "train_only"


def record(run):
    return record_of(json.loads((run / "config.json").read_text()))


def mu(run):
    return load_file(run / "model.safetensors")["fc.mu"]


@pytest.mark.parametrize("moments", [(), ("--faim-cfg", "moments=True")], ids=["mean", "moments"])
def test_a_fit_follows_them_and_says_so(train_only, photos, backbone, tmp_path, capsys, moments):
    plain = fit(train_only, tmp_path, backbone, *moments, experiment="plain")
    capsys.readouterr()
    followed = fit(train_only, tmp_path, backbone, "--unlabelled", photos, *moments, experiment="followed")
    said = capsys.readouterr().out
    found = record(followed)["fit"]["unlabelled"]
    assert found["images"] == len(list(photos.rglob("*.png"))) and 0 < found["used"] <= found["images"]
    assert "found in the cache" in said  # the labelled images' features are those of before
    assert f"{found['images']} unlabelled images. This assumes that" in said
    assert f"{found['check']['before']:.1f} -> {found['check']['after']:.1f} %" in said
    assert found["kept"] == (not torch.equal(mu(plain), mu(followed)))
    assert record(plain)["fit"] == {"shrinkage": 0.3}


def test_validation_images_are_the_check_and_never_unlabelled(data, photos, backbone, tmp_path, capsys):
    shutil.copytree(data / "train", photos / "again")
    image = Image.open(data / "val" / "cat" / "0.png")
    image.putpixel((0, 0), (0, 0, 0))
    image.save(photos / "new.png")
    (photos / "broken.png").write_bytes(b"no image")
    run = fit(data, tmp_path, backbone, "--unlabelled", photos)
    said, found = capsys.readouterr().out, record(run)["fit"]["unlabelled"]
    assert f"2 unlabelled images; {19 + 18} labelled ones are left out" in said
    assert (found["images"], found["check"]["images"]) == (1, 19)
    assert record(run)["calibration"]["source"] == "validation"


def test_a_check_that_fails_leaves_the_head(data, backbone, tmp_path, capsys, monkeypatch):
    plain = fit(data, tmp_path, backbone, experiment="plain")
    image = Image.open(data / "val" / "cat" / "0.png")
    image.putpixel((0, 0), (0, 0, 0))
    image.save(tmp_path / "one.png")
    monkeypatch.setattr("timm_faim.adapt.Check.kept", False)
    run = fit(data, tmp_path, backbone, "--unlabelled", tmp_path, "--cache", tmp_path / "cache")
    assert ", not kept;" in capsys.readouterr().out and record(run)["fit"]["unlabelled"]["kept"] is False
    assert torch.equal(mu(plain), mu(run)) and record(plain)["calibration"] == record(run)["calibration"]


def test_one_image_a_class_cannot_be_checked(photos, backbone, tmp_path, capsys):
    data = runs.make_images(tmp_path / "few", train=1, val=1)
    run = fit(data / "train", tmp_path, backbone, "--unlabelled", photos)
    assert "no image can be held out" in capsys.readouterr().out and not record(run)["fit"]["unlabelled"]["kept"]


@pytest.mark.parametrize("case", ["none", "own", "missing", "file", "broken", "flat", "proportions"])
def test_what_cannot_be_is_one_error(case, data, backbone, tmp_path):
    folder, words = tmp_path / "photos", ()
    if case != "missing":
        folder.mkdir()
    if case == "file":
        folder = data / "train" / "cat" / "0.png"
    if case == "own":
        folder = data / "train"
    if case == "broken":
        (folder / "a.png").write_bytes(b"no image")
    if case == "flat":
        words = ("--faim-cfg", "space=flat")
    says = {"none": "no images in", "own": "are labelled images", "missing": "no folder", "file": "no folder"}
    says |= {"broken": "can be read", "flat": "of cosines", "proportions": "Give --unlabelled DIR"}
    words += ("--proportions", "training") if case == "proportions" else ("--unlabelled", folder)
    with pytest.raises(UserError, match=says[case]):
        fit(data, tmp_path / "out", backbone, *words)
    assert not (tmp_path / "out" / "run").exists()


def test_copies_and_links_are_the_same_image(data, tmp_path):
    first, second = sorted((data / "train").glob("*/*.png"))[:2]
    shutil.copy(first, tmp_path / "copy.png")
    (tmp_path / "link.png").symlink_to(second)
    (tmp_path / "new.png").write_bytes(first.read_bytes()[:-1] + b"x")  # of the same size
    paths = [str(tmp_path / name) for name in ("copy.png", "link.png", "new.png")]
    assert without(paths, [str(first), str(second)]) == paths[2:]
    assert without(paths, []) == paths
