"""One order of classes and images in every process; no class of what is none; pixels keep their range."""

import io
import os
import random
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from children import in_group
from PIL import Image
from runs import TINY, make_images, open_data, options_of, train

from timm_faim.images.folders import check_same_classes
from timm_faim.images.pixels import read_image
from timm_faim.images.splits import open_split
from timm_faim.run.errors import UserError

TIES = ["acer1", "acer01", "Acer1", "1", "01", "b"]
ORDER = ["01", "1", "Acer1", "acer01", "acer1", "b"]


def open_folder(root, *flags):
    return open_data(options_of("--data-dir", root, *flags))


def open_training(root):
    options = options_of("--data-dir", root)
    return open_split(options.data, options.run, True, 3)


def classes_under(seed, root):
    code = (
        "import sys; from runs import open_data, options_of; "
        "data = open_data(options_of('--data-dir', sys.argv[1])); "
        "print(data.label_names, [p for p, _ in data.train.images.reader.samples])"
    )
    environment = os.environ | {
        "PYTHONHASHSEED": str(seed),
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
    }
    return subprocess.run(
        [sys.executable, "-c", code, str(root)], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_order_is_total(tmp_path):
    make_images(tmp_path, classes=TIES)
    data = open_folder(tmp_path)
    assert data.label_names == ORDER
    for dataset in (data.train, data.val):
        assert all(ORDER[k] == Path(path).parent.name for path, k in dataset.images.reader.samples)


@pytest.mark.slow
def test_the_order_does_not_depend_on_the_hash_seed(tmp_path):
    make_images(tmp_path, classes=TIES)
    assert len({classes_under(seed, tmp_path) for seed in range(5)}) == 1


def test_natural_order_stays_where_it_was_total(tmp_path):
    make_images(tmp_path, classes=["c10", "c9", "C1", "a"])
    assert open_folder(tmp_path).label_names == ["a", "C1", "c9", "c10"]


def test_two_lists_of_classes_are_shown():
    check_same_classes(["a", "b"], ["a", "b"], "process 1")
    check_same_classes(None, ["a"], "process 1")
    with pytest.raises(UserError, match=r"class 1 is 'b', 'c' here and 'c', 'b' in process 1 \(3 and 3 classes\)"):
        check_same_classes(["a", "b", "c"], ["a", "c", "b"], "process 1")
    with pytest.raises(UserError, match=r"class 2 is 'c' here and not there in"):
        check_same_classes(["a", "b", "c"], ["a", "b"], "process 1")


def _open_other_classes(root):
    rank = Accelerator(cpu=True).process_index
    with pytest.raises(UserError, match=r"class 0 is '\w+'.* in process \d"):
        open_folder(f"{root}/{rank}")


def test_processes_that_see_other_classes_all_refuse(tmp_path):
    make_images(tmp_path / "0", classes=["a", "b"])
    make_images(tmp_path / "1", classes=["b", "c"])
    in_group(_open_other_classes, str(tmp_path))


@pytest.mark.parametrize("more", [[], ["--num-classes", "5"]], ids=["all named", "more classes than folders"])
def test_a_run_resumes_with_its_own_classes_only(tmp_path, more):
    images = make_images(tmp_path / "images")
    options = ["--data-dir", images, "--model", "faim_test_resnet", *TINY, "--output", tmp_path, *more]
    train(*options, "--experiment", "run", "--stop-epoch", "1")
    for split in ("train", "val"):
        (images / split / "cat").rename(images / split / "zebra")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"class 1 is 'dog', 'zebra' here and 'cat', 'dog' in the run in "):
        train(*options, "--resume", tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    with pytest.raises(UserError, match=r"class 1 is 'dog', 'zebra' here and 'cat', 'dog' in the model"):
        train("--eval-only", "--resume", tmp_path / "run", "--output", tmp_path / "evaluation", *more)


def test_hidden_folders_and_files_are_no_classes(tmp_path):
    make_images(tmp_path, classes=["bird", ".ipynb_checkpoints", "__MACOSX", "dog"])
    (tmp_path / "train" / "bird" / "._0.png").write_bytes(b"resource fork")
    data = open_folder(tmp_path)
    assert data.label_names == ["bird", "dog"] and len(data.train) == 8
    assert {k for _, k in data.train.images.reader.samples} == {0, 1}


def in_tars(folder, classes):
    make_images(folder / "images", classes=classes)
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / "images" / split, arcname=".")
    return open_folder(folder, "--train-split", "train.tar", "--val-split", "val.tar")


