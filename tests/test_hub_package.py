"""The folder that is published: what is in it, what is not, and that it opens."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from runs import make_images, train_tiny
from safetensors.torch import load_file, save_file

import timm_faim
from timm_faim.calibration import calibrate
from timm_faim.commands import run_command
from timm_faim.hub import Release, build_package, save_model
from timm_faim.hub.public import public_config
from timm_faim.run.csv_file import write_csv
from timm_faim.run.errors import UserError
from timm_faim.run.record import write_record

command = partial(run_command, "hub")

REPO = "me/faim_test_resnet.pets"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    images = make_images(folder / "images")
    return train_tiny(images, folder, "--faim-cfg", "space=sphere", "--report")


@pytest.fixture
def package(finished, tmp_path):
    model = build_package(
        finished,
        tmp_path / "package",
        Release(REPO, "mit", ["me/pets"], "Pets", label_descriptions={"cat": "a small animal"}),
    )
    return tmp_path / "package", model


def test_files_are_those_that_people_need_and_no_others(package):
    assert sorted(path.name for path in package[0].iterdir()) == [
        "README.md",
        "config.json",
        "eval.json",
        "learning_curve.png",
        "metric.png",
        "model.safetensors",
        "summary.csv",
        "train_args.yaml",
    ]


def test_it_opens_with_the_logits_of_the_run(package, finished):
    images = torch.randn(2, 3, 32, 32)
    expected = timm.create_model(f"local-dir:{finished}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(package[1](images), expected(images))


def test_config_is_that_of_the_checkpoint(package):
    config = json.loads((package[0] / "config.json").read_text())
    assert config["architecture"] == "faim_test_resnet" and config["num_classes"] == 3
    assert config["label_names"] == ["bird", "cat", "dog"]
    assert config["label_descriptions"] == {"cat": "a small animal"}
    assert config["model_args"]["faim_cfg"]["space"] == "sphere" and "num_classes" not in config["model_args"]
    cfg = config["pretrained_cfg"]
    assert (cfg["tag"], cfg["license"], cfg["custom_load"], cfg["num_classes"]) == ("pets", "mit", False, 3)
    assert not {"url", "file", "hf_hub_id", "origin_url", "source"} & cfg.keys()


def test_tag_and_licence_of_the_base_model_do_not_stay(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    config["pretrained_cfg"].update(tag="r160_in1k", license="cc-by-nc-4.0", origin_url="x", paper_ids="y")
    source = tmp_path / "run"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    (source / "args.yaml").write_text(
        yaml.safe_dump(
            {
                "model": "faim_test_resnet.r160_in1k",
                "pretrained": True,
                "data_dir": "/home/me/pets",
                "output": "/tmp/x",
                "lr": 0.1,
                "class_map": "names.txt",
            }
        )
    )
    build_package(source, tmp_path / "package", Release("me/pets"))
    cfg = json.loads((tmp_path / "package" / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "origin_url", "paper_ids"} & cfg.keys()
    card = ModelCard.load(tmp_path / "package" / "README.md")
    assert card.data.base_model == "timm/test_resnet.r160_in1k" and card.data.license is None
    assert "licence of the weights | none given" in card.text
    assert yaml.safe_load((tmp_path / "package" / "train_args.yaml").read_text()) == {
        "model": "faim_test_resnet.r160_in1k",
        "pretrained": True,
        "lr": 0.1,
    }
    for path in (tmp_path / "package").iterdir():
        assert b"/home/me" not in path.read_bytes()


def test_card_says_how_to_load_it_and_carries_the_metrics(package, finished):
    card = ModelCard.load(package[0] / "README.md")
    metrics = json.loads((finished / "eval" / "eval.json").read_text())["metrics"]
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "mit", "image-classification")
    assert {"timm", "faim"} <= set(data.tags) and data.datasets == ["me/pets"]
    top1, top5 = data.eval_results
    assert (top1.metric_type, top1.dataset_name, top1.dataset_type) == ("accuracy", "Pets", "me/pets")
    assert top1.metric_value == pytest.approx(metrics["top1"] / 100, abs=1e-6)
    assert top5.metric_value == pytest.approx(metrics["top5"] / 100, abs=1e-6)
    assert "import timm_faim" in card.text and f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card.text
    assert "](metric.png)" in card.text and "| epoch | train loss |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_card_without_numbers(tmp_path):
    model = timm.create_model("faim_test_vit", num_classes=2, img_size=32)
    build_package(save_model(model, tmp_path / "saved"), tmp_path / "package", Release("me/plain", "mit"))
    card = ModelCard.load(tmp_path / "package" / "README.md")
    assert card.data.eval_results is None and "## Results" not in card.text and "## Training" not in card.text
    assert "metric.png" in card.text  # a head has its metric whether trained or not


def test_a_card_of_several_labels_an_image_has_their_metric(tmp_path):
    saved = save_model(timm.create_model("faim_test_resnet", num_classes=2), tmp_path / "saved")
    (saved / "summary.csv").write_text(
        "epoch,train_loss,eval_loss,eval_map,eval_samples\n0,1.5,1.2,40.0,7\n1,1.4,1.1,62.5,7\n2,1.3,1.0,61.0,7\n"
    )
    build_package(saved, tmp_path / "package", Release("me/plain", "mit"))
    text = (tmp_path / "package" / "README.md").read_text()
    assert "| mean average precision | 62.50 % |" in text and "on 7 images" in text


def test_a_plain_model_can_be_published_too(tmp_path):
    save_model(timm.create_model("test_resnet", num_classes=2), tmp_path / "saved")
    build_package(tmp_path / "saved", tmp_path / "package", Release("me/plain"))
    assert not (tmp_path / "package" / "metric.png").exists()


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("no config", r"cannot read .*config.json.*Name the run folder"),
        ("config", r"config.json must be an object"),
        ("weights", r"cannot read the weights .*model.safetensors.*Only safetensors are published"),
        ("pickle", r"cannot read the weights .*model.safetensors"),
        ("other weights", r"does not open with timm"),
        ("nan", r"logits that are not finite"),
        ("full target", r"is not empty"),
    ],
)
def test_a_folder_that_cannot_be_published(finished, tmp_path, breakage, message):
    source = tmp_path / "run"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((finished / name).read_bytes())
    weights = source / "model.safetensors"
    if breakage == "no config":
        (source / "config.json").unlink()
    elif breakage == "config":
        (source / "config.json").write_text("[]")
    elif breakage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif breakage == "pickle":
        weights.unlink()
        torch.save({}, source / "pytorch_model.bin")
    elif breakage == "other weights":
        save_model(timm.create_model("faim_test_vit", num_classes=3), tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    elif breakage == "nan":
        broken = {k: v * float("nan") if v.is_floating_point() else v for k, v in load_file(weights).items()}
        save_file(broken, weights)
    else:
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "precious").write_text("x")
    with pytest.raises(UserError, match=message):
        build_package(source, tmp_path / "package", Release(REPO))
    left = {"run", *(["package"] if breakage == "full target" else []), *(["other"] if breakage[0] == "o" else [])}
    assert {path.name for path in tmp_path.iterdir()} == left  # nothing half-written


def test_dry_run_writes_the_folder_and_needs_no_token(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("timm_faim.hub.upload.get_token", lambda: pytest.fail("asked for a token"))
    assert command(["push", str(finished), "--repo", REPO, "--dry-run", str(tmp_path / "dry")]) == 0
    assert "nothing is uploaded" in capsys.readouterr().out
    assert timm.create_model(f"local-dir:{tmp_path / 'dry'}", pretrained=True).num_classes == 3


@pytest.mark.parametrize("repo", ["pets", "me/../pets", "me/pets/main", "me/-pets", "me/a--b", "/pets", "me/"])
def test_wrong_names_of_repositories(finished, repo):
    with pytest.raises(UserError, match="is no name of a repository. Give ORG/NAME"):
        command(["push", str(finished), "--repo", repo])


def test_no_token(finished, monkeypatch):
    monkeypatch.setattr("timm_faim.hub.upload.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hub. Run `hf auth login`, or set HF_TOKEN"):
        command(["push", str(finished), "--repo", REPO])


def test_a_training_that_could_not_be_published_does_not_begin(tmp_path, monkeypatch):
    images = make_images(tmp_path / "images")
    with pytest.raises(UserError, match="'pets' is no name of a repository"):
        train_tiny(images, tmp_path, "--push-to-hub", "pets")
    monkeypatch.setattr("timm_faim.hub.upload.get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the Hub"):
        train_tiny(images, tmp_path, "--push-to-hub", "me/pets")
    monkeypatch.setattr("timm_faim.hub.upload.get_token", lambda: "x")
    with pytest.raises(UserError, match="'my own' is no licence"):
        train_tiny(images, tmp_path, "--push-to-hub", "me/pets", "--hub-license", "my own")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "message"), [("[1]", "must map class names to texts"), ("{", "cannot read")])
def test_wrong_label_descriptions(finished, tmp_path, content, message):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UserError, match=message):
        command(["push", str(finished), "--repo", REPO, "--label-descriptions", str(tmp_path / "labels.json")])


def test_a_name_is_words_in_the_card_and_never_a_formula_in_a_table(finished, tmp_path):
    name = "<script>x</script> [a](http://b) | =1\n# big"
    build_package(finished, tmp_path / "package", Release(REPO, dataset_name=name))
    card = (tmp_path / "package" / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    assert "\\<script\\>" in body and "\n# big" not in body and "[a](" not in body
    assert ModelCard(card).data.eval_results is None or ModelCard(card).data.eval_results[0].dataset_name == name
    write_csv(tmp_path / "t.csv", [["=1+1", "-3.5", -2, "@x", "a=b", "+cmd"]])
    assert (tmp_path / "t.csv").read_text() == "'=1+1,-3.5,-2,'@x,a=b,'+cmd\n"


def test_the_record_is_published_as_far_as_it_is_one(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    torch.manual_seed(0)
    count = config["num_classes"]
    found = calibrate(torch.randn(30, count), torch.arange(30) % count, "cross-fitted training images").to_json()
    record = {"images": [5] * count, "calibration": found, "folder": "/home/me"}
    whole = public_config(config | {"classifier": record})
    assert whole["classifier"] == {"images": [5] * count, "calibration": found}
    broken = public_config(config | {"classifier": {"images": ["/home"], "calibration": {"source": "/home/me"}}})
    assert "classifier" not in broken
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model.safetensors"):
        (run / name).write_bytes((finished / name).read_bytes())
    write_record(run / "config.json", **record)
    build_package(run, tmp_path / "package", Release(REPO))
    card = (tmp_path / "package" / "README.md").read_text()
    assert f"timm-faim predict photos/ --model hf-hub:{REPO}" in card
    assert "calibrated on 30 cross-fitted training images" in card
    assert timm_faim.load(tmp_path / "package", device="cpu").calibration.images == 30
