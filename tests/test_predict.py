"""`timm_faim.load` and `timm-faim predict`."""

import csv
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs
import timm
import torch
from children import in_group
from fitted import fit, save_backbone
from PIL import Image

import timm_faim
from timm_faim.classifier import predict as module
from timm_faim.classifier.gallery_page import write_gallery
from timm_faim.classifier.neighbours import FILE, Gallery
from timm_faim.classifier.prediction import Judge
from timm_faim.commands import run_command
from timm_faim.images.files import list_images
from timm_faim.run.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("predict") / "data", train=6, val=4)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return fit(data, folder, save_backbone(folder / "backbone.safetensors"))


@pytest.fixture(scope="module")
def classifier(run):
    return timm_faim.load(run, device="cpu")


def predict(*argv):
    runs.fresh_accelerator()
    run_command("predict", [str(word) for word in (*argv, "--workers", "0", "--device", "cpu")])


def rows(path):
    return list(csv.DictReader(path.open()))


def test_a_path_an_image_and_an_array_are_one_image(classifier, data):
    path = data / "val" / "cat" / "0.png"
    image = Image.open(path)
    found = classifier([path, str(path), image, np.asarray(image)])
    alone = classifier(path)
    for each in found:
        assert (each.classes, each.known) == (alone.classes, alone.known) and len(each.classes) == 3
        assert each.distances == pytest.approx(alone.distances, abs=1e-4)
    assert found[0].name in ("bird", "cat", "dog", "unknown") and sum(found[0].probabilities) == pytest.approx(1)


def test_predictions_are_what_the_model_says(classifier, run, data):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    paths = list_images([str(data / "val")])
    batch = torch.stack([classifier.transform(Image.open(path).convert("RGB")) for path in paths])
    with torch.no_grad():
        logits = model(batch)
    for found, row in zip(classifier(paths, unknown=0), logits, strict=True):
        order = row.argsort(descending=True).tolist()
        assert found.classes == [("bird", "cat", "dog")[k] for k in order]
        assert found.probabilities == pytest.approx(row.softmax(0)[order].tolist(), abs=1e-5)
        assert found.distances == pytest.approx((-row[order] / model.fc.gamma().item()).tolist(), abs=1e-5)
        assert found.known is None


def test_rejection_and_sets_are_those_of_the_calibration(classifier, data):
    paths = list_images([str(data / "val")])
    noise = [np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8) for i in range(8)]
    known = [p.known for p in classifier(paths, unknown=0.1)]
    assert known.count(False) <= 0.1 * 14  # the guarantee, on the images that it was made of
    assert all(p.known is not None for p in classifier(noise, unknown=0.1))
    for p in classifier(paths, coverage=0.9):
        assert p.candidates and p.classes[0] in p.candidates
    with pytest.raises(ValueError, match="0.3"):
        classifier(paths, unknown=0.3)


def test_equal_logits_keep_the_order_of_the_classes():
    (found,) = Judge(["b", "a", "c"], top=3)(torch.zeros(1, 3))
    assert found.classes == ["b", "a", "c"] and found.distances is None and found.name == "b"


def test_a_prior_is_no_distance():
    judge = Judge(["a", "b"], gamma=2.0, prior=torch.tensor([1.0, -1.0]))
    (found,) = judge(torch.tensor([[1.0 - 2.0 * 0.5, -1.0 - 2.0 * 0.25]]))
    assert found.classes == ["a", "b"] and found.distances == pytest.approx([0.5, 0.25])


def test_a_model_that_was_never_calibrated_calls_nothing_unknown(tmp_path):
    timm_faim.save_model(timm.create_model("faim_test_resnet", num_classes=3), tmp_path / "m", ["a", "b", "c"])
    classifier = timm_faim.load(tmp_path / "m", device="cpu")
    assert classifier(np.zeros((32, 32, 3), np.uint8)).known is None
    with pytest.raises(ValueError, match="calibrated"):
        classifier(np.zeros((32, 32, 3), np.uint8), coverage=0.9)
    linear = timm.create_model("test_resnet", num_classes=2)
    timm_faim.save_model(linear, tmp_path / "l")
    found = timm_faim.load(tmp_path / "l", device="cpu")(np.zeros((32, 32, 3), np.uint8))
    assert set(found.classes) == {"0", "1"} and found.distances is None


@pytest.mark.parametrize("image", ["missing.png", b"x"])
def test_an_image_that_cannot_be_read(classifier, tmp_path, image):
    path = tmp_path / "missing.png"
    if isinstance(image, bytes):
        path.write_bytes(image)
    with pytest.raises(UserError, match="cannot read image .*missing.png"):
        classifier(path)


