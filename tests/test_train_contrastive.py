"""Contrastive losses in training: batches of classes, views, the losses on record, several processes, resuming."""

import copy
from collections import Counter

import pytest
import timm
import torch
from children import in_group
from runs import make_images, read_summary, train_tiny
from safetensors.torch import load_file
from timm.data.loader import fast_collate
from torch import nn

from timm_faim import FAIMHead, TargetMargin
from timm_faim.run.errors import UserError
from timm_faim.training import class_sampling
from timm_faim.training.args import parse_args
from timm_faim.training.class_sampling import ClassSampler
from timm_faim.training.contrastive import ContrastiveOptions, ContrastiveTask, Views, parse_losses


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


TARGETS = [c for c in range(10) for _ in range(5 + c)]  # 95 images, classes of 5 to 14


def batches(rank=0, processes=1, epoch=0, K=3, P=3):
    sampler = ClassSampler(TARGETS, K * P, K, processes, rank, seed=1)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler) == -(-len(TARGETS) // processes) // (K * P) * K * P
    return [indices[i : i + K * P] for i in range(0, len(indices), K * P)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_batch_has_k_different_images_of_each_of_p_classes(processes):
    for step in zip(*(batches(rank, processes) for rank in range(processes)), strict=True):
        for batch in step:
            assert len(set(batch)) == 9
            assert list(Counter(TARGETS[i] for i in batch).values()) == [3, 3, 3]
        classes = [{TARGETS[i] for i in batch} for batch in step]
        assert len(set().union(*classes)) == 3 * processes, "the processes' classes differ"


def test_classes_and_their_images_come_equally_often():
    everything = [i for batch in batches(K=2, P=5) for i in batch]
    drawn = Counter(TARGETS[i] for i in everything)
    assert max(drawn.values()) - min(drawn.values()) <= 2, "a class comes once more at most"
    for c in range(10):
        times = Counter(i for i in everything if TARGETS[i] == c)
        of_class = [times[i] for i, target in enumerate(TARGETS) if target == c]
        assert max(of_class) - min(of_class) <= 1


def test_epochs_differ_and_repeat():
    assert batches(epoch=0) == batches(epoch=0) != batches(epoch=1)


def test_a_class_with_fewer_images_than_k_repeats_some():
    sampler = ClassSampler([0, 0, 1, 1, 1, 1, 1, 1], 8, 4, 1, 0, seed=0)
    assert sorted(Counter(sampler).values()) == [1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "batch_size, K, processes, message",
    [
        (10, 3, 1, "must divide"),
        (22, 2, 1, "takes 11 classes a step, and the data have 10"),
        (12, 2, 2, "takes 12 classes"),
        (100, 20, 1, "is larger than the training data"),
    ],
)
def test_batches_that_cannot_be_made(batch_size, K, processes, message):
    with pytest.raises(UserError, match=message):
        ClassSampler(TARGETS, batch_size, K, processes, 0, seed=0)


def test_views_are_collated_one_after_another():
    counter = iter(range(100))
    views = Views(lambda image: torch.full((1, 2, 2), next(counter) + 10 * image, dtype=torch.uint8), 2)
    pixels, target = fast_collate([(views(i), i) for i in (1, 2, 3)])
    assert target.tolist() == [1, 2, 3, 1, 2, 3]
    assert pixels[:, 0, 0, 0].tolist() == [10, 22, 34, 11, 23, 35]


def test_both_losses_are_on_record_and_add_up(images, tmp_path):
    run = train_tiny(images, tmp_path, "--contrastive", "infonce:0.1", "triplet", "--views", "2", "--smoothing", "0")
    for row in read_summary(run):
        parts = {key: float(row[f"train_{key}_loss"]) for key in ("class", "infonce", "triplet")}
        assert parts["class"] > 0 and parts["infonce"] > 0 and parts["triplet"] >= 0
        total = parts["class"] + 0.1 * parts["infonce"] + parts["triplet"]
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
    plain = train_tiny(images, tmp_path / "plain")
    state, other = (load_file(folder / "last.safetensors") for folder in (run, plain))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.items()}, "no parameter is added"
    assert any(not torch.equal(state[k], other[k]) for k in state if k.endswith(".mu"))


@pytest.mark.parametrize(
    "more", [("--samples-per-class", "2"), ("--views", "2", "--model-ema"), ("--views", "2", "--torchcompile", "eager")]
)
def test_a_resumed_run_is_the_uninterrupted_one(images, tmp_path, more):
    options = ("--contrastive", "npair:0.2", "supcon:0.2", *more)
    whole = train_tiny(images, tmp_path / "whole", *options)
    half = train_tiny(images, tmp_path / "half", *options, "--stop-epoch", "1")
    train_tiny(images, tmp_path / "half", *options, "--resume", half)
    state, other = (load_file(folder / "last.safetensors") for folder in (whole, half))
    assert all(torch.equal(state[name], other[name]) for name in state)
    for a, b in zip(read_summary(whole), read_summary(half), strict=True):
        assert [a[k] for k in a if k.endswith("_loss")] == [b[k] for k in b if k.endswith("_loss")]


def build_task(losses, world=1):
    torch.manual_seed(0)
    faim_cfg = dict(preset="flat", space="sphere", lambda_init=0.1)
    model = timm.create_model("faim_test_vit", img_size=32, num_classes=5, faim_cfg=faim_cfg).train()
    args = parse_args(["--data-dir", "d", "--model", "faim_test_vit", "--views", "2", "--contrastive", *losses])
    return model, ContrastiveTask(model, TargetMargin(nn.CrossEntropyLoss(), model), args.contrastive, verbose=False)


LOSSES = ["infonce:0.3", "supcon:0.2", "triplet:0.5", "npair:0.1"]


def gradients_are_those_of_one_process():
    assert torch.distributed.get_world_size() == 2
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 32, 32, generator=generator)
    target = torch.tensor([0, 1, 0, 1, 2, 3, 0, 1, 2, 2, 3, 3])  # pairs within and across the processes
    rank = torch.distributed.get_rank()
    shared, task = build_task(LOSSES)
    task.trainable_module = nn.parallel.DistributedDataParallel(shared)
    mine = slice(6 * rank, 6 * rank + 6)
    result = task(images[mine], target[mine])
    result["loss"].backward()
    mean = result["loss"].detach().clone()
    torch.distributed.all_reduce(mean)
    gradients = {name: p.grad.clone() for name, p in shared.named_parameters() if p.requires_grad}
    torch.distributed.destroy_process_group()

    model, task = build_task(LOSSES)
    result = task(images, target)
    result["loss"].backward()
    assert mean / 2 == pytest.approx(result["loss"].item(), rel=1e-5)
    for name, parameter in ((name, p) for name, p in model.named_parameters() if p.requires_grad):
        difference = (gradients[name] - parameter.grad).abs().max()
        assert difference <= 1e-4 * parameter.grad.abs().max() + 1e-8, name
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def test_two_processes_compute_the_loss_of_one():
    in_group(gradients_are_those_of_one_process)


