"""What is written once a run has ended, and by --eval-only: tables, pictures and the page."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.task import MultiLabelClassificationEvaluator
from torch.utils.data import IterableDataset

from timm_faim.images.datasets import TrainingData
from timm_faim.images.folders import check_same_classes
from timm_faim.report.evaluation import collect
from timm_faim.report.page import write_report
from timm_faim.report.predictions import evaluate
from timm_faim.report.tables import file_names, summary_lines, write_evaluation
from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write, create_run_folder
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
        _write(prepared, data, val_loader, accelerator, options, folder, {"model": options.model.model}, log)
    log(f"evaluation in {folder}")
    accelerator.end_training()


def finish(run: Training, data: TrainingData, val_loader: Any, data_config: dict[str, Any], log: Callable) -> None:
    """Evaluate the best weights as a person would open them, and write the tables and the page; a collective call.

    Args:
        run: the run, ended.
        data: the data.
        val_loader: validation images, or None: then the curves and the heads alone are shown.
        data_config: preprocessing.
        log: print of the main process.
    """
    options, accelerator = run.options, run.accelerator
    accelerator.wait_for_everyone()
    dtype = getattr(torch, options.device.model_dtype or "float32")
    model = timm.create_model(f"local-dir:{run.run_folder}", pretrained=True).to(accelerator.device, dtype).eval()
    evaluation = None
    if val_loader is not None and not options.data.multi_label:
        folder = run.run_folder / "eval" if accelerator.is_main_process else None
        evaluation = _write(
            model,
            data,
            val_loader,
            accelerator,
            options,
            folder,
            {"model": options.model.model, "weights": str(run.run_folder / BEST)},
            log,
        )
    if accelerator.is_main_process:
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


def _write(
    model: torch.nn.Module,
    data: TrainingData,
    val_loader: Any,
    accelerator: Accelerator,
    options: Options,
    folder: Path | None,
    info: dict[str, Any],
    log: Callable,
) -> Any:
    evaluation = collect(model, val_loader, accelerator, **options.reading)
    if folder is not None:
        write_evaluation(folder, evaluation, data.label_names, file_names(data.val), info)
        for line in summary_lines(evaluation, data.label_names):
            log(line)
    return evaluation