def test_places_become_one_list(tmp_path):
    for name in ("b.png", "a10.png", "a2.png", ".hidden.png", "sub/c.JPG", ".git/d.png", "text.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    here = [str(tmp_path / name) for name in ("a2.png", "a10.png", "b.png", "sub/c.JPG")]
    assert list_images([str(tmp_path)]) == here
    assert list_images([here[2], str(tmp_path)]) == [here[2], here[0], here[1], here[3]]
    assert list_images([str(tmp_path / "*.png")]) == here[:3] and list_images([str(tmp_path / "**/*.JPG")]) == here[3:]
    assert list_images([str(tmp_path / "text.txt")]) == [str(tmp_path / "text.txt")]
    with pytest.raises(UserError, match="nowhere does not exist"):
        list_images([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"no images in .*bmp"):
        list_images([str(tmp_path / "*.bmp")])


def test_a_table_a_csv_and_json_lines_say_the_same(run, data, tmp_path, capsys):
    predict(data / "val", "--model", run, "--output", tmp_path / "a.csv", "--top", 2, "--set", 0.9)
    predict(data / "val", "--model", run, "--output", tmp_path / "a.jsonl", "--top", 2, "--set", 0.9)
    told = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    table = rows(tmp_path / "a.csv")
    assert [r["file"] for r in table] == [r["file"] for r in told] == list_images([str(data / "val")])
    for a, b in zip(table, told, strict=True):
        assert a["prediction"] == b["prediction"] and float(a["confidence"]) == b["top"][0]["probability"]
        assert a["class_2"] == b["top"][1]["class"] and a["candidates"].split("; ") == b["candidates"]
        assert a["known"] == {True: "yes", False: "no"}[b["known"]] and a["error"] == ""
    capsys.readouterr()
    predict(data / "val", "--model", run, "--top", 2)
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 13 and "13 images in" in said.err
    predict(data / "val", "--model", run, "--format", "jsonl", "--top", 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["top"] for line in lines] == [r["top"] for r in told]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_list_on_standard_input(run, data, monkeypatch, capsys):
    paths = list_images([str(data / "val" / "dog")])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(paths) + "\n\n"))
    predict("-", "--model", run)
    assert len(capsys.readouterr().out.splitlines()) == len(paths)


