"""Runs of models with second moments: the start in closed form, what else may be asked for, resuming, processes."""

import json
import re

import pytest
import timm
import torch
from children import Launch, in_group
from runs import TINY, make_images, options_of, read_summary, train, train_tiny
from safetensors.torch import load_file
from test_train_faults import same_run
from test_train_fsdp import needs_fsdp_on_cpu
from test_train_run import evaluate_run

from timm_faim import FAIMHead, TargetMargin, fit_
from timm_faim.commands import run_command
from timm_faim.hub import Release, build_package
from timm_faim.metric import unit_vectors
from timm_faim.models.saved import check_config
from timm_faim.report.distances import HeadDistances
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


def command(images, output, *argv):
    words = ["--data-dir", images, "--output", output, "--experiment", "run", "--model", "faim_test_resnet", *TINY]
    return [*words, "-b", "2", *MOMENTS, "--recovery-interval", "0", "--resume", "auto", *argv]


def test_a_run_of_no_epochs_and_then_more_is_the_whole_run(run, images, tmp_path):
    train_tiny(images, tmp_path, *MOMENTS, "--head-init", "data", "--epochs", "0")
    same_run(train_tiny(images, tmp_path, *MOMENTS, "--resume", "auto"), run)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_asked_to_stop_it_goes_on_to_the_same_bits(images, tmp_path, processes):
    whole = Launch(command(images, tmp_path / "whole"), tmp_path / "whole.log", processes)
    assert whole.wait() == [0] * processes, whole.text()
    launch = Launch(command(images, tmp_path), tmp_path / "log", processes)
    launch.wait_for("run folder")
    launch.children[-1].terminate()
    assert launch.wait() == [0] * processes and "asked to stop" in launch.text(), launch.text()
    launch = Launch(command(images, tmp_path), tmp_path / "log", processes)
    assert launch.wait() == [0] * processes and "resuming from" in launch.text(), launch.text()
    same_run(tmp_path / "run", tmp_path / "whole" / "run")


def test_images_of_several_labels_are_refused():
    options = options_of("--multi-label", "--dataset", "hfds/a", "--model", "faim_test_vit")
    with pytest.raises(UserError, match="moments does not go with --multi-label"):
        starts_from_data(options, build())
    assert not starts_from_data(options, fit_(build(), [batch(10)]))


def test_the_report_says_what_each_part_says_alone(run):
    page = (run / "report.html").read_text()
    assert "moments of layer3.0" in page and "7 validation images" in page
    rows = re.findall(r"<tr><td>(pooled features|moments of layer3.0|together)</td><td>(\d+)</td><td>([^<]+)", page)
    assert [name for name, *_ in rows] == ["pooled features", "moments of layer3.0", "together"]
    assert [numbers for _, *numbers in rows] == [["96", "0.25"], ["28", "0.75"], ["124", "1.00"]]


def test_shares_of_parts_are_those_of_their_nearest_prototypes():
    head = FAIMHead(10, 4, parts=(7, 3), part_weights=(0.2, 0.8)).double()
    with torch.no_grad():
        head.mu.normal_()
    x, target = torch.randn(50, 10, dtype=torch.float64), torch.arange(50) % 4
    right = HeadDistances(head).parts_right(head.embed(x), target)
    for got, part in zip(right, (slice(0, 7), slice(7, 10)), strict=False):
        nearest = torch.cdist(unit_vectors(x[:, part]), unit_vectors(head.mu[:, part])).argmin(1)
        assert got == pytest.approx(100 * (nearest == target).double().mean())
    assert right[2] == pytest.approx(100 * (head(x).argmax(1) == target).double().mean())


def numbers(folder):
    metrics = json.loads((folder / "eval.json").read_text())["metrics"]
    return {name: value for name, value in metrics.items() if name != "images_per_s"}


