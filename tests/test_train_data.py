"""Bundled data, folders, tar files, hub data and shards; unreadable images."""

import copy
import os
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from children import in_group
from PIL import Image
from runs import make_images, make_shards, open_data
from torchvision.transforms import RandomAffine

from timm_faim.data import omniglot242_root
from timm_faim.images import splits
from timm_faim.images.checked import UNREADABLE
from timm_faim.images.pixels import InMode
from timm_faim.images.splits import open_split
from timm_faim.report.predictions import evaluate
from timm_faim.run.errors import UserError
from timm_faim.training.args import parse_args
from timm_faim.training.data import build_fit_loader, build_loaders, count_unreadable
from timm_faim.training.sampling import SeededSamples

CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bilinear",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture
def folder(tmp_path):
    return make_images(tmp_path / "data")


def options(folder, *argv):
    return parse_args(["--data-dir", str(folder), "--batch-size", "4", "--workers", "0", *argv])


def loaders(args, in_chans=3):
    return build_loaders(args, open_data(args, in_chans), CONFIG, Accelerator(cpu=True))


def _unpack(cache):
    os.environ["TIMM_FAIM_CACHE"] = str(cache)
    assert omniglot242_root() == cache / "omniglot242"


def test_bundled_characters_are_complete_when_several_processes_unpack_at_once(tmp_path):
    in_group(_unpack, tmp_path / "cache", processes=3)
    root = tmp_path / "cache" / "omniglot242"
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
        open_data(parse_args([]), 1)


def test_folder_gives_classes_and_names(folder):
    data = open_data(options(folder), 3)
    assert (len(data.train), len(data.val), data.num_classes) == (12, 7, 3)
    assert data.label_names == ["bird", "cat", "dog"]


def test_class_map_orders_the_classes(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("dog\nbird\ncat\n")
    assert open_data(options(folder, "--class-map", str(names)), 3).label_names == ["dog", "bird", "cat"]


def test_more_classes_than_the_data_have_are_fine(folder):
    data = open_data(options(folder, "--num-classes", "5"), 3)
    assert data.num_classes == 5 and data.label_names is None


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"--data-dir .*nowhere does not exist"):
        open_data(options(tmp_path / "nowhere"), 3)


def test_folder_without_images(folder):
    for image in (folder / "train").rglob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"cannot open the train data.*Found 0 images.*train"):
        open_data(options(folder), 3)


def test_missing_validation_folder_is_not_replaced_by_the_training_images(folder):
    shutil.rmtree(folder / "val")
    with pytest.raises(UserError, match="--val-split"):
        open_data(options(folder), 3)


def test_splits_with_different_classes(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"different classes \(3 and 3; in one of them only: dog, wolf\)"):
        open_data(options(folder), 3)


def test_labels_outside_the_classes(folder):
    with pytest.raises(UserError, match=r"labels up to 2, outside .*--num-classes 2.*at least --num-classes 3"):
        open_data(options(folder, "--num-classes", "2"), 3)


def test_batch_larger_than_the_data(folder):
    with pytest.raises(UserError, match=r"--batch-size 13 is larger than the training data \(12 images\)"):
        loaders(options(folder, "-b", "13"))


def test_affine_comes_first_and_only_in_training(folder):
    train, val = loaders(options(folder, "--affine", "10", "0.1", "0.1", "5", "--affine-fill", "255"))
    affine, *_ = train.dataset.transform.transforms
    assert isinstance(affine, RandomAffine) and affine.fill == 255 and affine.scale == (0.9, 1.1)
    assert not any(isinstance(t, RandomAffine) for t in val.dataset.transform.transforms)


def test_bad_affine(folder):
    with pytest.raises(UserError, match=r"--affine takes .*TRANSLATE in 0..1.* got 10 2 0.1 5"):
        loaders(options(folder, "--affine", "10", "2", "0.1", "5"))


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
        metrics = evaluate(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3)), val, accelerator, skip_unreadable=True
        )
        assert metrics["samples"] == 5
    assert count_unreadable((train, val), accelerator) == 3


def test_all_images_unreadable(folder):
    for image in (folder / "train").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 12 images can be read"):
        list(loaders(options(folder, "--skip-unreadable"))[0])


