"""Runs of models that read second moments: the start in closed form, what else may be asked for, resuming, processes."""

import json

import pytest
import timm
import torch
from children import Launch, in_group
from runs import TINY, make_images, read_summary, train, train_tiny
from safetensors.torch import load_file
from test_train_faults import same_run
from test_train_fsdp import needs_fsdp_on_cpu
from test_train_run import evaluate_run

from timm_faim import TargetMargin, faim_heads, fit_
from timm_faim.models.moments import branch_of
from timm_faim.run.errors import UserError
from timm_faim.training.fits import starts_from_data

MOMENTS = ["--faim-cfg", "moments={'components': 6, 'rank': 8}"]
PROJECTION = "faim_moments.0.projection"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return train_tiny(images, tmp_path_factory.mktemp("out"), *MOMENTS, "--report")


def weights_of(run, name="last"):
    return load_file(run / f"{name}.safetensors")


def test_a_run_starts_in_closed_form_and_then_learns_the_projection(run):
    assert [row["epoch"] for row in read_summary(run)] == ["0", "1", "2"]
    start, last = weights_of(run, "top/epoch_0000"), weights_of(run)
    assert start["faim_moments.0.mean"].any() and start["fc.frames.0.stretch"].any() and start["fc.center"].any()
    for name in ("faim_moments.0.mean", "faim_moments.0.offset", "fc.frames.0.directions", "fc.part_weights"):
        assert torch.equal(start[name], last[name]), name
    assert not torch.equal(start[PROJECTION], last[PROJECTION])


def test_timm_opens_the_best_weights(run, images):
    model, metrics = evaluate_run(run, images)
    best = max(read_summary(run), key=lambda row: float(row["eval_top1"]))
    assert metrics["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-5)
    saved = json.loads((run / "config.json").read_text())["model_args"]["faim_cfg"]["moments"]
    assert saved == model.faim_cfg["moments"]
    assert saved == {"stages": ["layer3.0"], "components": 6, "weight": 0.75, "rank": 8}


@pytest.mark.parametrize(
    ("model", "argv"),
    [
        ("faim_test_vit", ["--layer-decay", "0.7", "--drop-path", "0.1"]),
        ("faim_test_vit", ["--grad-checkpointing"]),
        ("faim_test_resnet", ["--channels-last", "--grad-accum-steps", "2", "--model-ema", "--model-ema-decay", "0.5"]),
        ("faim_test_resnet", ["--freeze", "layer1", "faim_moments"]),
        ("faim_test_resnet", ["--head-only"]),
        ("faim_test_resnet", ["--head-only", "--cache-features"]),
        ("faim_test_resnet", ["--train-last", "1"]),
        ("faim_test_resnet", ["--contrastive", "supcon", "--samples-per-class", "2"]),
        ("faim_test_resnet", ["--head-refit", "1"]),
        ("faim_test_resnet", ["--loss", "bce", "--mixup", "0.2"]),
        ("faim_resnetv2_18", ["--model-kwargs", "channels=(16,16,24,32)", "stem_chs=16"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_else_a_run_may_ask_for(images, tmp_path, model, argv):
    run = train_tiny(images, tmp_path, *MOMENTS, "--epochs", "1", *argv, model=model)
    start, last = weights_of(run, "top/epoch_0000"), weights_of(run)
    assert all(tensor.isfinite().all() for tensor in last.values())
    stays = {"--freeze", "--head-only"} & set(argv)  # the branch is learned like what follows the last block
    assert torch.equal(start[PROJECTION], last[PROJECTION]) == bool(stays)
    model, metrics = evaluate_run(run, images)
    best = max(read_summary(run), key=lambda row: float(row["eval_top1"]))
    assert metrics["loss"] == pytest.approx(float(best["eval_loss"]), rel=1e-4)
