"""The tables of an evaluation, for a person or a table program, and the few lines of it for the terminal.

Accuracies and rates are in per cent.
"""

import json
import math
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from timm.data import ImageDataset

import timm_faim
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.names import class_name
from timm_faim.report.plots import draw_calibration, draw_confusion
from timm_faim.run.csv_file import write_csv
from timm_faim.run.files import atomic_write


def file_names(dataset: Any) -> list[str] | None:
    """Names of the images of a timm dataset by index, relative to its folder; None where it has none."""
    images = getattr(dataset, "images", dataset)
    if not isinstance(images, ImageDataset):
        return None
    try:
        return [str(name) for name in images.filenames()]
    except (AssertionError, NotImplementedError):  # readers without files
        return None


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    label_names: Sequence[str] | None = None,
    filenames: Sequence[str] | None = None,
    info: dict[str, Any] | None = None,
) -> list[Path]:
    """Write what a person or a table program wants to know; for the main process.

    Args:
        folder: made where missing.
        evaluation: of `collect`.
        label_names: class names in the order of their indices.
        filenames: image names by data-set index, see `file_names`.
        info: further facts for eval.json, such as the model's name and its checkpoint.

    Returns:
        The files: eval.json, per_class.csv, confusion.csv (pairs that occur), most_confused.csv, predictions.csv,
        and with matplotlib confusion.png and calibration.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {key: _json_number(value) for key, value in evaluation.metrics().items()}
    facts = {**(info or {}), "metrics": metrics, "num_classes": evaluation.num_classes, "versions": versions()}
    with atomic_write(folder / "eval.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")

    tables = {
        "per_class.csv": _class_rows(evaluation, label_names),
        "confusion.csv": _confusion_rows(evaluation, label_names),
        "most_confused.csv": _pair_rows(evaluation, label_names),
        "predictions.csv": _prediction_rows(evaluation, filenames),
    }
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    written = [folder / "eval.json", *(folder / name for name in tables)]
    for name, draw in (("confusion.png", draw_confusion), ("calibration.png", draw_calibration)):
        if draw(folder / name, evaluation, label_names):
            written.append(folder / name)
    return written


def summary_lines(evaluation: Evaluation, label_names: Sequence[str] | None = None, count: int = 3) -> list[str]:
    """A few lines for the terminal: accuracy, calibration, the weakest classes, the most confused pairs."""
    metrics = evaluation.metrics()
    rate = f"; {metrics['images_per_s']:.0f} images/s" if metrics["images_per_s"] else ""
    lines = [
        f"top-1 {metrics['top1']:.2f} %, top-5 {metrics['top5']:.2f} %, mean over classes "
        f"{metrics['mean_class_top1']:.2f} %, loss {metrics['loss']:.4f} on {metrics['samples']} images of "
        f"{int((evaluation.samples_per_class > 0).sum())} classes{rate}"
    ]
    if not metrics["samples"]:
        return lines
    confidence = 100 * float(evaluation.confidence.mean())
    lines.append(f"mean confidence {confidence:.1f} %, expected calibration error {metrics['ece']:.1f} %")
    weakest = [
        k
        for k in evaluation.weakest_classes(count)
        if evaluation.correct_per_class[k] < evaluation.samples_per_class[k]
    ]
    if weakest:
        lines.append(
            "weakest classes: "
            + ", ".join(
                f"{class_name(label_names, k)} ({evaluation.correct_per_class[k]} of {evaluation.samples_per_class[k]} "
                "right)"
                for k in weakest
            )
        )
    confused = evaluation.most_confused(count)
    if confused:
        lines.append(
            "most confused: "
            + ", ".join(
                f"{class_name(label_names, c.a)} and {class_name(label_names, c.b)} ({c.a_as_b} and {c.b_as_a} times)"
                for c in confused
            )
        )
    return lines


def _class_rows(evaluation: Evaluation, label_names: Sequence[str] | None) -> Iterable[list]:
    taken_for: dict[int, tuple[int, int]] = {}
    for target, prediction, count in evaluation.pairs.tolist():
        if target != prediction and count > taken_for.get(target, (0, 0))[0]:
            taken_for[target] = (count, prediction)
    yield ["class", "name", "samples", "correct", "accuracy", "confused_with", "confused_with_name", "confused_count"]
    for k, (samples, correct) in enumerate(
        zip(evaluation.samples_per_class.tolist(), evaluation.correct_per_class.tolist(), strict=True)
    ):
        count, other = taken_for.get(k, (0, None))
        yield [
            k,
            class_name(label_names, k),
            samples,
            correct,
            round(100 * correct / samples, 3) if samples else "",
            *(("", "", 0) if other is None else (other, class_name(label_names, other), count)),
        ]


def _confusion_rows(evaluation: Evaluation, label_names: Sequence[str] | None) -> Iterable[list]:
    yield ["target", "prediction", "count", "target_name", "prediction_name"]
    for target, prediction, count in evaluation.pairs.tolist():
        yield [target, prediction, count, class_name(label_names, target), class_name(label_names, prediction)]


def _pair_rows(evaluation: Evaluation, label_names: Sequence[str] | None) -> Iterable[list]:
    yield ["a", "b", "a_name", "b_name", "a_as_b", "b_as_a", "total", "a_as_b_rate", "b_as_a_rate"]
    samples = evaluation.samples_per_class.tolist()
    for c in evaluation.most_confused():
        rates = (round(100 * n / max(1, samples[k]), 3) for n, k in ((c.a_as_b, c.a), (c.b_as_a, c.b)))
        yield [
            c.a,
            c.b,
            class_name(label_names, c.a),
            class_name(label_names, c.b),
            c.a_as_b,
            c.b_as_a,
            c.a_as_b + c.b_as_a,
            *rates,
        ]


def _prediction_rows(evaluation: Evaluation, filenames: Sequence[str] | None) -> Iterable[list]:
    file = ["file"] if filenames is not None else []
    yield ["index", *file, "target", "prediction", "confidence", "loss", "margin"]
    columns = (
        evaluation.index,
        evaluation.target,
        evaluation.prediction,
        evaluation.confidence,
        evaluation.loss,
        evaluation.margin,
    )
    for index, target, prediction, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        name = [filenames[index]] if filenames is not None else []
        yield [index, *name, target, prediction, *(f"{number:.6g}" for number in numbers)]


def _json_number(value: Any) -> Any:
    """JSON has no NaN or infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on."""
    modules = {"timm_faim": timm_faim, "timm": timm, "torch": torch, "accelerate": accelerate}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}
