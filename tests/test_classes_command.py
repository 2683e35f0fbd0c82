"""timm-faim classes: a run in, a folder that timm opens out, whole or not at all."""

import json
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import make_images
from timm.data import resolve_input_data_config

from timm_faim import faim_heads, fit_
from timm_faim.calibration import Calibration
from timm_faim.commands import build_parser, run_command
from timm_faim.hub import save_model
from timm_faim.hub.package import Release, build_package
from timm_faim.images.loaders import clean_loader
from timm_faim.retrieval.images import open_folder
from timm_faim.run.errors import UserError
from timm_faim.run.record import write_record

classes = partial(run_command, "classes")
NAMES = ["bird", "cat", "dog"]
CALIBRATION = Calibration(
    temperature=0.8,
    images=12,
    source="validation",
    ece_before=3.0,
    ece_after=None,
    reject={0.05: -0.5},
    sets={0.9: 0.7},
)
WITHOUT_SETS = replace(CALIBRATION, sets={}).to_json()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data"))


def save(folder, data, names=NAMES, arch="faim_test_resnet", record=True):
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=3).eval()
    if faim_heads(model):
        config = resolve_input_data_config(model)
        images = open_folder(str(data / "train"), "DIR", 3, False)
        fit_(model, clean_loader(images.images, config, torch.device("cpu"), 64, 0))
    save_model(model, folder, names)
    if record:
        write_record(folder / "config.json", images=[4, 5, 6], calibration=CALIBRATION.to_json())
    return folder


@pytest.fixture
def saved(tmp_path, data):
    return save(tmp_path / "run", data)


