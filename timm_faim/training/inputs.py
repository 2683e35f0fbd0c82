"""What the network sees of an image, chosen before anything is fitted or trained (--crop-mode auto).

Heads in closed form, on the features of a part of the training images, classify the other part; the crop under which
they do it best is taken, and the model's own, or an earlier one, as long as it is not clearly worse.

Shapes: N images, M of them held out, K crops, D features.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from timm_faim import FAIMHead, faim_heads, fit_
from timm_faim.calibration import cross_fitted_logits, lookalike_folds
from timm_faim.head.fit import fit_moments_
from timm_faim.head.tap import layer_inputs, pooled
from timm_faim.images.checked import UNREADABLE
from timm_faim.images.crops import Crop, InCrops, crops_of, have_shape, spread_sample
from timm_faim.images.datasets import TrainingData, targets_of
from timm_faim.moments import Moments
from timm_faim.run.errors import UserError
from timm_faim.run.gather import gather_rows, raise_together
from timm_faim.run.options import AUTO
from timm_faim.training.model import build_data_config
from timm_faim.training.options import Options

MOST, LEAST = 1000, 5  # images looked at, and of a class where the classes are too many
_NONE_HELD_OUT = "nothing can be held out: no class has two images that differ"
_FOR_MOMENTS = 512  # pictures that the projection of second moments is fitted to


@dataclass(frozen=True)
class Trial:
    """The training images looked at, by number [N], with their classes [N], counted from 0, and K crops of them."""

    chosen: np.ndarray
    target: np.ndarray
    crops: list[Crop]
    config: dict[str, Any]


Run = Callable[[Trial, Options, nn.Module, TrainingData, Accelerator], np.ndarray]


def choose_crop(
    options: Options,
    model: nn.Module,
    data: TrainingData,
    accelerator: Accelerator,
    log: Callable,
    run: Run | None = None,
) -> dict[str, Any]:
    """Choose the crop where that is asked for, put it into the options and say so; a collective call.

    Args:
        options: those of the crop change.
        model: pretrained, on its device; left as it is.
        data: the training images are looked at.
        accelerator: processes, and the precision of the backbone.
        log: print of the main process.
        run: like `run_trial`, the default.

    Returns:
        The chosen options by name; none where nothing was asked for.

    Raises:
        UserError: images that cannot be read, features that no head can be fitted to.
    """
    if options.input.crop_mode != AUTO:
        return {}
    pct_given = options.input.crop_pct is not None
    options.input.crop_mode = None
    config = build_data_config(options.input, model)
    own = Crop(config["crop_mode"], config["crop_pct"])
    trial, crop, why = None, own, _obstacle(data)
    if not why:
        trial, why = _trial_of(data, config, pct_given), "it makes no difference to these images"
    if trial is not None and len(trial.crops) > 1:
        with torch.random.fork_rng(devices=[]):  # what follows starts as where nothing is chosen
            right_KM = (run or run_trial)(trial, options, model, data, accelerator)
        why = _NONE_HELD_OUT
        if right_KM.shape[1]:
            crop, why = trial.crops[best_of(right_KM)], _shares(trial.crops, right_KM)
    log(f"input: {crop} ({why})")
    taken = {"crop_mode": crop.mode, "crop_pct": crop.pct}
    vars(options.input).update(taken)
    if crop.mode == "squash" and options.augmentation.no_aug and options.augmentation.train_crop_mode is None:
        options.augmentation.train_crop_mode = taken["train_crop_mode"] = "squash"
    return taken


def _obstacle(data: TrainingData) -> str:
    """Why nothing can be chosen by the training images; empty where they can be looked at."""
    target = targets_of(data.train)
    if target is None or len(target) != len(data.train):
        return "the data do not tell the classes of their images"
    _, counts = np.unique(target, return_counts=True)
    return "there is one class" if len(counts) < 2 else _NONE_HELD_OUT if counts.max() < 2 else ""


def _trial_of(data: TrainingData, config: dict[str, Any], pct_given: bool) -> Trial:
    target_N = np.asarray(targets_of(data.train))
    chosen = spread_sample(target_N, MOST, LEAST)
    target = np.unique(target_N[chosen], return_inverse=True)[1]
    modes_matter = not have_shape(data.train, chosen, *config["input_size"][1:])
    return Trial(chosen, target, crops_of(config, modes_matter, pct_given), config)


def _shares(crops: list[Crop], right_KM: np.ndarray) -> str:
    shares = zip(crops, 100 * right_KM.mean(1), strict=True)
    named = [f"{crop} {share:.1f} %" for crop, share in sorted(shares, key=lambda pair: -pair[1])]
    return f"{right_KM.shape[1]} held-out training images: {', '.join(named)}"


def best_of(right_KM: np.ndarray) -> int:
    """The first of the crops that is within the noise of the best one.

    That is, the images that the best has right and it has not outnumber those of the reverse by at most the standard
    error of the difference, the root of the number of both (McNemar 1947).

    Args:
        right_KM: whether each crop has each image right.
    """
    best_M = right_KM[right_KM.sum(1).argmax()]
    lost_K, won_K = (best_M & ~right_KM).sum(1), (~best_M & right_KM).sum(1)
    return int(np.flatnonzero(lost_K - won_K <= np.sqrt(lost_K + won_K))[0])


def run_trial(
    trial: Trial, options: Options, model: nn.Module, data: TrainingData, accelerator: Accelerator
) -> np.ndarray:
    """Whether a head that is fitted without the image has it right [K, M] (bool), by crop; a collective call."""
    layer = _classifier_of(model)
    images = InCrops(data.train, trial.chosen, trial.config, trial.crops)
    x_NKD, rows_N = _features(images, layer, options, model, accelerator)
    target_N = torch.from_numpy(trial.target).to(rows_N.device)[rows_N]
    try:
        right_KM = held_out(x_NKD, target_N, layer)
    except (ValueError, torch.linalg.LinAlgError) as e:
        raise UserError(f"--crop-mode auto: {e}") from e
    return broadcast_object_list([right_KM])[0]  # of float sums, which need not be equal to the last bit


def _classifier_of(model: nn.Module) -> nn.Module:
    """The first layer that makes logits."""
    classifiers = list(faim_heads(model).values()) or model.get_classifier()
    return classifiers[0] if isinstance(classifiers, (list, tuple)) else classifiers


def _features(
    images: InCrops, layer: nn.Module, options: Options, model: nn.Module, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """What enters the layer [N, K, D] of the images that can be read, and their places [N], from all processes."""
    rank, world, count = accelerator.process_index, accelerator.num_processes, len(images.transforms)
    mine = torch.arange(rank, len(images), world)
    size = max(1, (options.run.validation_batch_size or options.run.batch_size) // count)
    workers = min(options.data.workers, -(-len(mine) // size))
    loader = DataLoader(Subset(images, mine.tolist()), size, num_workers=workers)
    dtype = getattr(torch, options.device.model_dtype or "float32")

    def forward(pictures: Tensor) -> None:
        pictures = pictures.to(accelerator.device, dtype)
        if options.model.channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            model(pictures)

    def batches(name: str = "") -> Iterator[tuple[Tensor, Tensor]]:
        bar = tqdm(loader, desc=name, unit="batch", leave=False,
                   disable=None if name and accelerator.is_main_process else True)  # fmt: skip
        for pictures, target in bar:
            yield pictures.flatten(0, 1), target

    new = [m for m in model.modules() if isinstance(m, Moments) and not m.is_fitted]
    before = [{key: tensor.clone() for key, tensor in m.state_dict().items()} for m in new]
    rows = [torch.empty(0, count, _width(layer), device=accelerator.device)]
    read, problem = [torch.empty(0, dtype=torch.bool)], None
    try:
        if new:
            fit_moments_(model, _Batches(batches), forward, _FOR_MOMENTS)
        for inputs, target in layer_inputs(model, {"layer": layer}, batches("crops"), forward):
            x = pooled(inputs["layer"], _width(layer)).float()
            rows.append(x.unflatten(0, (len(target), count)))
            read.append(target != UNREADABLE)
    except UserError as e:
        problem = str(e)
    except ValueError as e:
        raise UserError(f"--crop-mode auto: {e}") from e
    finally:
        for m, state in zip(new, before, strict=True):
            m.load_state_dict(state)
    raise_together(problem)
    is_read = torch.cat(read)
    places = gather_rows(mine[is_read].to(accelerator.device), accelerator)
    x_NKD = gather_rows(torch.cat(rows)[is_read.to(accelerator.device)], accelerator)
    order = places.argsort()
    return x_NKD[order], places[order]


class _Batches:
    """Batches that can be read twice."""

    def __init__(self, make: Callable[[], Iterator]) -> None:
        self.make = make

    def __iter__(self) -> Iterator:
        return self.make()


def _width(layer: nn.Module) -> int:
    width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    if width is None:
        raise UserError(f"--crop-mode auto finds no classifier in this model ({type(layer).__name__}). Leave it out")
    return width


def held_out(x_NKD: Tensor, target_N: Tensor, layer: nn.Module) -> np.ndarray:
    """[K, M]; images that look alike in all crops together are held out together."""
    count, width = x_NKD.shape[1:]
    if len(target_N.unique()) < 2:  # of what can be read
        return np.empty((count, 0), bool)
    options: dict[str, Any] = {}
    if isinstance(layer, FAIMHead) and len(layer.parts) > 1:
        options = {"parts": layer.parts, "part_weights": layer.weights_init, "rank": layer.frames[0].rank}
    probe = FAIMHead(width, int(target_N.max()) + 1, **options, device=x_NKD.device).eval()
    with torch.no_grad():
        points = [fit_(probe, [(x_ND, target_N)]).embed(x_ND) for x_ND in x_NKD.unbind(1)]
    fold_N = lookalike_folds(torch.cat(points, 1), target_N)
    if not (fold_N >= 0).any():
        return np.empty((count, 0), bool)
    right = []
    for x_ND in x_NKD.unbind(1):
        logits, target = cross_fitted_logits(probe, x_ND, target_N, fold_N)
        right.append((logits.argmax(1) == target).cpu().numpy())
    return np.stack(right)
