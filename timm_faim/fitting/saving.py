"""The run folder of a fit: that of a training, and the points of the training images.

Shapes: N training images, D features.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from timm_faim.calibration import Calibration
from timm_faim.classifier.neighbours import Gallery
from timm_faim.images.datasets import TrainingData
from timm_faim.report.evaluation import Evaluation
from timm_faim.report.page import write_report
from timm_faim.report.tables import file_names, summary_lines, write_evaluation
from timm_faim.run.finished import CALIBRATION, REPORT, record_done
from timm_faim.run.summary import append_summary, head_metrics, read_summary, save_recipe
from timm_faim.run.weights import CONFIG, save_config, save_weights
from timm_faim.training.options import Options, as_recipe

_KEPT = 2**30  # bytes of training points that a run keeps


@dataclass(frozen=True)
class Fitted:
    """A model with its head fitted and calibrated, the training images of each class, their points [N, D] and places
    [N] in the data set, what was measured on images that the head is not fitted to (None where there were none), and
    how it was made, as config.json keeps it."""

    model: nn.Module
    images: list[int]
    points: Tensor
    places: np.ndarray
    calibration: Calibration | None
    evaluation: Evaluation | None
    recipe: dict[str, Any]


def save_run(
    args: argparse.Namespace,
    options: Options,
    fitted: Fitted,
    data: TrainingData,
    data_config: dict[str, Any],
    loaders: dict[str, Any],
    folder: Path,
    log: Callable,
) -> None:
    """Write the run folder; for the main process.

    Args:
        args: of `timm-faim fit`.
        options: the same as those of a training.
        fitted: what came out.
        data: the data.
        data_config: preprocessing.
        loaders: of the images, by split.
        folder: made already.
        log: print.
    """
    model, calibration, evaluation = fitted.model, fitted.calibration, fitted.evaluation
    save_recipe(as_recipe(options), folder / "args.yaml")
    record: dict[str, Any] = {"images": fitted.images, "fit": fitted.recipe}
    if calibration is not None:
        record["calibration"] = calibration.to_json()
    names, order = data.label_names, data.class_order
    save_config(model, folder / CONFIG, data_config, names, options.model.pretrained, order, record)
    save_weights(model.state_dict(), folder, is_best=True)
    metrics = evaluation.metrics() if evaluation is not None else {}
    shown = {key: metrics[key] for key in ("loss", "top1", "top5", "samples") if key in metrics}
    append_summary(folder / "summary.csv", 0, head_metrics(model), shown)
    if not args.no_neighbours and 2 * fitted.points.numel() <= _KEPT:
        files = file_names(data.train)
        Gallery(fitted.points, [files[i] if files else str(i) for i in fitted.places]).save(folder)
    images = loaders.get("val", loaders["train"])  # those of the evaluation
    if evaluation is not None and calibration is not None:
        info = {"model": options.model.model, "images": calibration.source}
        write_evaluation(folder / "eval", evaluation, names, file_names(images.dataset), info)
        for line in summary_lines(evaluation, names):
            log(line)
    if not args.no_report:
        page = write_report(
            folder,
            model,
            read_summary(folder / "summary.csv"),
            label_names=names,
            evaluation=evaluation,
            train_images=loaders["train"],
            val_images=images,
            options=folder / "args.yaml",
        )
        log(f"report: {page}" if page else "no report.html: pip install 'timm-faim[train]'")
    record_done(folder, 0, CALIBRATION, REPORT)