def test_a_reopened_run_evaluates_alike(run, images, tmp_path):
    train("--data-dir", images, "--output", tmp_path, "--experiment", "again", *TINY, "--eval-only", "--model",
          f"local-dir:{run}")  # fmt: skip
    assert numbers(tmp_path / "again") == numbers(run / "eval")


def test_a_run_is_packed_for_the_hub_with_the_dict_of_its_moments(run, tmp_path):
    model = build_package(run, tmp_path / "package", Release("me/faim_test_resnet.pets"))
    config = json.loads((tmp_path / "package" / "config.json").read_text())
    check_config(config)
    assert config["model_args"]["faim_cfg"]["moments"]["components"] == 6
    x = batch(2)[0]
    for folder in (run, tmp_path / "package"):
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), model(x))


def test_images_are_searched_by_the_distance_of_all_parts(run, images, tmp_path):
    words = [images / "train", "--model", run, "--workers", "0", "--output", tmp_path / "found"]
    run_command("retrieve", [str(word) for word in words])
    facts = json.loads((tmp_path / "found" / "retrieval.json").read_text())
    assert facts["gallery_images"] == 12 and facts["results"]["FAIM"]["Recall@1"] > 50


def build(arch="test_vit", **options):
    torch.manual_seed(0)
    options = {"img_size": 32} if arch == "test_vit" else {}
    return timm.create_model(f"faim_{arch}", num_classes=5, faim_cfg={"moments": {"components": 6}}, **options).eval()


def batch(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 5


def gradients(model, images, target):
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(images), target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arch", ["test_vit", "test_resnet"])
def test_recomputed_activations_leave_the_gradients(arch):
    """The hooks of the stages run again in the backward pass."""
    model = fit_(build(arch), [batch(10)])
    wanted = gradients(model, *batch(4, 2))
    model.set_grad_checkpointing(True)
    got = gradients(model, *batch(4, 2))
    assert got.keys() == wanted.keys() and "faim_moments.0.projection" in got
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient)


def fits_agree():
    """Two processes with half of the images each, and with all of them, beside one with all of them."""
    batches, rank = [batch(10, seed) for seed in range(4)], torch.distributed.get_rank()
    by_halves, by_all = (fit_(build(), mine).state_dict() for mine in (batches[rank::2], batches))
    torch.distributed.barrier()
    for state in (by_halves, by_all):
        found = [None, None]
        torch.distributed.all_gather_object(found, state)
        assert all(torch.equal(value, found[1 - rank][key]) for key, value in state.items())
    torch.distributed.is_initialized, is_initialized = lambda: False, torch.distributed.is_initialized
    alone = fit_(build(), batches).eval()
    torch.distributed.is_initialized = is_initialized
    x, other = batch(10, 9)[0], build()
    for state in (by_halves, by_all):
        other.load_state_dict(state)
        for name in ("faim_moments.0.mean", "faim_moments.0.offset", "head.center", "head.whiten"):
            torch.testing.assert_close(state[name], alone.state_dict()[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other(x), alone(x), rtol=1e-3, atol=1e-3)


def test_two_processes_fit_what_one_fits():
    in_group(fits_agree)


def sharded_gradients_are_those_of_one_process():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded = (fit_(build(), [batch(10)]) for _ in range(2))
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    images, target = batch(8, 2)
    TargetMargin(torch.nn.CrossEntropyLoss(), whole.train())(whole(images), target).backward()
    rank = torch.distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    TargetMargin(torch.nn.CrossEntropyLoss(), sharded.train())(sharded(images[mine]), target[mine]).backward()
    for (name, a), b in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if a.grad is None:
            assert not a.requires_grad and b.grad is None, name
            continue
        difference = (b.grad.full_tensor() - a.grad).abs().max()
        assert difference <= 1e-3 * a.grad.abs().max(), name


@needs_fsdp_on_cpu
def test_gradients_of_a_sharded_model():
    in_group(sharded_gradients_are_those_of_one_process)
