"""Bundled data, folders, unreadable images."""
import multiprocessing
import shutil
import tarfile

import pytest
import torch
from accelerate import Accelerator
from runs import make_images
from torchvision.transforms import RandomAffine

from timm_faim.data import omniglot242_root
from timm_faim.training.args import parse_args
from timm_faim.training.data import UNREADABLE, build_loaders, count_unreadable, open_datasets
from timm_faim.training.errors import UserError
from timm_faim.training.loop import evaluate

CONFIG = {"input_size": (3, 32, 32), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3,
          "crop_pct": 1.0, "crop_mode": "center"}


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "data")


def options(folder, *argv):
    return parse_args(["--data-dir", str(folder), "--batch-size", "4", "--workers", "0", *argv])


def loaders(args, in_chans=3):
    return build_loaders(args, open_datasets(args, in_chans), CONFIG, Accelerator(cpu=True))


def test_bundled_characters_are_complete_when_several_processes_unpack_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_FAIM_CACHE", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(3) as pool:
        roots = {result.get() for result in [pool.apply_async(omniglot242_root) for _ in range(3)]}
    assert roots == {tmp_path / "cache" / "omniglot242"}
    (root,) = roots
    for split in ("train", "val"):
        assert len(list((root / split).iterdir())) == 242
        assert len(list((root / split).glob("*/*.png"))) == 2420
    assert [p.name for p in root.parent.iterdir()] == ["omniglot242"]  # nothing left over


def test_interrupted_unpacking_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TIMM_FAIM_CACHE", str(tmp_path))

    def half(self, path, **_):
        (path / "train").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(tarfile.TarFile, "extractall", half)
    with pytest.raises(OSError, match="disk full"):
        omniglot242_root()
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIMM_FAIM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"omniglot242.*Not a directory"):
        open_datasets(parse_args([]), in_chans=1)


def test_folder_gives_classes_and_names(folder):
    data = open_datasets(options(folder), in_chans=3)
    assert (len(data.train), len(data.val), data.num_classes) == (12, 7, 3)
    assert data.label_names == ["bird", "cat", "dog"]


def test_class_map_orders_the_classes(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("dog\nbird\ncat\n")
    assert open_datasets(options(folder, "--class-map", str(names)), 3).label_names == ["dog", "bird", "cat"]


def test_more_classes_than_the_data_have_are_fine(folder):
    data = open_datasets(options(folder, "--num-classes", "5"), in_chans=3)
    assert data.num_classes == 5 and data.label_names is None


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"--data-dir .*nowhere does not exist"):
        open_datasets(options(tmp_path / "nowhere"), in_chans=3)


def test_folder_without_images(folder):
    for image in (folder / "train").rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"cannot open the train data.*Found 0 images.*train"):
        open_datasets(options(folder), in_chans=3)


def test_missing_validation_folder_is_not_replaced_by_the_training_images(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match="--val-split"):
        open_datasets(options(folder), in_chans=3)


def test_splits_with_different_classes(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"different classes \(3 and 3; in one of them only: dog, wolf\)"):
        open_datasets(options(folder), in_chans=3)


def test_labels_outside_the_classes(folder):
    with pytest.raises(UserError, match=r"labels up to 2, outside .*--num-classes 2.*at least --num-classes 3"):
        open_datasets(options(folder, "--num-classes", "2"), in_chans=3)


def test_batch_larger_than_the_data(folder):
    with pytest.raises(UserError, match=r"--batch-size 13 is larger than the training data \(12 images\)"):
        loaders(options(folder, "-b", "13"))


def test_affine_comes_first_and_only_in_training(folder):
    train, val = loaders(options(folder, "--affine", "10", "0.1", "0.1", "5", "--affine-fill", "255"))
    affine, *_ = train.dataset.transform.transforms
    assert isinstance(affine, RandomAffine) and affine.fill == 255 and affine.scale == (0.9, 1.1)
    assert not any(isinstance(t, RandomAffine) for t in val.dataset.transform.transforms)


def test_bad_affine(folder):
    with pytest.raises(UserError, match=r"--affine -10.* does not do"):
        loaders(options(folder, "--affine", "-10", "0.1", "0.1", "5"))


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("split", [0, 1], ids=["train", "val"])
def test_unreadable_image_is_an_error_that_names_the_file(folder, workers, split):
    broken = folder / ("train", "val")[split] / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    loader = loaders(options(folder, "--workers", workers))[split]
    with pytest.raises(UserError, match=rf"^cannot read image {broken} .*--skip-unreadable$") as raised:
        list(loader)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skipped_images_are_counted_once_and_left_out_of_validation(folder, workers):
    broken = [folder / "train" / "cat" / "1.png", folder / "val" / "dog" / "0.png", folder / "val" / "dog" / "1.png"]
    for image in broken:
        image.write_bytes(b"no image")
    args = options(folder, "--workers", workers, "--skip-unreadable")
    train, val = loaders(args)
    accelerator = Accelerator(cpu=True)
    for _ in range(2):
        batches = [target for _, target in train]
        assert [len(target) for target in batches] == [4, 4, 4]  # training batches keep their size
        assert all(UNREADABLE not in target for target in batches)
        metrics = evaluate(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), val, accelerator, args)
        assert metrics["samples"] == 5
    assert count_unreadable((train, val), accelerator) == 3


def test_all_images_unreadable(folder):
    for image in (folder / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 12 images can be read"):
        list(loaders(options(folder, "--skip-unreadable"))[0])


def test_grey_images_for_one_channel(folder):
    args = options(folder)
    data = open_datasets(args, in_chans=1)
    config = CONFIG | {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    images, _ = next(iter(build_loaders(args, data, config, Accelerator(cpu=True))[0]))
    assert images.shape == (4, 1, 32, 32)
