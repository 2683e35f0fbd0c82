"""One epoch: late reading, accumulation, stopping at a bad loss; evaluation counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from runs import options_of
from safetensors.torch import load_file
from timm.task import ClassificationTask

from timm_faim.images.checked import UNREADABLE
from timm_faim.report.predictions import evaluate
from timm_faim.run.errors import RankError
from timm_faim.training.loop import LateReader, Training, train_one_epoch


class Batches(list):
    """A list of batches with the attributes of a loader and of an order."""

    sampler = None

    def batches(self, epoch, start):
        return iter(self[start:])


def random_batches(count, size=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        (torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    )


def linear_model():
    torch.manual_seed(1)
    return torch.nn.Linear(4, 3)


def training(model, batches, folder, criterion=None, argv=()):
    accelerator = Accelerator(cpu=True)
    options = options_of("--seed", "0", "--log-interval", "1", *argv)
    task = ClassificationTask(model, criterion=criterion or torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    task.trainable_module, optimizer = accelerator.prepare(model, optimizer)
    return Training(options, accelerator, model, model, task, optimizer, batches, folder)


def run_epoch(model, batches, folder, criterion=None, argv=()):
    return train_one_epoch(training(model, batches, folder, criterion, argv))


def test_late_reader_reads_each_step_one_step_late():
    read = []
    reader = LateReader(lambda numbers, name: read.append((*numbers, name)))
    for i, name in enumerate("abc"):
        reader.push(torch.tensor([float(i), 2.0 * i]), name)
        assert len(read) == i
    reader.flush()
    reader.flush()
    assert read == [(0, 0, "a"), (1, 2, "b"), (2, 4, "c")]


@pytest.mark.gpu
def test_late_reader_on_gpu():
    read = []
    reader = LateReader(read.append)
    for i in range(20):
        reader.push(torch.full((2,), float(i), device="cuda"))
    reader.flush()
    assert read == [[i, i] for i in range(20)]


@pytest.mark.parametrize("accum", [1, 2, 3])
def test_accumulated_updates_are_those_of_the_larger_batches(tmp_path, accum):
    """5 batches: windows of 2, 2 and 1, or of 3 and 2. The last, shorter window makes an update as well."""
    batches = random_batches(5)
    model = linear_model()
    run_epoch(model, batches, tmp_path, argv=["--grad-accum-steps", accum])

    expected = linear_model()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for start in range(0, 5, accum):
        images, target = (torch.cat(parts) for parts in zip(*batches[start : start + accum], strict=True))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(expected(images), target).backward()
        optimizer.step()
    torch.testing.assert_close(model.weight, expected.weight)


def test_clipping_bounds_the_update(tmp_path):
    model, start = linear_model(), linear_model()
    run_epoch(model, random_batches(1), tmp_path, argv=["--clip-grad", 1e-3])
    step = torch.cat([(a - b).detach().flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])
    assert step.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_training_metrics_are_sample_means(tmp_path):
    batches = random_batches(4, size=3)
    model = linear_model()
    run = training(model, batches, tmp_path)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    metrics = train_one_epoch(run)
    images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(images), target).item(), rel=1e-6)
    assert metrics["top1"] == pytest.approx(100 * (model(images).argmax(1) == target).float().mean().item())
    assert (run.progress.step, run.progress.updates, run.progress.samples) == (4, 4, 12)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_an_epoch_goes_on_where_the_progress_stands(tmp_path, step):
    batches = random_batches(5)
    whole = training(linear_model(), batches, tmp_path)
    expected = train_one_epoch(whole)
    first = training(linear_model(), Batches(batches[:step]), tmp_path)
    train_one_epoch(first)
    second = training(first.model, batches, tmp_path)
    second.progress = first.progress
    again = train_one_epoch(second)
    assert torch.equal(first.model.weight, whole.model.weight)
    assert (again["loss"], again["top1"]) == (expected["loss"], expected["top1"])


def test_a_request_to_stop_is_met_at_an_update_with_a_checkpoint(tmp_path):
    run = training(linear_model(), random_batches(7), tmp_path, argv=["--grad-accum-steps", 2])
    saved = []
    run.checkpointer = SimpleNamespace(save=lambda progress: saved.append((progress.step, progress.samples)))
    run.stop.requested = True
    assert train_one_epoch(run) is None and run.is_stopping
    assert saved == [(2, 4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 2, 4], ids=["first", "middle", "last"])
def test_bad_loss_stops_and_saves_its_batch(tmp_path, bad, bad_step):
    batches = random_batches(5)
    calls = []

    def criterion(output, target):
        calls.append(target)
        loss = torch.nn.functional.cross_entropy(output, target)
        return loss * bad if len(calls) == bad_step + 1 else loss

    with pytest.raises(RankError, match=rf"loss is {bad} in epoch 1, step {bad_step + 1}\..*nan_batch\.safetensors"):
        run_epoch(linear_model(), batches, tmp_path, criterion)
    assert len(calls) <= bad_step + 2  # at most one step later
    saved = load_file(tmp_path / "nan_batch.safetensors")
    assert torch.equal(saved["input"], batches[bad_step][0]) and torch.equal(saved["target"], batches[bad_step][1])


def test_evaluation_leaves_padding_out():
    """5 images as two batches of 3, the sixth one a repetition made by the distributed sampler."""
    batches = random_batches(2, size=3)
    batches.sampler = SimpleNamespace(num_valid_samples=5)
    model = linear_model()
    images, target = (torch.cat(parts)[:5] for parts in zip(*batches, strict=True))
    metrics = evaluate(model, batches, Accelerator(cpu=True))
    assert metrics["samples"] == 5
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(images), target).item(), rel=1e-6)
    assert metrics["top1"] == pytest.approx(100 * (model(images).argmax(1) == target).float().mean().item())


def test_evaluation_leaves_padding_and_unreadable_images_out():
    batches = random_batches(2, size=3)
    batches.sampler = SimpleNamespace(num_valid_samples=5)
    batches[0][1][1] = UNREADABLE
    model = linear_model()
    keep = [0, 2, 3, 4]
    images, target = (torch.cat(parts)[keep] for parts in zip(*batches, strict=True))
    metrics = evaluate(model, batches, Accelerator(cpu=True), skip_unreadable=True)
    assert metrics["samples"] == 4
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(model(images), target).item(), rel=1e-6)


def test_a_label_outside_the_classes_is_named(tmp_path):
    """Data sets that list no classes are only seen batch by batch."""
    batches = random_batches(2)
    batches[1][1][0] = 7
    model = linear_model()
    model.num_classes = 3
    with pytest.raises(RankError, match="to 7, outside the 3 classes.*--num-classes 8"):
        run_epoch(model, batches, tmp_path)
