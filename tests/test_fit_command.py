"""`timm-faim fit`: a classifier in one pass, saved like a training run."""

import json

import pytest
import runs
import timm
import torch
from accelerate import Accelerator
from children import in_group
from fitted import QUICK, fit, save_backbone
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import timm_faim
from timm_faim.calibration import Calibration
from timm_faim.commands import run_command
from timm_faim.run.errors import UserError
from timm_faim.run.record import images_of, record_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("fit") / "data", train=6, val=4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("backbone") / "test_resnet.safetensors")


def config_of(run):
    return json.loads((run / "config.json").read_text())


def tensors(model, folder):
    """The images of a folder as the model sees them, and their classes."""
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model), is_training=False)
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    return images, torch.tensor([names.index(path.parent.name) for path in paths])


@pytest.fixture(scope="module")
def fitted(data, backbone, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("out"), backbone)


def test_the_head_is_that_of_fit(fitted, data, backbone):
    saved = timm.create_model(f"local-dir:{fitted}", pretrained=True).eval()
    other = timm.create_model("faim_test_resnet", num_classes=3, faim_cfg=saved.faim_cfg).eval()
    other.load_state_dict(load_file(backbone), strict=False)
    images, target = tensors(saved, data / "train")
    how = record_of(config_of(fitted))["fit"]
    assert how["moments"] == ["layer3.0"] and saved.faim_cfg["moments"]["weight"] == how["weight"]
    timm_faim.fit_(other, [(images, target)], how["shrinkage"], share=how["share"])
    other.fc.scale.data.copy_(saved.fc.scale)  # that is calibrated
    with torch.no_grad():
        torch.testing.assert_close(saved(images), other(images), rtol=1e-3, atol=1e-3)
        assert (saved(images).amax(1) - saved(images).amin(1)).min() > 0.1


def test_a_fit_is_a_run(fitted, data):
    assert {"args.yaml", "config.json", "model.safetensors", "model_best.safetensors", "summary.csv"} <= {
        path.name for path in fitted.iterdir()
    }
    record = record_of(config_of(fitted))
    assert images_of(record, 3) == [6, 6, 6]
    assert record["fit"].keys() == {"recipe", "moments", "weight", "shrinkage", "share", "held_out_accuracy"}
    calibration = Calibration.from_json(record["calibration"])
    model = timm.create_model(f"local-dir:{fitted}", pretrained=True).eval()
    assert model.fc.scale.item() == pytest.approx(16.0 / calibration.temperature, rel=1e-5)
    images, target = tensors(model, data / "val")
    with torch.no_grad():
        right = (model(images).argmax(1) == target).double().mean().item()
    facts = json.loads((fitted / "eval" / "eval.json").read_text())
    assert facts["metrics"]["top1"] == pytest.approx(100 * right) and facts["metrics"]["samples"] == 13
    assert runs.read_summary(fitted)[0]["eval_top1"] == str(facts["metrics"]["top1"])
    assert (fitted / "eval" / "predictions.csv").read_text().count("\n") == 14


def test_the_second_fit_runs_no_backbone_and_is_the_same(data, backbone, tmp_path, capsys, monkeypatch):
    first = fit(data, tmp_path, backbone, "--faim-cfg", "moments=True", experiment="a")
    said = capsys.readouterr().out
    assert "features of 31 images computed" in said
    monkeypatch.setattr("timm_faim.fitting.extract._write", lambda *args: pytest.fail("the backbone runs"))
    second = fit(data, tmp_path, backbone, "--faim-cfg", "moments=True", experiment="b")
    assert "found in the cache" in capsys.readouterr().out
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert config_of(first) == config_of(second)


