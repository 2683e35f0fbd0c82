"""A training that ends with a calibration of its best weights on the validation images."""

import json

import pytest
import runs
import timm
import torch
from children import Launch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

from timm_faim.calibration import Calibration, calibrate
from timm_faim.run.record import record_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("calibrated") / "data", val=6)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return runs.train_tiny(data, tmp_path_factory.mktemp("out"), "--calibrate")


def calibration_of(run):
    return Calibration.from_json(record_of(json.loads((run / "config.json").read_text()))["calibration"])


def best_epoch(run):
    """The weights of the best epoch, as they were trained."""
    rows = runs.read_summary(run)
    best = max(rows, key=lambda row: (float(row["eval_top1"]), -int(row["epoch"])))
    return load_file(run / "top" / f"epoch_{int(best['epoch']):04d}.safetensors")


def logits_of(model, folder):
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model), is_training=False)
    paths = sorted(folder.glob("*/*.png"))
    names = sorted({path.parent.name for path in paths})
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        return model(images), torch.tensor([names.index(path.parent.name) for path in paths])


def test_only_gamma_of_the_best_weights_changes(run):
    best, trained = load_file(run / "model_best.safetensors"), best_epoch(run)
    temperature = calibration_of(run).temperature
    assert temperature != 1.0
    for name, tensor in trained.items():
        expected = tensor / temperature if name == "fc.scale" else tensor
        torch.testing.assert_close(best[name], expected, rtol=1e-6 * (name == "fc.scale"), atol=0, msg=name)
    assert (run / "model.safetensors").read_bytes() == (run / "model_best.safetensors").read_bytes()


def test_the_calibration_is_that_of_the_validation_images(run, data):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    logits, target = logits_of(model, data / "val")
    found = calibration_of(run)
    again = calibrate(logits * found.temperature, target, "validation")
    assert found.images == 19 and again.temperature == pytest.approx(found.temperature, rel=1e-3)
    for rate, threshold in again.reject.items():
        assert found.reject[rate] == pytest.approx(threshold, abs=1e-3)


def test_the_record_has_the_images_of_each_class(run):
    assert record_of(json.loads((run / "config.json").read_text()))["images"] == [4, 4, 4]


def test_a_finished_run_that_is_resumed_keeps_its_calibration(run, data):
    before = {name: (run / name).read_bytes() for name in ("config.json", "model.safetensors")}
    runs.train("--data-dir", data, "--resume", run, "--workers", "0", "--calibrate")
    assert before == {name: (run / name).read_bytes() for name in before}


def test_one_that_trains_on_is_calibrated_anew(data, tmp_path):
    run = runs.train_tiny(data, tmp_path, "--calibrate")
    first = calibration_of(run)
    runs.train("--data-dir", data, "--resume", run, "--epochs", "3", "--workers", "0", "--calibrate")
    best = load_file(run / "model.safetensors")
    assert {"images", "calibration"} == set(record_of(json.loads((run / "config.json").read_text())))
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    logits, target = logits_of(model, data / "val")
    again = calibrate(logits, target, "validation")
    assert again.temperature == pytest.approx(1.0, abs=0.02)  # nothing is left to mend
    assert best["fc.scale"].isfinite().all() and first.images == 19


def test_a_linear_model_and_a_run_without_validation_are_left_alone(data, tmp_path):
    linear = runs.train_tiny(data, tmp_path / "a", model="test_resnet")
    assert "calibration" not in record_of(json.loads((linear / "config.json").read_text()))
    none = runs.train_tiny(data, tmp_path / "b", "--calibrate", "--val-split", "")
    assert "calibration" not in record_of(json.loads((none / "config.json").read_text()))


def test_the_evaluation_is_that_of_the_calibrated_weights(data, tmp_path):
    run = runs.train_tiny(data, tmp_path, "--calibrate", "--report")
    facts = json.loads((run / "eval" / "eval.json").read_text())["metrics"]
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    logits, target = logits_of(model, data / "val")
    loss = torch.nn.functional.cross_entropy(logits, target).item()
    assert facts["loss"] == pytest.approx(loss, rel=1e-3) and facts["samples"] == 19


def test_two_processes_calibrate_alike(data, tmp_path):
    words = ["--data-dir", data, "--output", tmp_path, "--experiment", "two", "--model", "faim_test_resnet"]
    launch = Launch([*words, *runs.TINY, "--batch-size", "2", "--calibrate"], tmp_path / "log", processes=2)
    assert launch.wait() == [0, 0], launch.text()
    run = tmp_path / "two"
    logits, target = logits_of(timm.create_model(f"local-dir:{run}", pretrained=True).eval(), data / "val")
    found = calibration_of(run)
    assert found.images == 19 and calibrate(logits, target, "validation").temperature == pytest.approx(1.0, abs=0.02)