class Convolutional(nn.Module):
    def __init__(self, places):
        super().__init__()
        self.places, self.head = places, FAIMHead(4, 3)

    def forward(self, x):
        logits = self.head(x)
        return logits.mean((2, 3)) if x.ndim == 4 else logits.mean(1)


def test_features_of_convolutional_heads_and_of_tokens():
    args = ContrastiveOptions(contrastive=["supcon"])
    model = Convolutional(2).train()
    x, target = torch.randn(6, 4, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    task = ContrastiveTask(model, nn.CrossEntropyLoss(), args, verbose=False)
    loss = task.contrastive["supcon"]
    assert task(x, target)["parts"]["supcon_loss"] == loss(x.mean((2, 3)), target)
    tokens = torch.randn(6, 5, 4)
    assert task(tokens, target)["parts"]["supcon_loss"] == loss(tokens.mean(1), target)
    model.forward = lambda x: x.mean((2, 3))
    with pytest.raises(UserError, match="which this model does not call"):
        task(x, target)


def test_a_frozen_head_still_gives_its_features(images, tmp_path):
    run = train_tiny(images, tmp_path, "--contrastive", "supcon", "--views", "2", "--freeze", "fc", "--model-ema")
    assert all(float(row["train_supcon_loss"]) > 0 for row in read_summary(run))


def test_the_average_of_the_weights_does_not_copy_the_task():
    model, task = build_task(["supcon"])
    average = copy.deepcopy(model)
    (tap,) = average.get_classifier()._forward_pre_hooks.values()
    assert tap.tap is task._tap
    average(torch.randn(2, 3, 32, 32))
    assert task._tap.take() == {}


def test_single_losses_of_an_epoch_that_began_with_others_are_left_out(images, tmp_path):
    options = ("--views", "2", "--epochs", "1", "--recovery-interval", "2")
    run = train_tiny(images, tmp_path, "--contrastive", "supcon:0.2", *options)
    (whole,) = read_summary(run)
    assert "train_supcon_loss" in whole
    (at,) = (path for path in (run / "checkpoints").iterdir() if path.name.startswith("checkpoint-0000-"))
    train_tiny(images, tmp_path, "--contrastive", "supcon:0.2", "npair", *options, "--resume", at)
    (row,) = read_summary(run)
    assert not {"train_supcon_loss", "train_npair_loss"} & set(row)


def test_classes_that_a_data_set_does_not_tell(images, tmp_path, monkeypatch):
    monkeypatch.setattr(class_sampling, "targets_of", lambda dataset: None)
    with pytest.raises(UserError, match="--samples-per-class needs to know the class of every image"):
        train_tiny(images, tmp_path, "--contrastive", "supcon", "--samples-per-class", "2")


def test_several_heads_are_refused(images, tmp_path):
    with pytest.raises(UserError, match="features of one FAIM head, and faim_deit_tiny_distilled_patch16_224 has 2"):
        train_tiny(
            images, tmp_path, "--contrastive", "supcon", "--views", "2", model="faim_deit_tiny_distilled_patch16_224"
        )


@pytest.mark.parametrize(
    "word, message",
    [
        ("inofnce:0.1", "Did you mean infonce"),
        ("infonce:x", "'x' is no number"),
        ("infonce:0", "above 0"),
        ("infonce:inf", "above 0"),
    ],
)
def test_words_that_name_no_loss(word, message):
    with pytest.raises(UserError, match=message):
        parse_losses([word])
    with pytest.raises(UserError, match="given twice"):
        parse_losses(["supcon:1", "supcon:2"])