@pytest.mark.parametrize("change", ["image", "size", "none"])
def test_other_images_and_other_sizes_are_computed_anew(data, backbone, tmp_path, capsys, change):
    images = tmp_path / "data"
    runs.make_images(images, train=4, val=3)
    fit(images, tmp_path, backbone, experiment="a")
    if change == "image":
        Image.new("RGB", (40, 32)).save(images / "train" / "cat" / "0.png")
    capsys.readouterr()
    fit(images, tmp_path, backbone, *(["--img-size", "48"] if change == "size" else []), experiment="b")
    assert ("found in the cache" in capsys.readouterr().out) == (change == "none")


def test_without_validation_images_every_image_is_held_out_once(data, backbone, tmp_path, capsys):
    run = fit(data / "train", tmp_path, backbone, "--val-fraction", "0.34")
    assert "18 training images held out in turn, in 3 folds" in capsys.readouterr().out
    facts = json.loads((run / "eval" / "eval.json").read_text())
    assert facts["metrics"]["samples"] == 18 and facts["images"] == "cross-fitted training images"
    assert images_of(record_of(config_of(run)), 3) == [6, 6, 6]
    saved = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    images, target = tensors(saved, data / "train")
    how = record_of(config_of(run))["fit"]
    again = timm.create_model(f"local-dir:{run}", pretrained=True)
    timm_faim.fit_(again, [(images, target)], how["shrinkage"], share=how["share"])
    torch.testing.assert_close(again.fc.mu, saved.fc.mu, rtol=1e-4, atol=1e-5)  # fitted to all of them


def test_one_image_a_class_is_fitted_and_said_not_to_be_calibrated(backbone, tmp_path, capsys):
    data = runs.make_images(tmp_path / "data", train=1, val=1, extra_val=0)
    run = fit(data / "train", tmp_path, backbone)
    assert "0 training images held out" in capsys.readouterr().out
    assert "calibration" not in record_of(config_of(run)) and (run / "model.safetensors").is_file()


def test_other_classes_under_the_backbone_of_a_run(fitted, backbone, tmp_path):
    data = runs.make_images(tmp_path / "data", classes=("ant", "bee"), train=3, val=2)
    runs.fresh_accelerator()
    words = [str(data), "--model", str(fitted), "--output", str(tmp_path), "--experiment", "new", "--no-cache", *QUICK]
    run_command("fit", words)
    new, old = (timm.create_model(f"local-dir:{run}", pretrained=True) for run in (tmp_path / "new", fitted))
    assert new.num_classes == 2 and new.pretrained_cfg["label_names"] == ["ant", "bee"]
    assert torch.equal(new.conv1[0].weight if hasattr(new.conv1, "__getitem__") else new.conv1.weight,
                       old.conv1[0].weight if hasattr(old.conv1, "__getitem__") else old.conv1.weight)  # fmt: skip


def test_a_run_keeps_its_stages_and_the_options_of_its_head(data, backbone, tmp_path):
    images = runs.make_images(tmp_path / "data", train=9, val=2)
    cfg = "moments={'stages': ['layer2']}"
    first = fit(images, tmp_path, backbone, "--faim-cfg", cfg, "margin=0.05", "--recipe", "fixed", experiment="a")
    runs.fresh_accelerator()
    words = [str(images), "--model", str(first), "--output", str(tmp_path), "--experiment", "b", "--no-cache", *QUICK]
    run_command("fit", words)
    how = record_of(config_of(tmp_path / "b"))["fit"]
    saved = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert how["recipe"] == "auto" and how["held_out_accuracy"] is not None and how["moments"] == ["layer2.0"]
    assert saved.faim_cfg["margin"] == 0.05 and saved.faim_cfg["moments"]["weight"] == how["weight"]
    torch.testing.assert_close(saved.fc.part_weights, torch.tensor([1 - how["weight"], how["weight"]]))
    assert record_of(config_of(first))["fit"]["recipe"] == "fixed"


def _fit_here(data, output, backbone):
    Accelerator.end_training = lambda self: None  # the group is that of the test
    words = [data, "--output", output, "--experiment", "two", "--model", "faim_test_resnet", "--pretrained-path"]
    run_command("fit", [str(word) for word in (*words, backbone, "--cache", output / "cache", *QUICK)])


