"""What is written once a run has ended, and by --eval-only: tables, pictures and the page."""

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.task import MultiLabelClassificationEvaluator
from torch.utils.data import IterableDataset

from timm_faim import faim_heads
from timm_faim.calibration import apply_temperature_, calibrate
from timm_faim.images.datasets import TrainingData
from timm_faim.images.folders import check_same_classes
from timm_faim.report.evaluation import Evaluation, KeptLogits, collect
from timm_faim.report.page import write_report
from timm_faim.report.predictions import evaluate
from timm_faim.report.tables import file_names, summary_lines, write_evaluation
from timm_faim.run.calibrated import calibration_line, save_calibration
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write, create_run_folder
from timm_faim.run.finished import CALIBRATION, REPORT
from timm_faim.run.summary import read_summary
from timm_faim.run.weights import BEST, saved_class_order
from timm_faim.training.data import build_fit_loader
from timm_faim.training.loop import Training
from timm_faim.training.options import Options


def evaluate_only(
    options: Options,
    model: torch.nn.Module,
    data: TrainingData,
    val_loader: Any,
    img_size: int,
    accelerator: Accelerator,
    log: Callable,
) -> None:
    """--eval-only: evaluate a model on any number of processes, every image once, and write what came out.

    Args:
        options: all options.
        model: on its device.
        data: the validation data.
        val_loader: validation images.
        img_size: pixels, for the name of the folder.
        accelerator: where and in which precision to run; has prepared no model.
        log: print of the main process.

    Raises:
        UserError: the data have other classes than the model.
    """
    if model.num_classes != data.num_classes:
        raise UserError(
            f"the model has {model.num_classes} classes and the validation data {data.num_classes}. Give "
            "the class folders of the training, or its classes in order with --class-map; where the model "
            f"was trained with more classes than folders, --num-classes {model.num_classes}"
        )
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if not names and options.model.model.startswith("local-dir:"):
        names = saved_class_order(Path(options.model.model.removeprefix("local-dir:")))
    if names and data.class_order:  # the first classes alone do: --num-classes says how many the model has
        check_same_classes(data.class_order, list(names)[: len(data.class_order)], "the model")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    folder = None
    if accelerator.is_main_process:
        folder = create_run_folder(
            options.run.output, options.run.experiment, f"eval-{options.model.model.split('/')[-1]}", img_size
        )
    if options.data.multi_label:
        create_evaluator = partial(
            MultiLabelClassificationEvaluator, accelerator.device, threshold=options.data.multilabel_threshold
        )
        metrics = evaluate(prepared, val_loader, accelerator, create_evaluator, **options.reading)
        if folder is not None:
            with atomic_write(folder / "eval.json") as temporary:
                temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            log(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    else:
        evaluation = collect(prepared, val_loader, accelerator, **options.reading)
        if folder is not None:
            _write(evaluation, data, folder, {"model": options.model.model}, log)
    log(f"evaluation in {folder}")
    accelerator.end_training()


def finish(
    run: Training,
    data: TrainingData,
    val_loader: Any,
    data_config: dict[str, Any],
    asked: Collection[str],
    log: Callable,
) -> None:
    """Calibrate and evaluate the best weights as a person would open them, and write the page; a collective call.

    Args:
        run: the run, ended.
        data: the data.
        val_loader: validation images, or None: then the curves and the heads alone are shown.
        data_config: preprocessing.
        asked: CALIBRATION, REPORT or both.
        log: print of the main process.
    """
    options, accelerator = run.options, run.accelerator
    accelerator.wait_for_everyone()
    dtype = getattr(torch, options.device.model_dtype or "float32")
    model = timm.create_model(f"local-dir:{run.run_folder}", pretrained=True).to(accelerator.device, dtype).eval()
    evaluation = None
    if val_loader is not None and not options.data.multi_label:
        calibrates = CALIBRATION in asked and bool(faim_heads(model))
        evaluation = _evaluate(run, model, val_loader, calibrates, log)
        if REPORT in asked and accelerator.is_main_process:
            info = {"model": options.model.model, "weights": str(run.run_folder / BEST)}
            _write(evaluation, data, run.run_folder / "eval", info, log)
    if REPORT in asked and accelerator.is_main_process:
        is_stream = isinstance(data.train, IterableDataset)  # whose images cannot be read by their number
        try:
            page = write_report(
                run.run_folder,
                model,
                read_summary(run.run_folder / "summary.csv"),
                label_names=data.label_names,
                evaluation=evaluation,
                val_images=val_loader,
                train_images=None
                if is_stream
                else build_fit_loader(options, data_config, accelerator, data.num_classes),
                options=run.run_folder / "args.yaml",
            )
        except Exception as e:  # the training has ended well, whatever becomes of its pictures
            log(f"no report.html: {type(e).__name__}: {' '.join(str(e).split())}")
        else:
            log(
                f"report: {page}"
                if page
                else "no report.html: matplotlib is not installed (pip install 'timm-faim[train]')"
            )
    accelerator.wait_for_everyone()


def _evaluate(run: Training, model: torch.nn.Module, val_loader: Any, calibrates: bool, log: Callable) -> Evaluation:
    """The evaluation of the model, after a calibration where one is asked for; a collective call."""
    accelerator, reading = run.accelerator, run.options.reading
    if not calibrates:
        return collect(model, val_loader, accelerator, **reading)
    kept = KeptLogits(len(val_loader.dataset), model.num_classes)
    evaluation = collect(model, val_loader, accelerator, kept, **reading)
    logits, target = kept.gathered(accelerator)  # the same in every process, and so is what follows from them
    try:
        calibration = calibrate(logits, target, "validation")
    except ValueError as e:
        log(f"not calibrated: {e}")
        return evaluation
    apply_temperature_(model, calibration.temperature)
    if accelerator.is_main_process:
        save_calibration(run.run_folder, calibration)
    log(calibration_line(calibration))
    if kept.every > 1:
        return collect(model, val_loader, accelerator, **reading)
    return Evaluation.of(logits / calibration.temperature, target, evaluation.images_per_s)


def _write(evaluation: Evaluation, data: TrainingData, folder: Path, info: dict[str, Any], log: Callable) -> None:
    write_evaluation(folder, evaluation, data.label_names, file_names(data.val), info)
    for line in summary_lines(evaluation, data.label_names):
        log(line)
