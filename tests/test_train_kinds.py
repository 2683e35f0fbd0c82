"""Whole runs of other kinds than one label an image in folders: several labels, one-against-all losses, streams."""

import pytest
import timm
import torch
from children import Launch
from runs import TINY, make_images, make_shards, read_summary, train, train_tiny

from timm_faim import faim_heads
from timm_faim.run.errors import UserError
from timm_faim.training.args import parse_args
from timm_faim.training.model import build_model


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


LEARN = ["--epochs", "20", "--lr", "0.01", "--smoothing", "0"]


@pytest.mark.parametrize("loss", ["bce", "asl"])
def test_losses_that_take_every_class_by_itself_learn(images, tmp_path, loss):
    """-γ d alone is never positive: such a loss could not fall below ln 2 for the right class."""
    run = train_tiny(images, tmp_path, *LEARN, "--loss", loss)
    rows = read_summary(run)
    assert float(rows[-1]["train_loss"]) < 0.5 * float(rows[0]["train_loss"])
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    (head,) = faim_heads(model).values()
    assert head.prior is not None
    assert model.faim_cfg["prior"] is True


def test_at_the_start_every_class_has_its_share(images, tmp_path):
    for cfg in (["space=sphere"], ["preset=flat"], ["preset=founding", "lambda_init=0.2"]):
        args = parse_args(
            [
                "--data-dir",
                str(images),
                "--model",
                "faim_test_vit",
                "--loss",
                "bce",
                "--img-size",
                "32",
                "--faim-cfg",
                *cfg,
            ]
        )
        (head,) = faim_heads(build_model(args, 500)).values()
        x = torch.randn(64, head.in_features)
        distance = (head.prior - head(x)).mean() / head.gamma()
        assert distance.item() == pytest.approx(head.initial_distance(), rel=0.1)
        if cfg[0] != "preset=founding":  # whose distances of 20 and more saturate the sigmoid
            assert 1 / 2000 < head(x).double().sigmoid().mean().item() < 4 / 500


def test_a_head_that_cannot_do_it_is_refused(images, tmp_path):
    with pytest.raises(UserError, match="--faim-cfg prior=False does not go with the bce loss"):
        train_tiny(images, tmp_path, "--loss", "bce", "--faim-cfg", "prior=False")
    run = train_tiny(images, tmp_path, "--epochs", "1")
    with pytest.raises(UserError, match="has no class prior, which the bce loss needs"):
        train_tiny(images, tmp_path / "b", "--loss", "bce", "--pretrained", model=f"local-dir:{run}")


@pytest.fixture(scope="module")
def several_labels(images, tmp_path_factory):
    """The images with the labels 'bird or cat', 'cat or dog', 'bird', as saved splits of Hugging Face datasets."""
    hub = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("several")
    labels = {"bird": [0, 2], "cat": [0, 1], "dog": [1]}
    for split in ("train", "val"):
        paths = sorted((images / split).rglob("*.png"))
        table = hub.Dataset.from_dict({"image": list(map(str, paths)), "label": [labels[p.parent.name] for p in paths]})
        table = table.cast_column("image", hub.Image())
        (folder / "validation" if split == "val" else folder / split).mkdir()
        table.to_parquet(folder / ("validation" if split == "val" else split) / "0000.parquet")
    return folder


# 5 of 9 possible labels are there: to say yes to all of them has a micro F1 of 71 %.
@pytest.mark.parametrize(
    ("argv", "f1"), [([], 72), (["--head-only", "--cache-features"], 1), (["--loss", "twoway"], 1)]
)
def test_several_labels_an_image(several_labels, tmp_path, monkeypatch, argv, f1):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    train(
        "--dataset",
        f"hfds/{several_labels}",
        "--multi-label",
        "--num-classes",
        "3",
        "--output",
        tmp_path,
        "--experiment",
        "run",
        "--model",
        "faim_test_resnet",
        *TINY,
        *LEARN,
        "--report",
        *argv,
    )
    rows = read_summary(tmp_path / "run")
    assert float(rows[-1]["eval_map"]) > 60 and float(rows[-1]["eval_micro_f1"]) > f1
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_is_trained_on_and_reported(images, tmp_path, processes):
    pytest.importorskip("webdataset")
    data = make_shards(images, tmp_path / "data")
    argv = [
        "--dataset",
        "wds/",
        "--data-dir",
        data,
        "--num-classes",
        "3",
        "--output",
        tmp_path,
        "--experiment",
        "run",
        "--model",
        "faim_test_resnet",
        *TINY,
        "-b",
        "2",
        "--report",
    ]
    launch = Launch(argv, tmp_path / "log", processes)
    assert launch.wait() == [0] * processes, launch.text()
    assert "report: " in launch.text() and "load it:" in launch.text()
    assert len(read_summary(tmp_path / "run")) == 2