def test_two_processes_fit_the_same(fitted, data, backbone, tmp_path):
    in_group(_fit_here, data, tmp_path, backbone)
    one, two = (timm.create_model(f"local-dir:{run}", pretrained=True) for run in (fitted, tmp_path / "two"))
    images, _ = tensors(one, data / "val")
    assert one.fc.scale.item() == pytest.approx(two.fc.scale.item(), rel=1e-2)  # fitted to logits, all of them right
    two.fc.scale.data.copy_(one.fc.scale)
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(images), two.eval()(images), rtol=1e-2, atol=1e-2)
    files = [(run / "eval" / "predictions.csv").read_text().split("\n") for run in (fitted, tmp_path / "two")]
    assert [line.split(",")[:4] for line in files[0]] == [line.split(",")[:4] for line in files[1]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "test_resnet"], "--model test_resnet has no FAIM head. Use --model faim_test_resnet"),
        (["--val-fraction", "0.2"], "--val-fraction 0.2 holds out training images, and .* has validation images"),
        (["--faim-cfg", "margn=1"], "unknown faim_cfg key 'margn'"),
        (["--model", "faim_deit_tiny_distilled_patch16_224", "--img-size", "224"], "the model has 2 FAIM heads"),
    ],
)
def test_what_cannot_be_fitted(data, backbone, tmp_path, argv, message):
    runs.fresh_accelerator()
    words = [str(data), "--output", str(tmp_path), "--model", "faim_test_resnet", *QUICK, *argv]
    if "deit" not in str(argv):
        words += ["--pretrained-path", str(backbone)]
    else:
        words += ["--pretrained-path", str(save_backbone(tmp_path / "d.safetensors"))]
    with pytest.raises(UserError, match=message):
        run_command("fit", words)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_unreadable_image_is_an_error_or_left_out(data, backbone, tmp_path, capsys):
    images = runs.make_images(tmp_path / "data", train=4, val=2)
    (images / "train" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*dog/1\.png"):
        fit(images, tmp_path, backbone)
    assert not list((tmp_path / "cache").glob("*/store.json")) and not list((tmp_path / "cache").iterdir())
    run = fit(images, tmp_path, backbone, "--skip-unreadable")
    assert images_of(record_of(config_of(run)), 3) == [4, 4, 3]


def test_a_cache_of_left_out_images_is_not_that_of_all_and_a_damaged_one_is_made_anew(backbone, tmp_path, capsys):
    images = runs.make_images(tmp_path / "data", train=4, val=2)
    fit(images, tmp_path, backbone, experiment="a")
    (store,) = (tmp_path / "cache").iterdir()
    (store / "train-0.f32").write_bytes(b"x")
    capsys.readouterr()
    fit(images, tmp_path, backbone, experiment="b")
    assert "computed" in capsys.readouterr().out
    (images / "train" / "dog" / "1.png").write_bytes(b"no image")
    fit(images, tmp_path, backbone, "--skip-unreadable", experiment="c")
    with pytest.raises(UserError, match="cannot read image"):
        fit(images, tmp_path, backbone, experiment="d")
    assert not (tmp_path / "d").exists()


def test_grey_runs_and_unreadable_validation_images(data, backbone, tmp_path):
    grey = runs.train_tiny(data, tmp_path / "grey", "--in-chans", "1")
    runs.fresh_accelerator()
    words = [str(data), "--model", str(grey), "--output", str(tmp_path), "--experiment", "new", "--no-cache", *QUICK]
    run_command("fit", words)
    assert timm.create_model(f"local-dir:{tmp_path / 'new'}", pretrained=True).pretrained_cfg["input_size"][0] == 1
    images = runs.make_images(tmp_path / "data", train=4, val=1)
    for path in (images / "val").glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no validation image can be read"):
        fit(images, tmp_path, backbone, "--skip-unreadable", experiment="bad")