def test_tar_files_keep_to_the_same_rules(tmp_path):
    data = in_tars(tmp_path / "hidden", ["bird", ".ipynb_checkpoints", "dog"])
    assert data.label_names == ["bird", "dog"] and len(data.train) == 8
    with pytest.raises(UserError, match=r"same name in different places \(cat/old, cat/young, dog/old, "):
        in_tars(tmp_path / "nested", ["cat/young", "cat/old", "dog/young", "dog/old"])
    assert in_tars(tmp_path / "deep", ["all/cat", "all/dog"]).label_names == ["cat", "dog"]
    with pytest.raises(UserError, match=r"4 images of the train\.tar data lie directly in .*train\.tar \(0\.png\)\."):
        in_tars(tmp_path / "stray", [".", "dog"])


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_tar_of_tars_has_a_class_for_each(tmp_path, prefix):
    make_images(tmp_path / "images", classes=["bird", "dog"])
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as outer:
            for folder in (tmp_path / "images" / split).iterdir():
                stream = io.BytesIO()
                with tarfile.open(fileobj=stream, mode="w") as tar:
                    for image in folder.iterdir():
                        tar.add(image, arcname=prefix + image.name)
                member = tarfile.TarInfo(f"{folder.name}.tar")
                member.size = stream.tell()
                stream.seek(0)
                outer.addfile(member, stream)
    flags = ["--train-split", "train.tar", "--val-split", "val.tar"]
    if prefix:  # timm would make them all one class of the name "."
        with pytest.raises(UserError, match=r"8 images of the train\.tar data lie directly in .*no class folders"):
            open_folder(tmp_path, *flags)
    else:
        data = open_folder(tmp_path, *flags)
        assert data.label_names == ["bird", "dog"] and len(data.train) == 8


def test_nested_folders_are_refused(tmp_path):
    make_images(tmp_path, classes=["cat/young", "cat/old", "dog/young", "dog/old"])
    with pytest.raises(UserError, match=r"train data .*same name in different places \(cat/old, cat/young, dog/old, "):
        open_folder(tmp_path)
    make_images(tmp_path / "deep", classes=["cat/tabby", "dog"])
    with pytest.raises(UserError, match=r"folders within folders \(cat/tabby\).*--class-map"):
        open_folder(tmp_path / "deep")
    (tmp_path / "classes.txt").write_text("tabby\ndog\n")
    assert open_folder(tmp_path / "deep", "--class-map", str(tmp_path / "classes.txt")).label_names == ["tabby", "dog"]


def test_stray_images_and_a_folder_without_classes(tmp_path):
    make_images(tmp_path / "a")
    (tmp_path / "a" / "train" / "bird" / "0.png").rename(tmp_path / "a" / "train" / "lost.png")
    with pytest.raises(UserError, match=r"1 images of the train data lie directly in .*train \(lost\.png\)\. Put each"):
        open_folder(tmp_path / "a")
    (tmp_path / "flat").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / "flat" / f"{i}.png")
    for flags in ([], ["--eval-only", "--model", "test_resnet", "--pretrained"]):
        with pytest.raises(UserError, match=r"3 images of the \w+ data lie directly in .*no class folders"):
            open_folder(tmp_path / "flat", *flags)


def test_a_pipe_in_a_class_folder_does_not_hang(tmp_path):
    make_images(tmp_path)
    os.mkfifo(tmp_path / "train" / "bird" / "9.png")
    images = open_training(tmp_path)
    images.transform = lambda image: image
    number = next(i for i, (path, _) in enumerate(images.images.reader.samples) if path.endswith("9.png"))
    with pytest.raises(UserError, match=r"cannot read image .*bird/9\.png \(no regular file\).*--skip-unreadable"):
        images[number]
    images.skip = True
    assert images[number][0].size == (32, 32) and images.unreadable[number]


RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)


def stored(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_are_scaled_by_their_range(kind, mode):
    got = np.asarray(read_image(stored(Image.fromarray(RAMP), kind), mode))
    expected = np.rint(RAMP / 257)
    assert np.array_equal(got if mode == "L" else got[..., 0], expected)


def tiff(pixels, bits, meaning):
    """A grey TIFF that Pillow reads and does not write: of 12 bits a pixel, or with 0 for white."""
    data = pixels.astype("<u2").tobytes()
    if bits == 12:
        a, b = pixels.reshape(-1, 2).astype(int).T
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    height, width = pixels.shape
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, meaning),
        (273, 8 + 2 + 12 * 9 + 4),
        (277, 1),
        (278, height),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return io.BytesIO(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data)


