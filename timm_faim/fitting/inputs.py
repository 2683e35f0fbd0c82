"""The trial of `--crop-mode auto`, kept on disk beside the features."""

import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import nn

from timm_faim.data import cache_dir
from timm_faim.documents import read_json
from timm_faim.fitting.store import key_of
from timm_faim.images.checked import reader_of
from timm_faim.images.datasets import TrainingData
from timm_faim.run.files import atomic_write
from timm_faim.training.inputs import Trial, run_trial
from timm_faim.training.options import Options


def kept_trial(
    cache: Path | None, no_cache: bool, trial: Trial, options: Options, model: nn.Module, data: TrainingData,
    accelerator: Accelerator,
) -> np.ndarray:  # fmt: skip
    """`run_trial`, or what came of it before: the same images, backbone and crops.

    Args:
        cache: folder of features; None is the user's.
        no_cache: keep nothing.
        trial, options, model, data, accelerator: of `run_trial`.
    """
    reader = reader_of(data.train)
    if no_cache or not isinstance(reader, ReaderImageFolder):
        return run_trial(trial, options, model, data, accelerator)
    settings = trial.config | {"amp": options.device.amp, "skip": options.data.skip_unreadable}
    settings |= {"model": [model.pretrained_cfg.get("architecture"), model._model_args], "crops": trial.crops}
    settings |= {"classes": trial.target.tolist()}
    key = key_of(model, settings, [reader.samples[i][0] for i in trial.chosen])
    path = (cache or cache_dir() / "features") / f"crops-{key}.json"
    found = broadcast_object_list([_read(path, len(trial.crops)) if accelerator.is_main_process else None])[0]
    if found is not None:
        return found
    right_KM = run_trial(trial, options, model, data, accelerator)
    if accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(right_KM.astype(int).tolist()), encoding="utf-8")
    return right_KM


def _read(path: Path, crops: int) -> np.ndarray | None:
    try:
        right_KM = np.array(read_json(path), bool)
    except (OSError, ValueError):
        return None
    return right_KM if right_KM.ndim == 2 and len(right_KM) == crops else None
