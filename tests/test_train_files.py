"""Whole-or-nothing writes and the run folder."""

import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from timm_faim.run import files
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write, create_run_folder, link_as
from timm_faim.run.weights import BEST, LAST, TIMM_NAME, save_batch, save_weights


def test_failure_in_the_middle_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_the_old_file_is_there_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_text("old")
    synced = []

    def fsync(descriptor):
        synced.append(path.read_text())
        os.fstat(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path  # a rename is atomic within one file system only
        temporary.write_text("new")
    assert synced == ["old", "new"]  # the file before the rename, the folder after it
    assert path.read_text() == "new"


def test_files_have_the_mode_of_the_umask(tmp_path):
    with atomic_write(tmp_path / "a") as temporary:
        temporary.write_text("")
        temporary.chmod(0o600)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("hard_links", [True, False])
def test_second_name_survives_a_new_first_file(tmp_path, monkeypatch, hard_links):
    if not hard_links:

        def refuse(*_):
            raise OSError("no hard links here")

        monkeypatch.setattr(files.os, "link", refuse)
    first, second = tmp_path / "first", tmp_path / "second"
    for text in ("one", "two"):
        with atomic_write(first) as temporary:
            temporary.write_text(text)
        if text == "one":
            link_as(first, second)
    assert (first.read_text(), second.read_text()) == ("two", "one")
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_are_contiguous_and_best_stays(tmp_path):
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.tied = model.weight  # safetensors refuses shared memory
    best = model.weight.detach().clone()
    save_weights(model.state_dict(), tmp_path, is_best=True)
    with torch.no_grad():
        model.weight.zero_()
    save_weights(model.state_dict(), tmp_path, is_best=False)
    for name in (BEST, TIMM_NAME):
        assert torch.equal(load_file(tmp_path / name)["weight"], best)
    assert load_file(tmp_path / LAST)["weight"].abs().sum() == 0


def test_batch_is_saved(tmp_path):
    images, target = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.tensor([1, 0])
    save_batch(tmp_path / "b.safetensors", images, target)
    batch = load_file(tmp_path / "b.safetensors")
    assert torch.equal(batch["input"], images) and torch.equal(batch["target"], target)


def test_run_folder_names(tmp_path):
    first, second = (create_run_folder(str(tmp_path), "", "faim_resnet10t", 56) for _ in range(2))
    assert first != second and first.name.endswith("-faim_resnet10t-56")
    assert create_run_folder(str(tmp_path), "mine", "faim_resnet10t", 56) == tmp_path / "mine"


def test_run_folder_with_files_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    assert create_run_folder(str(tmp_path), "mine", "m", 56).is_dir()  # an empty one is fine
    (tmp_path / "mine" / "summary.csv").write_text("")
    with pytest.raises(UserError, match=r"mine is not empty\. Choose another --experiment"):
        create_run_folder(str(tmp_path), "mine", "m", 56)


def test_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to run folder .*Not a directory\. Choose another --output"):
        create_run_folder(str(tmp_path / "file"), "mine", "m", 56)


def test_run_folder_without_permission(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)  # the tests may run as root, who may do anything
    with pytest.raises(UserError, match=r"cannot write to run folder .*Permission denied"):
        create_run_folder(str(tmp_path), "mine", "m", 56)