@pytest.fixture
def further(tmp_path):
    """Four images of each of two classes more, in their own stripes."""
    random = np.random.default_rng(0)
    for name, width in (("elk", 4), ("fox", 12)):
        (tmp_path / "more" / name).mkdir(parents=True)
        for i in range(4):
            stripes = 200 * (np.arange(32) // width % 2)[:, None, None] + random.integers(0, 50, (32, 32, 3))
            Image.fromarray(stripes.astype(np.uint8)).save(tmp_path / "more" / name / f"{i}.png")
    return tmp_path / "more"


def opened(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rows(folder):
    (head,) = faim_heads(opened(folder)).values()
    return head.mu


def test_classes_are_listed_with_their_images(saved, capsys):
    classes(["list", str(saved)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["number", "images", "class"], ["0", "4", "bird"], ["1", "5", "cat"], ["2", "6", "dog"]]  # fmt: skip


def test_added_classes_are_in_the_new_folder_and_the_run_is_as_it_was(saved, further, tmp_path, capsys):
    (saved / "eval").mkdir()
    (saved / "report.html").write_text("old")
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    new = tmp_path / "deep" / "new"
    classes(["add", str(saved), str(further), "-o", str(new), "--workers", "0"])
    assert "3 classes before, 5 now" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in new.iterdir()) == ["config.json", "model.safetensors", "model_best.safetensors"]
    assert not list(new.parent.glob(".*"))
    config = config_of(new)
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 5
    assert config["label_names"] == [*NAMES, "elk", "fox"]
    assert config["classifier"] == {"images": [4, 5, 6, 4, 4], "calibration": WITHOUT_SETS}
    assert torch.equal(rows(new)[:3], rows(saved))
    found = opened(new)
    images = open_folder(str(further), "DIR", 3, False).images
    loader = clean_loader(images, resolve_input_data_config(found), torch.device("cpu"), 64, 0)
    ((images, targets),) = loader
    with torch.no_grad():
        assert (found(images).argmax(1) == targets + 3).float().mean() >= 0.75


def test_the_new_folder_is_a_package_of_the_hub(saved, further, tmp_path):
    new, package = tmp_path / "new", tmp_path / "package"
    classes(["add", f"local-dir:{saved}", str(further), "-o", str(new), "--workers", "0"])
    build_package(new, package, Release("org/faim_test_resnet.more", license="mit"))
    assert torch.equal(rows(package), rows(new))
    again = tmp_path / "again"
    classes(["remove", f"local-dir:{package}", "elk", "fox", "-o", str(again)])
    assert torch.equal(rows(again), rows(saved))
    assert config_of(again)["label_names"] == NAMES and config_of(again)["classifier"]["images"] == [4, 5, 6]


def test_merge_and_rename(saved, tmp_path):
    merged, renamed = tmp_path / "merged", tmp_path / "renamed"
    classes(["merge", str(saved), "pet", "dog", "cat", "-o", str(merged)])
    assert config_of(merged)["label_names"] == ["bird", "pet"]
    assert config_of(merged)["classifier"] == {"images": [4, 11], "calibration": WITHOUT_SETS}
    wanted = config_of(saved) | {"label_descriptions": {"bird": "flies", "cat": "purrs"}}
    (saved / "config.json").write_text(json.dumps(wanted))
    classes(["rename", str(saved), "dog=cat", "cat=dog", "-o", str(renamed)])
    wanted |= {"label_names": ["bird", "dog", "cat"], "label_descriptions": {"bird": "flies", "dog": "purrs"}}
    assert config_of(renamed) == wanted  # calibration and all
    assert torch.equal(rows(renamed), rows(saved))


def test_images_are_taken_into_a_class_when_asked(saved, data, tmp_path):
    words = ["add", str(saved), str(data / "val"), "-o", str(tmp_path / "new"), "--workers", "0"]
    with pytest.raises(UserError, match="has class bird, cat, dog already. Give --merge"):
        classes(words)
    classes([*words, "--merge"])
    assert config_of(tmp_path / "new")["classifier"]["images"] == [7, 7, 8]


def test_a_name_may_hold_an_equals_sign(tmp_path, data):
    run = save(tmp_path / "run", data, names=["a=b", "c", "d"])
    classes(["rename", str(run), "a=b=x", "c=y", "-o", str(tmp_path / "one")])
    assert config_of(tmp_path / "one")["label_names"] == ["x", "y", "d"]
    classes(["rename", str(run), "a=b", "c=d=e", "-o", str(tmp_path / "two")])
    assert config_of(tmp_path / "two")["label_names"] == ["c=d=e", "c", "d"]


def test_names_of_a_run_without_names(tmp_path, data):
    run = save(tmp_path / "run", data, names=None, record=False)
    words = ["remove", str(run), "two", "-o", str(tmp_path / "new")]
    with pytest.raises(UserError, match="no class names.*--names FILE"):
        classes(words)
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    classes([*words, "--names", str(tmp_path / "names.txt")])
    assert config_of(tmp_path / "new")["label_names"] == ["one", "three"]
    assert "classifier" not in config_of(tmp_path / "new")


def test_unreadable_images_are_named_or_left_out(saved, further, tmp_path):
    (further / "elk" / "a.png").write_bytes(b"no image")
    words = ["add", str(saved), str(further), "-o", str(tmp_path / "new"), "--workers", "0"]
    with pytest.raises(UserError, match=r"a\.png"):
        classes(words)
    assert not (tmp_path / "new").exists()
    classes([*words, "--skip-unreadable"])
    assert config_of(tmp_path / "new")["classifier"]["images"] == [4, 5, 6, 4, 4]


def test_a_folder_of_images_is_one_class(saved, tmp_path):
    (tmp_path / "gnu").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "gnu" / "1.png")
    classes(["add", str(saved), str(tmp_path / "gnu"), "-o", str(tmp_path / "new"), "--workers", "0"])
    assert config_of(tmp_path / "new")["label_names"] == [*NAMES, "gnu"]


@pytest.mark.parametrize(("words", "message"), [
    ("remove RUN dgo -o NEW", r"no class 'dgo'. Did you mean dog\?"),
    ("remove RUN bird cat dog -o NEW", "at least one class"),
    ("merge RUN pet dog -o NEW", "merged of 1 classes"),
    ("rename RUN dog cat -o NEW", "cat would stand twice"),
    ("rename RUN dog=x cat -o NEW", "cat is no OLD=NEW_NAME"),
    ("rename RUN dog=x dog=y cat=z -o NEW", "'dog' is to be renamed twice"),
    ("remove RUN dog -o RUN", "run is not empty. Name a folder with -o"),
    ("remove NOWHERE dog -o NEW", "NOWHERE is no folder"),
    ("add RUN NOWHERE -o NEW", "FOLDER .*NOWHERE is no folder"),
    ("add RUN EMPTY -o NEW", "class none has no images"),
    ("remove LINEAR dog -o NEW", "no FAIM head"),
    ("remove RUN dog -o NEW --names NOWHERE", "cannot read --names"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_leaves_nothing(saved, further, data, tmp_path, words, message):
    empty = further / "none"
    empty.mkdir()
    places = {"RUN": saved, "NEW": tmp_path / "new", "NOWHERE": tmp_path / "NOWHERE", "EMPTY": further}
    if "LINEAR" in words:
        places["LINEAR"] = save(tmp_path / "linear", data, arch="test_resnet")
    with pytest.raises(UserError, match=message):
        classes([str(places.get(word, word)) for word in words.split()])
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timm_faim.classes.command.save_weights", fail)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        classes(["remove", str(saved), "dog", "-o", str(tmp_path / "new")])
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_commands_of_the_how_to_parse():
    text = (Path(__file__).parents[1] / "docs" / "classes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    named = {build_parser("classes").parse_args(shlex.split(line, comments=True)[2:]).command
             for line in block.splitlines()}  # fmt: skip
    assert named == {"list", "add", "remove", "merge", "rename"}


def test_each_command_has_help(capsys):
    for name in ("list", "add", "remove", "merge", "rename"):
        with pytest.raises(SystemExit) as ended:
            build_parser("classes").parse_args([name, "--help"])
        assert ended.value.code == 0 and "RUN" in capsys.readouterr().out