def test_grey_images_for_one_channel(folder):
    args = options(folder)
    data = open_data(args, 1)
    config = CONFIG | {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    images, _ = next(iter(build_loaders(args, data, config, Accelerator(cpu=True))[0]))
    assert images.shape == (4, 1, 32, 32)


def test_positional_folder_and_no_validation(folder):
    args = parse_args([str(folder), "--val-split", "", "-b", "4", "--workers", "0"])
    data = open_data(args, 3)
    train, val = build_loaders(args, data, CONFIG, Accelerator(cpu=True))
    assert data.val is None and val is None and len(train) == 3
    assert count_unreadable((train, val), Accelerator(cpu=True)) == 0


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder_is_named(folder, split):
    (folder / split / "ant").mkdir()
    (folder / split / "ant" / "notes.txt").write_text("no image")
    (folder / split / ".cache").mkdir()
    with pytest.raises(UserError, match=rf"1 class folders of .*{split} hold no images: ant\. Fill or remove"):
        open_data(options(folder), 3)


def test_class_map_with_a_class_that_has_no_training_image(folder, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("dog\nbird\ncat\nant\n")
    (folder / "train" / "other").mkdir()  # not a class: timm leaves it out on purpose
    with pytest.raises(UserError, match=r"1 classes have no training image: ant\. Take them out of --class-map"):
        open_data(options(folder, "--class-map", str(names)), 3)


def test_tar_files(folder):
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
        shutil.rmtree(folder / split)
    args = options(folder, "--train-split", "train.tar", "--val-split", "val.tar")
    data = open_data(args, 3)
    assert (len(data.train), len(data.val), data.label_names) == (12, 7, ["bird", "cat", "dog"])
    train, val = build_loaders(args, data, CONFIG, Accelerator(cpu=True))
    assert sorted(torch.cat([target for _, target in val]).tolist()) == [0, 0, 0, 1, 1, 2, 2]
    assert len(list(train)) == 3


def test_one_tar_file_for_both_splits(folder):
    path = folder / "all.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "train", arcname=".")
    with pytest.raises(UserError, match="the same images"):
        open_data(options(path), 3)


def test_image_folders_are_read_by_timm(folder):
    with pytest.raises(UserError, match="torch/image_folder: image folders are read by timm. Leave --dataset out"):
        open_data(options(folder, "--dataset", "torch/image_folder"), 3)


def test_every_flag_of_augmentation_reaches_timm(folder):
    args = options(
        folder,
        "--train-crop-mode",
        "rkrc",
        "--grayscale-prob",
        "0.3",
        "--gaussian-blur-prob",
        "0.2",
        "--color-jitter-prob",
        "0.7",
        "--reprob",
        "1",
        "--remode",
        "const",
        "--resplit",
        "--train-interpolation",
        "bicubic",
    )
    train, _ = loaders(args)
    steps = {type(step).__name__: step for step in train.dataset.transform.transforms}
    assert "CenterCropOrPad" in steps and steps["ResizeKeepRatio"].interpolation.value == "bicubic"
    assert steps["RandomGrayscale"].p == 0.3
    applied = [step.p for step in train.dataset.transform.transforms if type(step).__name__ == "RandomApply"]
    assert sorted(applied) == [0.2, 0.7]
    erased = [(images.reshape(4, -1) == 0).any(1) for images, _ in train]  # no pixel is the mean, 127.5
    assert not any(mask[:2].any() for mask in erased) and all(mask[2:].all() for mask in erased)


def test_interpolation_follows_validation_without_augmentation(folder):
    def interpolation(*argv):
        resize = loaders(options(folder, *argv))[0].dataset.transform.transforms[0]
        return getattr(resize, "interpolation", None)

    assert interpolation("--no-aug").value == "bilinear"
    assert isinstance(interpolation(), (tuple, list))  # timm's default draws one of two
    assert interpolation("--train-interpolation", "").value == "bilinear"


def test_views_of_an_image_are_split_over_the_batch(folder):
    args = options(
        folder,
        "--aug-splits",
        "3",
        "--aa",
        "rand-m9-mstd0.5",
        "--affine",
        "1",
        "0",
        "0",
        "0",
        "--scale",
        "1",
        "1",
        "--ratio",
        "1",
        "1",
        "--hflip",
        "0",
    )
    train, _ = loaders(args)
    assert isinstance(train.dataset.transform.transforms[0], RandomAffine)
    images, target = next(iter(train))
    assert images.shape == (12, 3, 32, 32) and target.tolist() == target[:4].tolist() * 3
    assert not torch.equal(images[:4], images[4:8])


def test_training_images_are_seeded_and_counted_below_the_seed(folder):
    (folder / "train" / "cat" / "1.png").write_bytes(b"no image")
    train, val = loaders(options(folder, "--skip-unreadable"))
    assert isinstance(train.dataset, SeededSamples)
    first, again, other = (train.dataset[0, seed][0] for seed in (1, 1, 2))
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(again))
    assert not torch.equal(torch.as_tensor(first), torch.as_tensor(other))
    list(train)
    assert count_unreadable((train, val), Accelerator(cpu=True)) == 1


def test_repeated_augmentation_needs_processes(folder):
    with pytest.raises(UserError, match=r"--aug-repeats .*there is one\. Start several with accelerate launch"):
        loaders(options(folder, "--aug-repeats", "3"))


def test_images_come_in_the_type_of_the_model(folder):
    for loader in loaders(options(folder, "--model-dtype", "bfloat16")):
        assert next(iter(loader))[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"unknown --dataset cifar10\..*torch/cifar10"),
        ("omniglot24", r"Did you mean omniglot242"),
        ("hfd/food101", r"unknown type of --dataset hfd/food101\. Did you mean hfds"),
        ("torch/cifr", r"cannot open the train data of torch/cifr: Unknown torchvision dataset"),
    ],
)
def test_unknown_datasets(folder, name, message):
    with pytest.raises(UserError, match=message):
        open_data(options(folder, "--dataset", name), 3)


