"""--l2-sp pulls the backbone towards its start, --wise-ft averages start and end; both go on after a kill."""

import pytest
import torch
import yaml
from fitted import save_backbone
from runs import TINY, make_images, read_summary, train, train_tiny
from safetensors.torch import load_file
from test_train_faults import same_run

from timm_faim.run.errors import UserError
from timm_faim.training import ending, epochs
from timm_faim.training.args import parse_args
from timm_faim.training.start import FILE, averaged

PLAIN = ["--lr", "0.03", "--weight-decay", "0.05"]
REST = {"top5": 0.0, "samples": 7}
BACKBONE, HEAD = "conv1.0.weight", "fc.mu"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("weights") / "backbone.safetensors")


@pytest.fixture(scope="module")
def run_of(images, weights, tmp_path_factory):
    """Runs from the same weights with further options; each its folder."""

    def build(*argv, output=None, model="faim_test_resnet"):
        output = output or tmp_path_factory.mktemp("out")
        return train_tiny(images, output, "--pretrained-path", weights, *PLAIN, *argv, model=model)

    return build


def last(run):
    return load_file(run / "last.safetensors")


def test_a_pull_of_the_whole_way_leaves_the_backbone_where_it_was(run_of):
    run = run_of("--l2-sp", "1", "--sched", "none")
    start, end = load_file(run / FILE), last(run)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert HEAD in changed
    running = ("running_mean", "running_var")  # are no parameters
    assert all(name.startswith("fc.") or name.endswith(running) for name in changed)


@pytest.mark.parametrize("model", ["faim_test_resnet", "test_resnet"])
def test_the_stronger_the_pull_the_nearer_the_start(run_of, model):
    def distance(run):
        return (last(run)[BACKBONE] - load_file(run / FILE)[BACKBONE]).norm()

    weak, strong = (distance(run_of("--l2-sp", share, model=model)) for share in ("0.01", "0.5"))
    assert 0 < strong < 0.7 * weak


@pytest.mark.parametrize("ema", [[], ["--model-ema", "--model-ema-decay", "0.5"]], ids=["last", "ema"])
def test_the_average_lies_between_start_and_end(run_of, ema, capsys):
    end = last(run_of("--head-init", "data", *ema))
    run = run_of("--head-init", "data", "--wise-ft", "0.25", *ema)
    start, got = load_file(run / FILE), last(run)
    for name, tensor in got.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * end[name])
    assert not torch.equal(start[BACKBONE], end[BACKBONE])
    assert "weights averaged, 0.25 of the end and 0.75 of the start; before: top1" in capsys.readouterr().out


def test_a_head_that_began_at_random_stays_as_trained(run_of):
    end, run = last(run_of()), run_of("--wise-ft", "0.5")
    assert torch.equal(last(run)[HEAD], end[HEAD])
    assert not torch.equal(last(run)[BACKBONE], end[BACKBONE])


def test_auto_keeps_the_best_share_and_the_first_of_equals(run_of, monkeypatch, capsys):
    values = iter([1.0, 2.0, 40.0, 60.0, 60.0, 50.0])  # two epochs, then 1, 0.75, 0.5 and 0.25
    monkeypatch.setattr(ending, "evaluate", lambda *_, **__: {"loss": 1.0, "top1": next(values)} | REST)
    run = run_of("--wise-ft", "auto", "--head-refit", "1")
    assert "kept: 0.75 of the end, top1 60.00" in capsys.readouterr().out
    assert float(read_summary(run)[-1]["eval_top1"]) == 60.0
    monkeypatch.undo()
    same = run_of("--wise-ft", "0.75", "--head-refit", "1")
    assert all(torch.equal(a, last(same)[name]) for name, a in last(run).items())


