"""The evaluation image by image: counts, calibration, tables, any number of processes."""

import csv
import json
import math
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from children import in_group
from runs import make_images
from timm.data import create_dataset, create_loader

from timm_faim.images.checked import UNREADABLE
from timm_faim.report import plots
from timm_faim.report.evaluation import Confusion, Evaluation, collect
from timm_faim.report.predictions import evaluate, predictions
from timm_faim.report.tables import file_names, summary_lines, write_evaluation
from timm_faim.run.errors import UserError


class Batches(list):
    """What a loader is to an evaluation: batches, and the sampler that knows about padding."""

    sampler = None


def logits_model():
    """Takes images [B, 1, 1, C] that are their own logits."""
    return torch.nn.Flatten()


def batches_of(logits, target, size, valid=None):
    batches = Batches(zip(logits[:, None, None].split(size), target.split(size), strict=True))
    batches.sampler = SimpleNamespace(num_valid_samples=valid) if valid is not None else None
    return batches


def random_case(N=23, C=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(N, C, generator=generator), torch.randint(0, C, (N,), generator=generator)


def evaluation_of(logits, target, size=5, **options):
    return collect(logits_model(), batches_of(logits, target, size), Accelerator(cpu=True), **options)


def hand_made(target, prediction, confidence=None, C=4):
    target, prediction = np.array(target), np.array(prediction)
    N = len(target)
    return Evaluation(
        C,
        np.arange(N),
        target,
        prediction,
        np.full(N, 0.5) if confidence is None else confidence,
        np.ones(N),
        np.ones(N),
        target == prediction,
    )


def test_every_number_is_that_of_the_whole_matrix_of_logits():
    logits, target = random_case()
    evaluation = evaluation_of(logits, target)
    probability = logits.double().softmax(1)
    best = logits.sort(1, descending=True).values
    np.testing.assert_array_equal(evaluation.index, np.arange(23))
    np.testing.assert_array_equal(evaluation.target, target)
    np.testing.assert_array_equal(evaluation.prediction, logits.argmax(1))
    np.testing.assert_allclose(evaluation.confidence, probability.max(1).values, rtol=1e-5)
    np.testing.assert_allclose(evaluation.loss, -probability.log()[torch.arange(23), target], rtol=1e-5)
    np.testing.assert_allclose(evaluation.margin, best[:, 0] - best[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(
        evaluation.top5, [t in row for t, row in zip(target, logits.topk(5).indices, strict=True)]
    )


def test_metrics_are_those_of_the_loop():
    logits, target = random_case()
    batches = batches_of(logits, target, 5)
    expected = evaluate(logits_model(), batches, Accelerator(cpu=True))
    metrics = collect(logits_model(), batches, Accelerator(cpu=True)).metrics()
    for key in ("loss", "top1", "top5", "samples"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-6), key
    assert metrics["images_per_s"] > 0


def test_mean_over_classes_leaves_out_classes_without_images():
    metrics = hand_made([0, 0, 0, 1], [0, 0, 1, 1], C=3).metrics()
    assert metrics["mean_class_top1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert metrics["top1"] == 75


def test_padding_and_unreadable_images_are_left_out():
    logits, target = random_case(6)
    target[1] = UNREADABLE
    evaluation = collect(
        logits_model(), batches_of(logits, target, 3, valid=5), Accelerator(cpu=True), skip_unreadable=True
    )
    assert evaluation.index.tolist() == [0, 2, 3, 4]
    assert evaluation.target.tolist() == target[[0, 2, 3, 4]].tolist()


def test_mirror_images_are_averaged():
    images, target = torch.randn(5, 1, 2, 4), torch.randint(4, (5,))

    class Corner(torch.nn.Module):
        """Logits that a mirror turns round."""

        def forward(self, x):
            return x[:, 0, 0]

    batches = [(images[:3], target[:3]), (images[3:], target[3:])]
    found = [torch.cat([logits for logits, *_ in predictions(Corner(), batches, Accelerator(cpu=True), flips=flips)])
             for flips in (False, True)]  # fmt: skip
    assert torch.equal(found[0], images[:, 0, 0])
    torch.testing.assert_close(found[1], (images[:, 0, 0] + images[:, 0, 0].flip(1)) / 2)


@pytest.mark.parametrize("bad", [7, -1])
def test_a_label_outside_the_classes_is_an_error(bad):
    logits, target = random_case()
    target[20] = bad
    with pytest.raises(UserError, match=rf"labels from .*{bad}.*outside the 7 classes"):
        evaluation_of(logits, target)


def test_one_batch_has_no_warm_rate_and_one_class_no_margin():
    evaluation = evaluation_of(torch.randn(3, 1), torch.zeros(3, dtype=torch.long))
    assert evaluation.images_per_s is None
    assert evaluation.margin.tolist() == [0, 0, 0]
    assert evaluation.metrics()["top5"] == 100 and evaluation.most_confused() == []


def test_calibration_error_of_a_case_by_hand():
    """Bins of 1/15: 0.05 and 1/15 in the first, 0.9 three times in the fourteenth, 1.0 in the last."""
    confidence = np.array([0.05, 1 / 15, 0.9, 0.9, 0.9, 1.0])
    evaluation = hand_made([0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 0, 2], confidence)
    counts, mean, accuracy = evaluation.calibration()
    assert {i: int(n) for i, n in enumerate(counts) if n} == {0: 2, 13: 3, 14: 1}
    assert mean[0] == pytest.approx((0.05 + 1 / 15) / 2) and accuracy[13] == pytest.approx(2 / 3)
    first, fourteenth, last = abs(0.5 - (0.05 + 1 / 15) / 2), abs(2 / 3 - 0.9), 0.0
    assert evaluation.metrics()["ece"] == pytest.approx(100 * (2 * first + 3 * fourteenth + last) / 6)


def test_confusion_is_a_brute_force_count():
    logits, target = random_case(200, 6, seed=3)
    evaluation = evaluation_of(logits, target, 16)
    counted = Counter(zip(target.tolist(), logits.argmax(1).tolist(), strict=True))
    assert {(t, p): n for t, p, n in evaluation.pairs.tolist()} == counted
    matrix = evaluation.confusion()
    assert matrix.sum() == 200 and all(matrix[t, p] == counted[t, p] for t in range(6) for p in range(6))
    np.testing.assert_array_equal(evaluation.confusion([4, 1]), matrix[np.ix_([4, 1], [4, 1])])
    most = evaluation.most_confused(3)
    totals = sorted((counted[a, b] + counted[b, a] for a in range(6) for b in range(a)), reverse=True)
    assert [c.a_as_b + c.b_as_a for c in most] == totals[:3]
    assert all(c.a < c.b and c == Confusion(c.a, c.b, counted[c.a, c.b], counted[c.b, c.a]) for c in most)


def read(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_tables_hold_what_was_counted(tmp_path):
    target, prediction = [0, 0, 0, 0, 1, 1, 2], [0, 2, 2, 1, 0, 1, 2]
    evaluation = hand_made(target, prediction)
    names = ["ape, great", "bee", "cat", "dog"]
    files = [f"x/{i}.png" for i in range(6)] + ["x/\udcff.png"]
    written = write_evaluation(tmp_path / "eval", evaluation, names, files, {"model": "m", "checkpoint": "c"})
    assert (
        {p.name for p in written}
        == {p.name for p in (tmp_path / "eval").iterdir()}
        == {
            "eval.json",
            "per_class.csv",
            "confusion.csv",
            "most_confused.csv",
            "predictions.csv",
            "confusion.png",
            "calibration.png",
        }
    )

    facts = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert facts["model"] == "m" and facts["checkpoint"] == "c" and facts["metrics"]["samples"] == 7
    assert facts["metrics"]["top1"] == pytest.approx(300 / 7) and "torch" in facts["versions"]

    per_class = read(tmp_path / "eval" / "per_class.csv")
    assert [
        (r["name"], r["samples"], r["correct"], r["accuracy"], r["confused_with_name"], r["confused_count"])
        for r in per_class
    ] == [
        ("ape, great", "4", "1", "25.0", "cat", "2"),
        ("bee", "2", "1", "50.0", "ape, great", "1"),
        ("cat", "1", "1", "100.0", "", "0"),
        ("dog", "0", "0", "", "", "0"),
    ]
    confusion = read(tmp_path / "eval" / "confusion.csv")
    assert {(int(r["target"]), int(r["prediction"])): int(r["count"]) for r in confusion} == Counter(
        zip(target, prediction, strict=True)
    )
    pairs = read(tmp_path / "eval" / "most_confused.csv")
    assert [
        (r["a_name"], r["b_name"], r["a_as_b"], r["b_as_a"], r["total"], r["a_as_b_rate"], r["b_as_a_rate"])
        for r in pairs
    ] == [("ape, great", "bee", "1", "1", "2", "25.0", "50.0"), ("ape, great", "cat", "2", "0", "2", "50.0", "0.0")]
    lines = (tmp_path / "eval" / "predictions.csv").read_bytes().splitlines()
    assert lines[1] == b"0,x/0.png,0,0,0.5,1,1" and lines[7].startswith(b"6,x/\xff.png,2,2,")


def test_numbers_that_json_lacks_are_null_and_files_need_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    evaluation = hand_made([0, 1], [0, 1])
    evaluation.loss[0] = math.nan
    written = write_evaluation(tmp_path, evaluation)
    assert not [p for p in written if p.suffix == ".png"] and not list(tmp_path.glob("*.png"))
    facts = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert facts["metrics"]["loss"] is None
    assert "file" not in read(tmp_path / "predictions.csv")[0]


def test_lines_for_the_terminal_name_the_worst():
    lines = summary_lines(hand_made([0, 0, 1, 1, 2, 2], [0, 0, 2, 2, 2, 1]), ["ape", "bee", "cat"])
    assert lines[0].startswith("top-1 50.00 %") and "6 images of 3 classes" in lines[0]
    assert "weakest classes: bee (0 of 2 right), cat (1 of 2 right)" in lines
    assert "most confused: bee and cat (2 and 1 times)" in lines


def test_nothing_to_count_divides_by_nothing(tmp_path):
    evaluation = Evaluation(3, *(np.empty(0, dtype=kind) for kind in (int, int, int, float, float, float, bool)))
    assert evaluation.metrics()["top1"] == 0 and len(summary_lines(evaluation)) == 1
    assert {p.suffix for p in write_evaluation(tmp_path, evaluation)} == {".json", ".csv"}


def test_file_names_are_those_of_the_data_set(tmp_path):
    dataset = create_dataset("", root=str(make_images(tmp_path)), split="val")
    assert file_names(dataset)[:2] == ["bird/0.png", "bird/1.png"] and len(file_names(dataset)) == 7
    assert file_names(torch.utils.data.TensorDataset(torch.zeros(1))) is None


def test_more_classes_than_a_matrix_can_show(tmp_path):
    target = np.arange(2500)
    prediction = target.copy()
    prediction[[2000, 2400]] = 7
    evaluation = hand_made(target, prediction, C=2500)
    assert plots.shown_classes(evaluation) == [7, 2000, 2400]
    assert plots.draw_confusion(tmp_path / "c.png", evaluation) and (tmp_path / "c.png").exists()


def _evaluate_in_group(root: str, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    (folder / f"rank{accelerator.process_index}.pickle").write_bytes(pickle.dumps(_on_images(root, accelerator)))


def _on_images(root: str, accelerator: Accelerator) -> Evaluation:
    """An evaluation of the 7 validation images, the fourth one as if it were unreadable."""
    dataset = create_dataset("", root=root, split="val")
    samples = dataset.reader.samples
    samples[3] = (samples[3][0], UNREADABLE)
    loader = create_loader(
        dataset,
        (3, 8, 8),
        batch_size=2,
        num_workers=0,
        device=accelerator.device,
        distributed=accelerator.num_processes > 1,
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    return collect(accelerator.prepare(model), loader, accelerator, skip_unreadable=True)


def test_two_processes_count_what_one_counts(tmp_path):
    root = str(make_images(tmp_path))
    in_group(_evaluate_in_group, root, tmp_path)
    found = [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]
    alone = _on_images(root, Accelerator(cpu=True))
    assert alone.index.tolist() == [0, 1, 2, 4, 5, 6]
    for rank in range(2):
        for field in ("num_classes", "index", "target", "prediction", "top5"):
            np.testing.assert_array_equal(getattr(found[rank], field), getattr(alone, field), field)
        for field in ("confidence", "loss", "margin"):
            np.testing.assert_allclose(getattr(found[rank], field), getattr(alone, field), rtol=1e-5, err_msg=field)
