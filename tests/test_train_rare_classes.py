"""Losses and batches for classes of unequal size: --logit-adjust, --ldam, --samples-per-class 1."""

from collections import Counter

import pytest
import torch
from cases import SIGMAS
from runs import make_images, options_of, read_summary, train_tiny
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, one_hot

from timm_faim import FAIMHead, TargetMargin
from timm_faim.images.datasets import TrainingData
from timm_faim.run.errors import UserError
from timm_faim.training.class_sampling import ClassSampler
from timm_faim.training.loss import build_criterion
from timm_faim.training.rare_classes import RareClassLoss, class_counts

LOGITS = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0], [0.0, 0.0, 1.0]])
TARGET = torch.tensor([0, 2, 1])
COUNTS = torch.tensor([16, 4, 1])
MARGINS = torch.tensor([0.5, 0.5 * 2**0.5, 1.0])  # (1 / n)^(1/4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """12 birds, 3 cats, 1 dog to train on."""
    root = make_images(tmp_path_factory.mktemp("images"), train=12)
    for kept, name in ((3, "cat"), (1, "dog")):
        for i in range(kept, 12):
            (root / "train" / name / f"{i}.png").unlink()
    return root


def criterion(model, *argv):
    return build_criterion(options_of("--smoothing", "0", *argv), model, COUNTS)


def test_logit_adjustment_by_hand():
    """-log of n_y^τ e^y / Σ n_k^τ e^k: with τ = 1 balanced softmax."""
    for tau in (1.0, 0.5):
        weighed = COUNTS.float() ** tau * LOGITS.exp()
        expected = -(weighed[range(3), TARGET] / weighed.sum(1)).log().mean()
        torch.testing.assert_close(criterion(torch.nn.Linear(2, 3), "--logit-adjust", tau)(LOGITS, TARGET), expected)


def test_ldam_is_in_logits_of_a_plain_model():
    moved = LOGITS - 3.0 * MARGINS[TARGET][:, None] * one_hot(TARGET, 3)
    torch.testing.assert_close(
        criterion(torch.nn.Linear(2, 3), "--ldam", "3")(LOGITS, TARGET), cross_entropy(moved, TARGET)
    )


@pytest.mark.parametrize("full", SIGMAS)
def test_ldam_is_in_distances_of_a_faim_head_in_the_place_of_its_own_margin(full):
    head = FAIMHead(2, 3, scale_init=5.0, margin=0.7, full_sigma=full).train()
    loss = criterion(head, "--ldam", "0.3", "--logit-adjust", "1")
    moved = LOGITS - 5.0 * 0.3 * MARGINS[TARGET][:, None] * one_hot(TARGET, 3) + COUNTS.log()
    torch.testing.assert_close(loss(LOGITS, TARGET).detach(), cross_entropy(moved, TARGET))
    head.eval()
    torch.testing.assert_close(loss(LOGITS, TARGET), cross_entropy(LOGITS + COUNTS.log(), TARGET))


def test_outputs_of_several_heads_and_ignored_targets():
    loss = RareClassLoss(lambda output, target: output, COUNTS, 1.0, 2.0)
    one, other = loss((LOGITS, 2 * LOGITS), TARGET)
    torch.testing.assert_close(one - LOGITS, other - 2 * LOGITS)
    ignored = loss(LOGITS, torch.tensor([0, -100, 1]))
    torch.testing.assert_close(ignored[1] - LOGITS[1], (COUNTS / 21).log())
    margins = TargetMargin(lambda output, target: output, FAIMHead(2, 3, margin=0.0).train(), MARGINS)
    assert torch.equal(margins(LOGITS, torch.tensor([0, -100, 1]))[1], LOGITS[1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--logit-adjust 1 --multi-label --dataset hfds/x", "--logit-adjust does not go with --multi-label"),
        ("--ldam 1 --mixup 0.2", "--ldam does not go with --mixup and --cutmix"),
        ("--logit-adjust 1 --cutmix 0.2", "--logit-adjust does not go with --mixup and --cutmix"),
        ("--logit-adjust 1 --loss bce", "--logit-adjust does not go with the bce loss"),
        ("--logit-adjust -1", "--logit-adjust must be a number in 0..10, got -1"),
        ("--ldam nan", "--ldam must be a number in 0..100, got nan"),
    ],
)
def test_what_does_not_go_together(argv, message):
    with pytest.raises(UserError, match=message):
        options_of(*argv.split())


def test_data_that_do_not_tell_their_classes():
    data = TrainingData(torch.utils.data.TensorDataset(torch.zeros(3)), None, 3, None, None)
    with pytest.raises(UserError, match="--ldam needs to know how many images each class has"):
        class_counts(options_of("--ldam", "1").rare_classes, data)
    assert class_counts(options_of().rare_classes, data) is None


@pytest.mark.parametrize("model", ["faim_test_resnet", "test_resnet"])
def test_a_run_takes_counts_from_its_data_and_resumes(images, tmp_path, model):
    argv = ("--logit-adjust", "1", "--ldam", "0.2", "--checkpoint-hist", "2")
    run = train_tiny(images, tmp_path, *argv, model=model)
    plain = train_tiny(images, tmp_path / "plain", model=model)
    assert read_summary(run)[0]["train_loss"] != read_summary(plain)[0]["train_loss"]
    parts = train_tiny(images, tmp_path / "parts", *argv, "--stop-epoch", "1", model=model)
    train_tiny(images, tmp_path / "parts", "--resume", parts, model=model)
    whole, resumed = (load_file(folder / "last.safetensors") for folder in (run, parts))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_one_sample_a_class_draws_classes_equally_often_whatever_their_number():
    targets = [0] * 60 + [1] * 9 + [2] * 3
    for processes in (1, 2):
        drawn = Counter()
        for rank in range(processes):
            drawn.update(targets[i] for i in ClassSampler(targets, 8, 1, processes, rank, seed=0))
        assert sum(drawn.values()) == 72 // processes // 8 * 8 * processes
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_crt_is_one_command(images, tmp_path):
    first = train_tiny(images, tmp_path / "first")
    second = train_tiny(
        images,
        tmp_path / "second",
        "--pretrained",
        "--head-only",
        "--samples-per-class",
        "1",
        model=f"local-dir:{first}",
    )
    before, after = load_file(first / "model_best.safetensors"), load_file(second / "last.safetensors")
    changed = {key.rsplit(".", 1)[-1] for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"mu", "scale"} and "mu" in changed