@pytest.mark.parametrize("moment", ["first epoch", "second epoch", "last row"])
def test_killed_and_resumed_it_is_the_uninterrupted_run(run_of, weights, tmp_path, monkeypatch, moment):
    options = ["--head-init", "data", "--l2-sp", "0.1", "--wise-ft", "auto", "--head-refit", "1"]
    whole = run_of(*options)
    trained, kept = epochs.train_one_epoch, epochs.append_summary

    def killed(run, *args):
        if run.progress.epoch == (moment == "second epoch"):
            raise MemoryError
        return trained(run, *args)

    def killed_at_the_end(path, epoch, *args):
        if epoch == 2:
            raise MemoryError
        return kept(path, epoch, *args)

    with monkeypatch.context() as patch, pytest.raises((MemoryError, UserError)):
        if moment == "last row":
            patch.setattr(epochs, "append_summary", killed_at_the_end)
        else:
            patch.setattr(epochs, "train_one_epoch", killed)
        run_of(*options, output=tmp_path)
    start = load_file(tmp_path / "run" / FILE)
    same_run(run_of(*options, "--resume", "auto", output=tmp_path), whole)
    assert all(torch.equal(start[name], tensor) for name, tensor in load_file(whole / FILE).items())


def test_frozen_norms_keep_statistics_and_weights_while_the_rest_learns(run_of):
    run = run_of("--freeze-norms", "--wise-ft", "0.5")
    start, got = load_file(run / FILE), last(run)
    norms = {name.removesuffix("running_mean") for name in start if name.endswith("running_mean")}
    of_norms = {name for name in start if name.rpartition(".")[0] + "." in norms}
    changed = {name for name in start if not torch.equal(start[name], got[name])}
    assert len(of_norms) == 4 * len(norms) > 0 and not changed & of_norms
    assert {name for name in start if name.endswith("weight")} - of_norms <= changed


def test_a_damaged_start_is_told(run_of, tmp_path):
    run_of("--wise-ft", "0.5", "--stop-epoch", "1", output=tmp_path)
    (tmp_path / "run" / FILE).write_bytes(b"no weights")
    with pytest.raises(UserError, match="start.safetensors does not hold the start of this run"):
        run_of("--wise-ft", "0.5", "--resume", "auto", output=tmp_path)


def test_a_run_from_before_these_options_is_found_again(images, tmp_path):
    words = ["--data-dir", images, "--output", tmp_path, "--model", "faim_test_resnet", *TINY]
    train(*words, "--stop-epoch", "1")
    (run,) = tmp_path.iterdir()
    recipe = yaml.safe_load((run / "args.yaml").read_text())
    older = {key: value for key, value in recipe.items() if key not in ("l2_sp", "freeze_norms")}
    (run / "args.yaml").write_text(yaml.safe_dump(older))
    train(*words, "--resume", "auto")
    assert len(older) == len(recipe) - 2 and list(tmp_path.iterdir()) == [run]
    assert [row["epoch"] for row in read_summary(run)] == ["1", "2"]


def test_nothing_is_kept_where_nothing_is_asked_for(run_of):
    assert not (run_of("--wise-ft", "1", "--l2-sp", "0") / FILE).exists()


def test_the_end_is_exact():
    start, end = {"w": torch.randn(99)}, {"w": 1e6 * torch.randn(99)}
    assert torch.equal(averaged(start, end, 1.0, set())["w"], end["w"])
    assert torch.equal(averaged(start, end, 0.5, {"w"})["w"], end["w"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--wise-ft 0", "--wise-ft must be auto or a number > 0 and <= 1, got 0"),
        ("--wise-ft nan", "--wise-ft must be auto or a number > 0 and <= 1, got nan"),
        ("--wise-ft best", "--wise-ft must be auto or a number > 0 and <= 1, got best"),
        ("--l2-sp 1.5", "--l2-sp must be a number in 0..1, got 1.5"),
        ("--l2-sp 0.1 --no-pretrained", "--l2-sp keeps weights near their start, and those of --model .* are random"),
        ("--freeze-norms --no-pretrained", "--freeze-norms keeps weights near their start"),
        ("--wise-ft 0.5 --no-pretrained", "--wise-ft keeps weights near their start"),
        ("--wise-ft 0.5 --head-only", "--wise-ft is for a backbone that trains"),
        ("--l2-sp 0.1 --fsdp", "--l2-sp does not work under --fsdp"),
        ("--wise-ft auto --val-split=", "--wise-ft auto chooses on the validation images"),
    ],
)
def test_what_does_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        parse_args(f"--data-dir d --model faim_resnet18 --pretrained {words}".split())