@pytest.mark.parametrize(
    ("name", "package"), [("hfds/x", "datasets"), ("wds/", "webdataset"), ("tfds/mnist", "tensorflow_datasets")]
)
def test_missing_package_is_named(folder, monkeypatch, name, package):
    monkeypatch.setattr(splits, "find_spec", lambda wanted: None)
    with pytest.raises(UserError, match=f"needs the package {package}: pip install"):
        open_data(options(folder, "--dataset", name), 3)


def test_data_that_need_a_folder(folder):
    with pytest.raises(UserError, match=r"--dataset torch/cifar10 needs --data-dir"):
        open_data(parse_args(["--dataset", "torch/cifar10"]), 3)


@pytest.fixture
def hub_folder(folder, tmp_path, monkeypatch):
    """The image folder as a data set of Hugging Face datasets, which reads its splits by the folders' names."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (folder / "val").rename(folder / "validation")
    return folder, tmp_path / "cache"


def test_hub_data_by_number(hub_folder):
    folder, cache = hub_folder
    args = options(cache, "--dataset", f"hfds/{folder}")
    data = open_data(args, 3)
    assert (len(data.train), len(data.val), data.label_names) == (12, 7, ["bird", "cat", "dog"])
    train, val = build_loaders(args, data, CONFIG, Accelerator(cpu=True))
    assert isinstance(train.dataset, SeededSamples)
    assert sorted(torch.cat([target for _, target in val]).tolist()) == [0, 0, 0, 1, 1, 2, 2]
    fit = build_fit_loader(args, CONFIG, Accelerator(cpu=True), 3)
    assert sum(len(target) for _, target in fit) == 12


def test_hub_data_with_a_wrong_field_or_split(hub_folder):
    folder, cache = hub_folder
    for flag in ("--input-key", "--target-key"):
        with pytest.raises(UserError, match=r"in field picture.* Choose from image, label with --input-key"):
            open_data(options(cache, "--dataset", f"hfds/{folder}", flag, "picture"), 3)
    with pytest.raises(UserError, match="cannot open the tests data.*tests"):
        open_data(options(cache, "--dataset", f"hfds/{folder}", "--val-split", "tests"), 3)


def test_streamed_hub_data(hub_folder):
    folder, cache = hub_folder
    args = options(cache, "--dataset", f"hfids/{folder}", "--dataset-download")
    data = open_data(args, 3)
    train, val = build_loaders(args, data, CONFIG, Accelerator(cpu=True))
    assert data.num_classes == 3 and len(train) == 3
    assert sum(len(target) for _, target in val) == 7
    assert [len(target) for _, target in train] == [4, 4, 4]
    twice, _ = loaders(options(cache, "--dataset", f"hfids/{folder}", "--dataset-download", "--epoch-repeats", "2"))
    assert len(twice) == 6


def test_several_labels_an_image_from_hub_data(folder, tmp_path):
    hub = pytest.importorskip("datasets")
    paths = sorted(map(str, (folder / "train").rglob("*.png")))
    labels = [[i % 3, (i + 1) % 3] if i % 2 else [] for i in range(12)]
    table = hub.Dataset.from_dict(
        {
            "image": paths,
            "label": labels,
            "hot": [[float(k in row) for k in range(3)] for row in labels],
            "big": [i % 2 for i in range(12)],
            "red": [i % 3 == 0 for i in range(12)],
        },
        features=hub.Features(
            {
                "image": hub.Image(),
                "label": hub.Sequence(hub.ClassLabel(names=list("abc"))),
                "hot": hub.Sequence(hub.Value("float32")),
                "big": hub.Value("int64"),
                "red": hub.Value("bool"),
            }
        ),
    )
    for split in ("train", "validation"):
        table.to_parquet(str(tmp_path / "hub" / f"{split}.parquet"))
    common = (tmp_path / "cache", "--dataset", f"hfds/{tmp_path / 'hub'}", "--multi-label")

    def targets(*argv):
        args = options(*common, *argv)
        data = open_data(args, 3)
        _, val = build_loaders(args, data, CONFIG, Accelerator(cpu=True))
        return data.label_names, torch.cat([target for _, target in val])

    expected = torch.tensor([[float(k in row) for k in range(3)] for row in labels])
    names, found = targets()
    assert names == ["a", "b", "c"] and torch.equal(found, expected)
    _, found = targets("--target-key", "hot", "--target-format", "multihot", "--num-classes", "3")
    assert torch.equal(found, expected)
    names, found = targets("--target-key", "big,red")
    assert names == ["big", "red"] and found[:4].tolist() == [[0, 1], [1, 0], [0, 0], [1, 1]]


@pytest.fixture
def shards(folder):
    """The image folder as webdataset shards: two for training, one for validation."""
    pytest.importorskip("webdataset")
    make_shards(folder, folder, validation=1)
    return folder


@pytest.mark.parametrize("workers", ["0", "4"])  # with 4, two would have no shard
def test_shards(shards, workers):
    args = options(shards, "--dataset", "wds/", "--num-classes", "3", "--workers", workers)
    train, val = loaders(args)
    assert sorted(torch.cat([target for _, target in val]).tolist()) == [0, 0, 0, 1, 1, 2, 2]
    assert sum(len(target) for _, target in train) >= 12
    fit = build_fit_loader(args, CONFIG, Accelerator(cpu=True), 3)
    assert torch.bincount(torch.cat([target for _, target in fit])).tolist() == [4, 4, 4]


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024


def stream(folder, pixels, kind):
    """The first image of a stream whose every training image is these pixels."""
    for path in (folder / "train").rglob("*.png"):
        Image.fromarray(pixels).save(path)
    if kind == "wds":
        make_shards(folder, folder, validation=1)
        args = options(folder, "--dataset", "wds/", "--num-classes", "3")
    else:
        args = options(folder / "cache", "--dataset", f"hfids/{folder}", "--dataset-download")
    dataset = open_split(args.data, args.run, True, 3)
    dataset.transform = np.asarray
    return next(iter(dataset))[0]


@pytest.mark.parametrize("kind", ["wds", "hfids"])
def test_streams_scale_sixteen_bits_by_their_range(folder, monkeypatch, kind):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pytest.importorskip({"wds": "webdataset", "hfids": "datasets"}[kind])
    (folder / "val").rename(folder / ("validation" if kind == "hfids" else "val"))
    assert np.array_equal(stream(folder, RAMP, kind)[..., 0], np.rint(RAMP / 257))


def test_a_reader_in_a_mode_is_the_reader_otherwise(shards):
    args = options(shards, "--dataset", "wds/", "--num-classes", "3")
    reader = copy.copy(open_split(args.data, args.run, True, 3).reader)
    assert (len(reader), reader.mode, reader.split_info) == (12, "RGB", reader.reader.split_info)
    pixels = [(Image.fromarray(RAMP.astype(np.float32)), 0)]
    with pytest.raises(UserError, match="an image of the stream: float pixels without a known range"):
        list(InMode(pixels, "RGB"))


def test_shards_without_a_number_of_classes_or_of_samples(shards):
    with pytest.raises(UserError, match="give --num-classes"):
        open_data(options(shards, "--dataset", "wds/"), 3)
    pattern = options(shards, "--dataset", "wds/", "--train-split", "train-{0..1}.tar", "--num-classes", "3")
    with pytest.raises(UserError, match="num_samples not specified"):
        open_data(pattern, 3)
    pattern.data.train_num_samples = 12
    assert len(open_data(pattern, 3).train) == 12


def test_shards_that_do_not_go_round(shards):
    args = options(shards, "--dataset", "wds/", "--num-classes", "3")
    three = SimpleNamespace(num_processes=3, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"3 processes share .* there are 2: train-0\.tar, train-1\.tar\. Split"):
        build_loaders(args, open_data(args, 3), CONFIG, three)
    with pytest.raises(UserError, match="--head-init data reads all images in every process"):
        build_fit_loader(args, CONFIG, three, 3)


def test_webp_folders(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    data = open_data(options(folder), 3)
    assert (len(data.train), len(data.val)) == (12, 7)
