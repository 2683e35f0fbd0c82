"""What the network sees of an image, chosen before the fit or the training (--crop-mode auto)."""

import json

import numpy as np
import pytest
import runs
import timm
import torch
import yaml
from fitted import fit, save_backbone
from PIL import Image

import timm_faim
from timm_faim.commands import build_parser
from timm_faim.images.crops import Crop, crops_of, spread_sample
from timm_faim.run.errors import UserError
from timm_faim.training.data import SquashedCrop
from timm_faim.training.inputs import best_of


def wide_images(root, count=6, splits=("train", "val")):
    """Images of 96 x 32 pixels of three classes that differ at the left and the right border alone."""
    generator = np.random.default_rng(0)
    for split in splits:
        for k, name in enumerate(("bird", "cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (32, 96, 3), np.uint8)
                pixels[:, :28, k] += 120
                pixels[:, -28:, k] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return wide_images(tmp_path_factory.mktemp("wide") / "data")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone") / "test_resnet.safetensors")


@pytest.fixture(scope="module")
def chosen(data, backbone, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("out"), backbone, "--crop-mode", "auto")


def saved(run):
    cfg = json.loads((run / "config.json").read_text())["pretrained_cfg"]
    return cfg["crop_mode"], cfg["crop_pct"]


def test_what_shows_the_borders_is_chosen_and_saved(chosen, data):
    mode, pct = saved(chosen)
    assert mode in ("squash", "border") and pct == 1.0
    recipe = yaml.safe_load((chosen / "args.yaml").read_text())
    assert (recipe["crop_mode"], recipe["crop_pct"]) == (mode, pct)
    assert json.loads((chosen / "eval" / "eval.json").read_text())["metrics"]["top1"] == 100.0
    config = timm.data.resolve_data_config({}, model=timm.create_model(f"local-dir:{chosen}", pretrained=True))
    assert (config["crop_mode"], config["crop_pct"]) == (mode, pct)
    predict = timm_faim.load(chosen)
    paths = sorted((data / "val").glob("*/*.png"))
    assert [p.name for p in predict(paths)] == [path.parent.name for path in paths]


def test_it_is_said_and_kept(data, backbone, tmp_path, capsys, monkeypatch):
    fit(data, tmp_path, backbone, "--crop-mode", "auto", "--faim-cfg", "moments=True", experiment="a")
    said = capsys.readouterr().out
    assert "input: squash (18 held-out training images: " in said or "input: border (18 held-out" in said
    monkeypatch.setattr("timm_faim.fitting.inputs.run_trial", lambda *args: pytest.fail("the backbone runs"))
    fit(data, tmp_path, backbone, "--crop-mode", "auto", "--faim-cfg", "moments=True", experiment="b")
    assert saved(tmp_path / "a") == saved(tmp_path / "b")
    line = next(line for line in said.splitlines() if line.startswith("input:"))
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--crop-mode", "model"], ("center", 0.95)), (["--crop-mode", "squash", "--crop-pct", "0.9"], ("squash", 0.9))],
)
def test_the_users_choice_stands(data, backbone, tmp_path, capsys, argv, expected):
    assert saved(fit(data, tmp_path, backbone, *argv)) == expected
    assert "input:" not in capsys.readouterr().out
    assert build_parser("fit").parse_args(["DIR"]).crop_mode == "auto"


def test_one_image_a_class_keeps_the_models_own(backbone, tmp_path, capsys):
    images = wide_images(tmp_path / "data", 1)
    assert saved(fit(images, tmp_path, backbone, "--crop-mode", "auto")) == ("center", 0.95)
    assert (
        "input: center 0.95 (nothing can be held out: no class has two images that differ)" in capsys.readouterr().out
    )


def test_one_class(backbone, tmp_path, capsys):
    images = runs.make_images(tmp_path / "data", classes=("ant",), train=3, val=2)
    assert saved(fit(images, tmp_path, backbone, "--crop-mode", "auto"))[0] == "center"
    assert "input: center 0.95 (there is one class)" in capsys.readouterr().out


def test_an_unreadable_image_is_an_error_or_left_out(backbone, tmp_path, capsys):
    images = wide_images(tmp_path / "data")
    (images / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*dog/1\.png"):
        fit(images, tmp_path, backbone, "--crop-mode", "auto")
    fit(images, tmp_path, backbone, "--crop-mode", "auto", "--skip-unreadable")
    assert "(17 held-out training images" in capsys.readouterr().out


def train(data, backbone, output, *argv, experiment="run"):
    runs.fresh_accelerator()
    words = [data, *runs.TINY, "--model", "faim_test_resnet", "--pretrained-path", backbone, "--output", output]
    from timm_faim.train import train as train_run

    train_run([str(word) for word in (*words, "--crop-mode", "auto", "--experiment", experiment, *argv)])
    return output / experiment


def test_a_training_chooses_once(data, backbone, tmp_path, capsys, monkeypatch):
    run = train(data, backbone, tmp_path)
    assert saved(run)[0] in ("squash", "border") and "input: " in capsys.readouterr().out
    recipe = yaml.safe_load((run / "args.yaml").read_text())
    assert (recipe["crop_mode"], recipe["crop_pct"]) == saved(run)
    assert recipe.get("train_crop_mode") == ("squash" if saved(run)[0] == "squash" else None)
    monkeypatch.setattr("timm_faim.training.inputs.run_trial", lambda *args: pytest.fail("it chooses again"))
    train(data, backbone, tmp_path, "--resume", "auto", "--epochs", "3")
    said = capsys.readouterr().out
    assert "resuming from" in said and "option crop" not in said and saved(run)[0] == recipe["crop_mode"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--crop-mode auto looks through a pretrained backbone: give --pretrained"),
        (["--pretrained", "--eval-only"], "--crop-mode auto chooses before a training"),
    ],
)
def test_what_cannot_choose(argv, message):
    with pytest.raises(UserError, match=message):
        runs.options_of("--crop-mode", "auto", *argv)


def test_the_first_within_the_noise_of_the_best():
    def right(*rows):
        return np.array([[c == "1" for c in row] for row in rows])

    assert best_of(right("1110000000", "1111100000")) == 1  # 2 more, noise 1.4
    assert best_of(right("1110000000", "1111000000")) == 0  # 1 more, noise 1
    assert best_of(right("1110000000", "0011111000")) == 0  # 2 more of 5 on either side... noise 2.6
    assert best_of(right("1000000000", "1111100000", "1111110000")) == 1
    assert best_of(right("11", "11")) == 0


def test_crops_to_choose_from():
    config = {"crop_mode": "center", "crop_pct": 0.875}
    whole = [Crop(mode, 1.0) for mode in ("center", "squash", "border")]
    assert crops_of(config, True, False) == [Crop("center", 0.875), *whole]
    assert crops_of(config, False, False) == [Crop("center", 0.875), Crop("center", 1.0)]
    assert crops_of(config, False, True) == [Crop("center", 0.875)]
    assert crops_of({"crop_mode": "squash", "crop_pct": 1.0}, True, False)[0] == Crop("squash", 1.0)


def test_a_sample_is_spread_over_classes_and_images():
    target = np.repeat([0, 1, 2, 3], [100, 10, 3, 1])
    chosen = spread_sample(target, 40, 5)
    assert len(chosen) == 40 and (np.diff(chosen) > 0).all()
    assert np.bincount(target[chosen]).tolist() == [26, 10, 3, 1]
    assert np.diff(chosen[target[chosen] == 0]).max() <= 8
    many = spread_sample(np.repeat(np.arange(100), 6), 50, 5)
    assert len(many) == 50 and len(np.unique(many // 6)) == 10
    assert spread_sample(np.array([0, 0, 1]), 40, 5).tolist() == [0, 1, 2]


def test_a_squashed_crop_has_the_shape_of_its_image():
    torch.manual_seed(0)
    crop = SquashedCrop(32, scale=(0.2, 0.3), ratio=(1.0, 1.0))
    _, _, height, width = crop.get_params(Image.new("RGB", (300, 100)), crop.scale, crop.ratio)
    assert width / height == pytest.approx(3, rel=0.05)
