"""`timm-faim fit --unlabelled` and `timm-faim predict --adapt`."""

import json
import shutil

import pytest
import runs
import timm
import torch
from fitted import fit, save_backbone
from PIL import Image
from safetensors.torch import load_file

import timm_faim
from timm_faim.adapt import adapt_, evidence
from timm_faim.classifier.neighbours import FILE
from timm_faim.commands import run_command
from timm_faim.fitting.unlabelled import without
from timm_faim.run.errors import UserError
from timm_faim.run.record import record_of, write_record


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
    assert "unlabelled" not in record(plain)["fit"]


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


@pytest.fixture(scope="module")
def run(data, backbone, tmp_path_factory):
    return fit(data, tmp_path_factory.mktemp("run"), backbone)


def predict(*argv):
    runs.fresh_accelerator()
    run_command("predict", [str(word) for word in (*argv, "--workers", "0", "--device", "cpu", "--unknown", "0")])


def probabilities(path):
    return [row["top"][0]["probability"] for row in map(json.loads, path.read_text().splitlines())]


def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("keeps_points", [True, False])
def test_predictions_are_those_of_the_head_that_followed(keeps_points, run, data, tmp_path, capsys):
    folder = copied(run, tmp_path)
    if not keeps_points:
        (folder / FILE).unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    predict(data / "val", "--model", folder, "--adapt", "-o", tmp_path / "a.jsonl", "--batch-size", 5)
    assert "adapted to" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    classifier = timm_faim.load(folder, device="cpu")
    paths = [row["file"] for row in map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())]
    images = torch.stack([classifier.transform(Image.open(path).convert("RGB")) for path in paths])
    _, points = classifier.points(images)
    counts = torch.tensor([6.0, 6.0, 6.0])
    if keeps_points:
        labels = torch.tensor(
            [["bird", "cat", "dog"].index(name.split("/")[-2]) for name in classifier.gallery().names]
        )
        counts = evidence(classifier.head, classifier.gallery().points_ND, labels)
    adapt_(classifier.head, counts, points.half(), least=classifier.calibration.reject[0.05])
    wanted = classifier.logits(images).softmax(1).amax(1)
    torch.testing.assert_close(torch.tensor(probabilities(tmp_path / "a.jsonl")), wanted, rtol=1e-3, atol=1e-4)


def test_images_of_no_class_move_nothing(run, tmp_path, capsys):
    write_record(
        copied(run, tmp_path) / "config.json", calibration=record(run)["calibration"] | {"reject": {"0.05": 1e6}}
    )
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * i, 20, 60)).save(tmp_path / f"{i}.png")
    for name, words in {"plain": (), "adapted": ("--adapt",)}.items():
        predict(tmp_path / "0.png", tmp_path / "1.png", tmp_path / "2.png", "--model", tmp_path / "copy",
                "-o", tmp_path / f"{name}.jsonl", *words)  # fmt: skip
    assert "not adapted: 0 of 3 images" in capsys.readouterr().err
    assert probabilities(tmp_path / "plain.jsonl") == probabilities(tmp_path / "adapted.jsonl")


def test_unreadable_images_are_left_out_of_it(run, data, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    predict(tmp_path / "broken.png", data / "val" / "cat", "--model", run, "--adapt", "-o", tmp_path / "a.csv")
    said = capsys.readouterr().err
    assert "of 6 images" in said and "1 cannot be read" in said
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict(tmp_path / "broken.png", "--model", run, "--adapt", "-o", tmp_path / "b.csv")


@pytest.mark.parametrize("case", ["exported", "uncalibrated", "uncounted", "linear"])
def test_models_that_cannot_follow_are_refused(case, run, data, tmp_path):
    folder = copied(run, tmp_path)
    says = {
        "exported": "is an exported file",
        "uncalibrated": "calibrated model",
        "uncounted": "how many training images",
    }
    if case == "exported":
        folder = tmp_path / "model.ts"
        run_command("export", [str(run), "--output", str(folder)])
    if case == "uncalibrated":
        write_record(folder / "config.json", calibration=None)
    if case == "uncounted":
        write_record(folder / "config.json", images=None)
    if case == "linear":
        model = timm.create_model("test_resnet", num_classes=3)
        timm.models.save_for_hf(model, folder, model_config={"num_classes": 3}, safe_serialization=True)
    with pytest.raises(UserError, match=says.get(case, "one FAIM head")):
        predict(data / "val", "--model", folder, "--adapt")
