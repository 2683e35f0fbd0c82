"""Evaluation image by image: what was predicted, how surely, and which classes are taken for each other.

Shapes: N images, C classes. Shares and accuracies are in per cent, as everywhere in timm; confidences in 0..1.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from timm_faim.calibration import BINS, reliability
from timm_faim.report.predictions import predictions
from timm_faim.run.errors import UserError
from timm_faim.run.gather import gather_rows

MOST_CONFUSED = 50  # rows of most_confused.csv
CELLS = 2**27  # logits that are kept for a calibration: 512 MiB


@dataclass(frozen=True)
class Confusion:
    """A pair of classes a < b that are taken for each other."""

    a: int
    b: int
    a_as_b: int  # images of a predicted as b
    b_as_a: int


@dataclass(frozen=True)
class Evaluation:
    """What a model said of N images, each counted once, in the order of the data set.

    `index` [N] is the image's place in the data set; `target` and `prediction` [N] are class indices; `confidence` [N]
    is the largest softmax probability; `loss` [N] the cross entropy; `margin` [N] the difference of the two largest
    logits (0 where C = 1); `top5` [N] tells whether the target is among the five best. `images_per_s` counts all
    processes and leaves the first batch out; None where there was one batch only.
    """

    num_classes: int
    index: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    margin: np.ndarray
    top5: np.ndarray
    images_per_s: float | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is right [N]."""
        return self.prediction == self.target

    @cached_property
    def samples_per_class(self) -> np.ndarray:
        """Images of each class [C]."""
        return np.bincount(self.target, minlength=self.num_classes)

    @cached_property
    def correct_per_class(self) -> np.ndarray:
        """Rightly predicted images of each class [C]."""
        return np.bincount(self.target[self.correct], minlength=self.num_classes)

    @cached_property
    def pairs(self) -> np.ndarray:
        """The confusion matrix without its zeros: rows (target, prediction, count) [P, 3], by target and prediction.

        At most N rows, however many classes there are.
        """
        codes, counts = np.unique(self.target * self.num_classes + self.prediction, return_counts=True)
        return np.stack([codes // self.num_classes, codes % self.num_classes, counts], axis=1)

    def confusion(self, classes: Sequence[int] | None = None) -> np.ndarray:
        """Counts [K, K] of targets (rows) and predictions (columns) among K classes; without `classes` all C."""
        classes = range(self.num_classes) if classes is None else classes
        place = np.full(self.num_classes, -1)
        place[list(classes)] = np.arange(len(classes))
        rows, columns = place[self.pairs[:, 0]], place[self.pairs[:, 1]]
        inside = (rows >= 0) & (columns >= 0)
        matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
        matrix[rows[inside], columns[inside]] = self.pairs[inside, 2]
        return matrix

    def most_confused(self, limit: int = MOST_CONFUSED) -> list[Confusion]:
        """The unordered pairs of classes with the most images taken for the other one, most first."""
        counts: dict[tuple[int, int], list[int]] = {}
        for target, prediction, count in self.pairs.tolist():
            if target != prediction:
                key = (min(target, prediction), max(target, prediction))
                counts.setdefault(key, [0, 0])[target > prediction] += count
        ranked = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))
        return [Confusion(*key, *both) for key, both in ranked[:limit]]

    def weakest_classes(self, count: int) -> list[int]:
        """The classes of lowest accuracy, lowest first; of equal ones those with the most images."""
        samples, correct = self.samples_per_class, self.correct_per_class
        return sorted(np.flatnonzero(samples).tolist(), key=lambda k: (correct[k] / samples[k], -samples[k], k))[:count]

    def calibration(self, bins: int = BINS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of images, mean confidence and accuracy (both 0..1, 0 where empty), each [bins].

        Bin m of M holds the confidences in ((m - 1)/M, m/M].
        """
        found = reliability(torch.from_numpy(self.confidence), torch.from_numpy(self.correct), bins)
        counts, confidence, accuracy = (each.numpy() for each in found)
        return counts, confidence, accuracy

    def ece(self, bins: int = BINS) -> float:
        """Expected calibration error in per cent (Guo et al. 2017): mean |accuracy - confidence| over bins."""
        counts, confidence, accuracy = self.calibration(bins)
        return 100 * float((counts * abs(accuracy - confidence)).sum()) / max(1, len(self.index))

    @classmethod
    def of(cls, logits: torch.Tensor, target: torch.Tensor, images_per_s: float | None = None) -> "Evaluation":
        """The evaluation of logits [N, C] of images of the classes [N], in the order of the data set."""
        integers, numbers = _judge(logits.float(), target, torch.arange(len(target), device=target.device))
        whole, real = integers.cpu().numpy(), numbers.cpu().numpy()
        return cls._of_rows(logits.shape[1], whole, real, images_per_s)

    @classmethod
    def _of_rows(cls, num_classes: int, whole: np.ndarray, real: np.ndarray, rate: float | None) -> "Evaluation":
        """Of the rows of `_judge`."""
        return cls(
            num_classes,
            index=whole[:, 0],
            target=whole[:, 1],
            prediction=whole[:, 2],
            top5=whole[:, 3].astype(bool),
            confidence=real[:, 0],
            loss=real[:, 1],
            margin=real[:, 2],
            images_per_s=rate,
        )

    def metrics(self) -> dict[str, Any]:
        """`loss`, `top1`, `top5`, `mean_class_top1` and `ece` in per cent, `samples`, `images_per_s`."""
        count = max(1, len(self.index))
        seen = self.samples_per_class > 0
        per_class = self.correct_per_class[seen] / self.samples_per_class[seen]
        return {
            "loss": float(self.loss.sum(dtype=np.float64)) / count,
            "top1": 100 * int(self.correct.sum()) / count,
            "top5": 100 * int(self.top5.sum()) / count,
            "mean_class_top1": 100 * float(per_class.mean()) if len(per_class) else 0.0,
            "ece": self.ece(),
            "samples": len(self.index),
            "images_per_s": self.images_per_s,
        }


class KeptLogits:
    """Logits of the images of a `collect`, of every n-th where all would take more than `CELLS` numbers.

    Args:
        images: N.
        num_classes: C.
    """

    def __init__(self, images: int, num_classes: int) -> None:
        self.every = max(1, -(-images * num_classes // CELLS))
        self._rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, logits: torch.Tensor, target: torch.Tensor, place: torch.Tensor) -> None:
        """Keep what is to be kept of a batch."""
        kept = place % self.every == 0
        self._rows.append((logits[kept].float(), target[kept], place[kept]))

    def gathered(self, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [M, C] and classes [M] on the CPU, in the order of the data set; a collective call."""
        logits, target, place = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        place = place * accelerator.num_processes + accelerator.process_index
        logits, target, place = (gather_rows(rows, accelerator).cpu() for rows in (logits, target, place))
        order = place.argsort()
        return logits[order], target[order]


@torch.inference_mode()
def collect(
    model: torch.nn.Module, loader: Any, accelerator: Accelerator, kept: KeptLogits | None = None, **options: bool
) -> Evaluation:
    """What the model says of the images of `predictions`; a collective call, with the same result on every process.

    Logits are reduced batch by batch, so that memory grows with N only.

    Args:
        model: the prepared model; left in eval mode.
        loader: timm's validation loader of (images [B, channels, H, W], target [B]). Process r of W reads the images
            r, r + W, r + 2 W, ... of the data set; for iterable data `index` is no more than a number.
        accelerator: where and in which precision to run.
        kept: keeps the logits.
        **options: those of `predictions`.

    Raises:
        UserError: a label outside the model's classes.
        ValueError: targets that are not class indices.
    """
    device = accelerator.device
    whole = [torch.empty(0, 4, dtype=torch.int64, device=device)]
    real = [torch.empty(0, 3, device=device)]
    warm_images, num_classes, start = 0, 0, None
    for output, target, place in predictions(model, loader, accelerator, **options):
        if target.ndim != 1:
            raise ValueError(f"expected class indices [B], got targets of shape {list(target.shape)}")
        num_classes = output.shape[1]
        integers, numbers = _judge(output.float(), target, place)
        if kept is not None:
            kept.add(output, target, place)
        whole.append(integers)
        real.append(numbers)
        if start is None:  # the first batch pays for start-up, compilation and the workers
            _synchronize(device)
            start = time.perf_counter()
        else:
            warm_images += len(target)
    _synchronize(device)
    seconds = time.perf_counter() - start if warm_images else 0.0

    rates = accelerator.gather(torch.tensor([[warm_images, seconds, num_classes]], device=device)).cpu().double()
    num_classes = int(rates[:, 2].max())
    slowest = float(rates[:, 1].max())
    integers, numbers = torch.cat(whole), torch.cat(real)
    integers[:, 0] = integers[:, 0] * accelerator.num_processes + accelerator.process_index
    integers, numbers = (gather_rows(rows, accelerator).cpu().numpy() for rows in (integers, numbers))
    order = np.argsort(integers[:, 0], kind="stable")
    integers, numbers = integers[order], numbers[order]
    target = integers[:, 1]
    if len(target) and not (target.min() >= 0 and target.max() < num_classes):
        raise UserError(
            f"the validation data have labels from {target.min()} to {target.max()}, outside the "
            f"{num_classes} classes of the model. Give --num-classes {target.max() + 1} or mend them"
        )
    rate = round(float(rates[:, 0].sum()) / slowest, 1) if slowest > 0 else None
    return Evaluation._of_rows(num_classes, integers, numbers, rate)


def _judge(logits: torch.Tensor, target: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [B, C]: (place, target, prediction, top-5 hit) [B, 4], and (confidence, loss, margin) [B, 3]."""
    best, classes = logits.topk(min(5, logits.shape[1]))
    hit = (classes == target[:, None]).any(1)
    # clamped: a wrong label is reported once all are known, where a GPU would stop with an assertion
    loss = cross_entropy(logits, target.clamp(0, logits.shape[1] - 1), reduction="none")
    confidence = (best[:, 0] - logits.logsumexp(1)).exp().clamp(max=1.0)
    margin = best[:, 0] - best[:, min(1, best.shape[1] - 1)]
    return torch.stack([place, target, classes[:, 0], hit.long()], 1), torch.stack([confidence, loss, margin], 1)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