@pytest.mark.parametrize(("bits", "meaning"), [(12, 1), (16, 1), (16, 0)])
def test_tiffs_say_their_bits_and_what_zero_means(bits, meaning):
    got = np.asarray(read_image(tiff(RAMP >> 16 - bits, bits, meaning), "L")).astype(int)
    expected = RAMP / 257
    assert np.abs(got - (expected if meaning else 255 - expected)).max() <= 1


def test_sixteen_bits_with_a_sign_are_refused():
    cards = [
        "SIMPLE  =                    T",
        "BITPIX  =                   16",
        "NAXIS   =                    2",
        "NAXIS1  =                    8",
        "NAXIS2  =                    8",
        "END",
    ]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    with pytest.raises(ValueError, match=r"16-bit FITS pixels without a known range"):
        read_image(io.BytesIO(header + RAMP.astype(">i2").tobytes().ljust(2880, b"\0")), "L")


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_no_known_range_are_refused(tmp_path, dtype):
    make_images(tmp_path)
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "train" / "bird" / "9.tif")
    images = open_training(tmp_path)
    images.transform = lambda image: image
    number = next(i for i, (path, _) in enumerate(images.images.reader.samples) if path.endswith("9.tif"))
    with pytest.raises(UserError, match=r"9\.tif \(.* pixels without a known range; save it with 8 bits"):
        images[number]


def test_postscript_is_not_run():
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="PostScript is a program"):
        read_image(stored(image, "EPS"), "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_eight_bit_images_are_what_pillow_makes_of_them(mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    if mode == "HSV":
        pytest.skip("no format stores it")
    stream = stored(image, kind)
    assert np.array_equal(np.asarray(read_image(stream, "RGB")), np.asarray(Image.open(stream).convert("RGB")))


Image.init()
FORMATS = sorted(Image.SAVE.keys() & Image.OPEN.keys())
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"]


def damaged(content, how, rng):
    content = bytearray(content)
    if how == "cut":
        return bytes(content[: rng.randrange(len(content))])
    if how == "zeros":
        start = rng.randrange(len(content))
        content[start : start + rng.randrange(1, 64)] = bytes(rng.randrange(1, 64))
    elif how == "flips":
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif how == "empty":
        return b""
    elif how == "text":
        return b"no image" * rng.randrange(1, 100)
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Pillow's, of what it skips
@pytest.mark.parametrize("rounds", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_fuzz_of_the_reader(tmp_path, rounds):
    """A damaged image is read, or it is a UserError that names the file, or with --skip-unreadable it is recorded."""
    rng = random.Random(rounds)
    make_images(tmp_path, train=1)
    path = tmp_path / "train" / "bird" / "0.png"
    images = open_training(tmp_path)
    images.transform = lambda image: image
    number = next(i for i, (name, _) in enumerate(images.images.reader.samples) if "bird" in name)
    tried, refused, pairs = 0, 0, set()
    for kind in FORMATS:
        for mode in MODES:
            pixels = np.frombuffer(rng.randbytes(32 * 32 * 4), dtype=np.uint8).reshape(32, 32, 4)
            try:
                image = (
                    Image.fromarray(pixels.view(np.float32)[..., 0])
                    if mode == "F"
                    else (
                        Image.fromarray(pixels.view(np.uint16)[..., 0])
                        if mode == "I;16"
                        else (Image.fromarray(pixels[..., :3].copy()).convert(mode))
                    )
                )
                content = stored(image, kind).read()
            except (OSError, ValueError, KeyError, SystemError):  # a mode that the format has not
                continue
            for how in ["whole", "cut", "zeros", "flips", "flips", "empty", "text"] * rounds:
                path.write_bytes(damaged(content, how, rng))
                tried += 1
                images.skip = False
                try:
                    image, _ = images[number]
                    assert image.mode == "RGB"
                except UserError as e:
                    refused += 1
                    assert "bird/0.png" in str(e) and "--skip-unreadable" in str(e)
                    images.skip = True
                    images.unreadable.zero_()
                    images[number]
                    assert images.unreadable[number]
                pairs.add((kind, mode))
    assert len({kind for kind, _ in pairs}) >= 13 and 0.2 * tried < refused < tried
    print(
        f"{tried} files of {len({kind for kind, _ in pairs})} formats in {len(pairs)} format and mode pairs, "
        f"{refused} refused"
    )
