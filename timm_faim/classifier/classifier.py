"""`timm_faim.load`: a trained model with its names and its preprocessing, ready for images.

classifier = timm_faim.load("output/RUN")        # or hf-hub:ORG/NAME, or an exported file
classifier("a.jpg").name
classifier(["a.jpg", PIL.Image.open("b.png"), array])
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn

from timm_faim import faim_heads
from timm_faim.calibration import Calibration
from timm_faim.classifier.neighbours import Gallery
from timm_faim.classifier.prediction import Judge, Prediction
from timm_faim.export import Exported
from timm_faim.head.tap import Tap, pooled
from timm_faim.images.pixels import mode_of, read_image
from timm_faim.run.errors import UserError
from timm_faim.run.opening import open_model
from timm_faim.run.record import images_of

Picture = str | os.PathLike | Image.Image | np.ndarray
RATE = 0.05  # of known images that may be called unknown, where nobody says


class Classifier:
    """Classifies images with a model.

    Args:
        model: gives logits [B, C] of [B, channels, H, W], in eval mode, on ``device``.
        names: of the classes, in the order of the logits.
        data_config: timm's preprocessing.
        record: of the run (`timm_faim.run.record`).
        device: where the images go.
        amp: run the model under autocast in bfloat16.
        folder: of the run, if there is one.

    Attributes: the same, ``transform`` (a PIL image to a tensor [channels, H, W]), ``calibration`` (None of a model
    that was never calibrated), ``images``, the training images of each class (None: not known), and ``head``, the FAIM
    head if the model has exactly one.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        data_config: dict[str, Any],
        record: dict[str, Any],
        device: torch.device,
        amp: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.model, self.names, self.data_config = model, list(names), data_config
        self.device, self.amp, self.folder = device, amp, folder
        self.transform = create_transform(**data_config, is_training=False)
        saved = record.get("calibration")
        self.calibration = Calibration.from_json(saved) if saved else None
        self.images = images_of(record, len(self.names))
        heads = faim_heads(model)
        self.head = next(iter(heads.values())) if len(heads) == 1 else None

    @property
    def mode(self) -> str:
        """Pillow's mode of the images that the model sees."""
        return mode_of(self.data_config["input_size"][0])

    def judge(self, top: int = 5, unknown: float = RATE, coverage: float | None = None) -> Judge:
        """What makes predictions of logits; see :meth:`__call__`."""
        gamma, prior = None, None
        if self.head is not None:
            gamma = self.head.gamma().item()
            prior = None if self.head.prior is None else self.head.prior.detach()
        return Judge(self.names, top, gamma, prior, self.calibration, unknown, coverage)

    @torch.inference_mode()
    def logits(self, batch: Tensor) -> Tensor:
        """Logits [B, C] of preprocessed images [B, channels, H, W]."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            output = self.model(batch.to(self.device))
        return output[0] if isinstance(output, (tuple, list)) else output

    @torch.inference_mode()
    def points(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, C], and the points [B, D] between which the one FAIM head measures distances."""
        assert self.head is not None
        tap = Tap({"head": self.head})
        try:
            with tap:
                logits = self.logits(batch)
            return logits, self.head.embed(pooled(tap.take()["head"], self.head.in_features).float())
        finally:
            tap.remove()

    def gallery(self) -> Gallery:
        """The training images that the run kept.

        Raises:
            UserError: it kept none.
        """
        return Gallery.of_run(self.folder, self.device)

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        *,
        top: int = 5,
        unknown: float = RATE,
        coverage: float | None = None,
        batch_size: int = 64,
    ) -> Prediction | list[Prediction]:
        """Predictions of images.

        Args:
            images: one, or a list: paths, PIL images, or arrays of bytes [H, W] or [H, W, 3].
            top: classes that are told.
            unknown: share of images of known classes that may be called unknown, one that the calibration has; 0 calls
                none so.
            coverage: tell the classes that hold the right one so often (0.9, 0.95 or 0.99).
            batch_size: images at a time.

        Returns:
            One prediction of one image, a list of a list.

        Raises:
            UserError: an image that cannot be read.
            ValueError: a rate or coverage without a threshold; a number of classes or images below 1.
        """
        if top < 1 or batch_size < 1:
            raise ValueError(f"top and batch_size must be >= 1, got {top} and {batch_size}")
        one = isinstance(images, (str, os.PathLike, Image.Image, np.ndarray))
        judge = self.judge(top, unknown, coverage)
        found = [p for batch in self._batches([images] if one else images, batch_size) for p in judge(batch)]
        return found[0] if one else found

    def _batches(self, images: Sequence[Picture], size: int) -> Iterator[Tensor]:
        for start in range(0, len(images), size):
            yield self.logits(torch.stack([self.transform(self._open(each)) for each in images[start : start + size]]))

    def _open(self, image: Picture) -> Image.Image:
        try:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            if isinstance(image, Image.Image):
                return read_image(image, self.mode)
            with Path(image).open("rb") as stream:
                return read_image(stream, self.mode)
        except MemoryError:
            raise
        except Exception as e:  # Pillow's decoders raise TypeError, struct.error, ... on damaged files
            what = image if isinstance(image, (str, os.PathLike)) else f"an {type(image).__name__}"
            raise UserError(f"cannot read image {what}: {' '.join(str(e).split()) or type(e).__name__}") from e


def load(
    checkpoint: str | os.PathLike, device: torch.device | str | None = None, amp: bool = False, flag: str = "the model"
) -> Classifier:
    """A classifier from the run folder of a training or fit, ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``, a timm name, or
    a file that `timm-faim export` wrote, which runs on the CPU or where onnxruntime takes it.

    Args:
        checkpoint: where it is.
        device: where it runs (default: a GPU where there is one).
        amp: run the model under autocast in bfloat16.
        flag: what messages call it.

    Raises:
        UserError: it cannot be opened, or its config says what cannot be.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if Path(checkpoint).is_file():
        return _of_file(Path(checkpoint))
    opened = open_model(str(checkpoint), flag)
    model = opened.model.to(device)
    config = resolve_data_config(pretrained_cfg=getattr(model, "pretrained_cfg", None) or {}, model=model)
    names = _all_names(opened.label_names, model.num_classes)
    return _checked(model, names, config, opened.record, device, amp, opened.folder)


def _of_file(path: Path) -> Classifier:
    file = Exported(path)
    names = _all_names(file.label_names, file.metadata["num_classes"])
    record = file.metadata.get("classifier") or {}
    return _checked(ExportedModel(file), names, file.data_config, record, torch.device("cpu"), False, None)


def _all_names(names: Sequence[str] | None, count: int) -> list[str]:
    """A name for each class; its number where it has none."""
    return [*(names or ()), *map(str, range(len(names or ()), count))]


class ExportedModel(nn.Module):
    """An exported file as a model."""

    def __init__(self, file: Exported) -> None:
        super().__init__()
        self.file = file

    def forward(self, x: Tensor) -> Tensor:
        return self.file.logits(x)


def _checked(*arguments: Any) -> Classifier:
    try:
        return Classifier(*arguments)
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"the calibration of the model cannot be read: {e}. Train or fit it again") from e