def test_unreadable_images_are_said_and_left_out(run, data, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    predict(tmp_path / "broken.png", data / "val" / "cat", "--model", run, "--output", tmp_path / "o.csv")
    table = rows(tmp_path / "o.csv")
    assert table[0]["error"] == "not an image" and table[0]["prediction"] == "" and table[1]["prediction"]
    assert "1 cannot be read, such as" in capsys.readouterr().err
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict(tmp_path / "broken.png", "--model", run)


def test_a_killed_prediction_goes_on_where_it_was(run, data, tmp_path, monkeypatch, capsys):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    words = (data / "val", "--model", run, "--batch-size", 2, "--output")
    predict(*words, whole)
    real, seen = module.rows_of, []

    def stopped(*args):
        for number, found in enumerate(real(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(module, "rows_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(*words, part)
    journal = tmp_path / ".part.jsonl.part"
    assert not part.exists() and journal.is_file()
    journal.write_bytes(journal.read_bytes() + b'{"file": "torn')  # a kill within a write

    def counted(paths, *args):
        seen.extend(paths)
        yield from real(paths, *args)

    monkeypatch.setattr(module, "rows_of", counted)
    capsys.readouterr()
    predict(*words, part)
    assert len(seen) == 13 - 6 and "going on after 6 images" in capsys.readouterr().err
    assert part.read_bytes() == whole.read_bytes() and not journal.exists()
    predict(*words, part, "--top", 1)  # other settings are another prediction
    assert len(seen) == 7 + 13


def _predict_here(run, data, output):
    words = [data / "val", "--model", run, "--output", output, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    run_command("predict", [str(word) for word in words])


def test_two_processes_say_the_same_in_the_same_order(run, data, tmp_path):
    predict(data / "val", "--model", run, "--batch-size", 2, "--output", tmp_path / "one.jsonl")
    in_group(_predict_here, run, data, tmp_path / "two.jsonl")
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert (a["file"], a["prediction"]) == (b["file"], b["prediction"])
        assert a["top"][0]["probability"] == pytest.approx(b["top"][0]["probability"], abs=1e-4)


def test_neighbours_of_a_training_image_begin_with_itself(run, data, tmp_path):
    predict(data / "train", "--model", run, "--neighbours", 2, "--output", tmp_path / "o.jsonl")
    for line in (tmp_path / "o.jsonl").read_text().splitlines():
        row = json.loads(line)
        first, second = row["neighbours"]
        assert row["file"].endswith(first["file"]) and first["distance"] < 1e-3 < second["distance"]


def test_a_run_without_points_says_how_to_keep_them(run, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="keeps no points of its training images. Fit one with timm-faim fit"):
        predict(data / "val", "--model", folder, "--neighbours", 1)
    (folder / FILE).write_bytes(b"x")
    with pytest.raises(UserError, match="cannot read"):
        Gallery.of_run(folder, torch.device("cpu"))


def test_the_page_has_the_surest_first_and_no_markup_of_names(run, data, tmp_path):
    predict(data / "val", "--model", run, "--output", tmp_path / "o.jsonl", "--html", tmp_path / "o.html")
    text = (tmp_path / "o.html").read_text()
    ranked = sorted((json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()),
                    key=lambda row: (-row["top"][0]["probability"], row["file"]))  # fmt: skip
    assert [text.index(f"<span>{row['file']}</span>") for row in ranked] == sorted(
        text.index(f"<span>{row['file']}</span>") for row in ranked
    )
    assert text.count("data:image/jpeg;base64,") == 13
    evil = {"file": "<script>.png", "prediction": "<b>", "known": True, "top": [{"class": "<b>", "probability": 0.5}]}
    assert write_gallery(tmp_path / "e.html", [evil] * 9, "<i>", 4) == 4
    page = (tmp_path / "e.html").read_text()
    assert "<script>" not in page and "<b><b>" not in page and "5 in the middle are left out" in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "o.txt"], "--output o.txt is of no known format"),
        (["--format", "csv"], "--format csv needs a file"),
        (["--output", "nowhere/o.csv"], "nowhere/o.csv cannot be written: no folder to hold it"),
        (["--unknown", "0.2"], "--unknown 0.2"),
        (["--set", "0.5"], "--set 0.5"),
        (["--device", "tpu9"], "--device tpu9 cannot be used"),
        (["--model", "nothing"], "--model nothing is no folder and no timm model"),
    ],
)
def test_bad_input(run, data, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    runs.fresh_accelerator()
    words = [str(data / "val"), "--model", str(run), "--workers", "0", *argv]
    with pytest.raises(UserError, match=message):
        run_command("predict", words)
    assert not list(tmp_path.iterdir())


def interrupted(monkeypatch, *words):
    """A prediction that is killed when it writes its result."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            predict(*words)


def test_rows_of_other_names_and_of_changed_images_are_made_anew(run, data, tmp_path, monkeypatch, capsys):
    images, model, found = tmp_path / "images", tmp_path / "model", tmp_path / "o.jsonl"
    shutil.copytree(data / "val" / "cat", images)
    run_command("classes", ["rename", str(run), "cat", "lynx", "-o", str(model)])
    words = (images, "--model", model, "--output", found)
    interrupted(monkeypatch, *words)
    Image.new("RGB", (40, 40), "red").save(images / "0.png")
    capsys.readouterr()
    predict(*words)
    assert "going on after 3 images" in capsys.readouterr().err
    interrupted(monkeypatch, *words)
    shutil.rmtree(model)
    run_command("classes", ["rename", str(run), "cat", "tiger", "-o", str(model)])
    capsys.readouterr()
    predict(*words)
    assert "going on" not in capsys.readouterr().err and "lynx" not in found.read_text()


def test_images_that_could_not_be_read_are_tried_again(run, data, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    words = (path, "--model", run, "--output", tmp_path / "o.csv")
    with pytest.raises(UserError, match="none of the 1 images"):
        predict(*words)
    shutil.copy(data / "val" / "cat" / "0.png", path)
    predict(*words)
    assert rows(tmp_path / "o.csv")[0]["error"] == ""


def test_links_to_folders_above_are_not_followed_for_ever(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"")
    for name in ("x", "y"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "a")
    assert list_images([str(tmp_path / "a")]) == [str(tmp_path / "a" / "1.png")]


def test_classes_without_a_name_have_their_number(data, tmp_path):
    run = runs.train_tiny(data, tmp_path, "--num-classes", "5")
    found = timm_faim.load(run, device="cpu")(data / "val" / "cat" / "0.png", unknown=0)
    assert set(found.classes) == {"bird", "cat", "dog", "3", "4"}


def test_a_file_of_probabilities_rejects_nothing_and_says_no_threshold(run, data, tmp_path):
    for kind in ("logits", "probabilities"):
        run_command("export", [str(run), "-o", str(tmp_path / f"{kind}.ts"), "--output-kind", kind])
    model, logits, probabilities = (timm_faim.load(each, device="cpu") for each in
                                    (run, tmp_path / "logits.ts", tmp_path / "probabilities.ts"))  # fmt: skip
    path = data / "val" / "cat" / "0.png"
    assert logits(path).known == model(path).known is not None and probabilities(path).known is None
    assert probabilities(path).probabilities == pytest.approx(model(path).probabilities, abs=1e-4)
    assert probabilities(path, coverage=0.9).candidates == model(path, coverage=0.9).candidates


def test_one_file_cannot_be_both_results(run, data, tmp_path):
    with pytest.raises(UserError, match="are the same file"):
        predict(data / "val", "--model", run, "--output", tmp_path / "o.csv", "--html", tmp_path / "o.csv")


def test_a_closed_pipe_is_no_error(run, data):
    command = [sys.executable, "-m", "timm_faim", "predict", str(data / "val"), "--model", str(run), "--workers", "0"]
    with subprocess.Popen([*command, "--batch-size", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 141 and "Traceback" not in said and "BrokenPipe" not in said
