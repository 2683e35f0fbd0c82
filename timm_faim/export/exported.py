"""Open an exported file for inference.

Shapes: B images, c channels, H and W of the model's input, C classes.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_faim.export.packages import KEY, format_of, need
from timm_faim.export.program import pixels_of
from timm_faim.run.errors import UserError

_KEPT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


class Exported:
    """A classifier from a file that ``timm-faim export`` or :func:`timm_faim.export.export_model` wrote.

    Args:
        path: of an .onnx, .pt2, .ts or .torchscript file.
        threads: of onnxruntime (default: its own choice); the other formats use torch's.

    Attributes:
        metadata: what the file says of itself: architecture, label_names, preprocessing, outputs, dtype,
            classifier, …
        label_names: of the classes, None where the file has none.
        data_config: input_size, mean, std, interpolation, crop_pct, crop_mode, for timm's ``create_transform``.

    Raises:
        UserError: no such file, one of another kind, a missing package.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path, self.format = Path(path), format_of(path)
        if not self.path.is_file():
            raise UserError(f"there is no file {path}. Write one with timm-faim export")
        if self.format == "onnx":
            need("onnxruntime")
        try:
            self.run, text = _OPEN[self.format](self.path, threads)
        except Exception as e:  # onnxruntime and torch have errors of their own for a damaged file
            raise UserError(f"cannot open {path} as {self.format}: {e}") from e
        try:
            self.metadata: dict[str, Any] = json.loads(text)
            self.data_config = {key: self.metadata[key] for key in _KEPT}
            self.output, self.inside = self.metadata["outputs"][0], self.metadata["preprocessing"] == "inside"
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} does not say what it takes and gives: no metadata of timm_faim. Write it with "
                            "timm-faim export") from e  # fmt: skip
        self.data_config["input_size"] = tuple(self.data_config["input_size"])

    @property
    def label_names(self) -> list[str] | None:
        """The class names in the order of their indices."""
        return self.metadata.get("label_names")

    def __call__(self, images: Tensor | np.ndarray) -> Tensor:
        """The file's output, float32 [B, C] on the CPU.

        Args:
            images: float32 [B, c, H, W], normalised, whatever the file takes; or, where preprocessing is inside, bytes
                [B, H, W, c].

        Raises:
            ValueError: images of another shape.
        """
        x = torch.as_tensor(images).detach().cpu()
        c, H, W = self.data_config["input_size"]
        takes_bytes = self.inside and x.dtype == torch.uint8
        if list(x.shape[1:]) != ([H, W, c] if takes_bytes else [c, H, W]) or not len(x):
            raise ValueError(f"{self.path} takes images [B, {c}, {H}, {W}], B >= 1, got {list(x.shape)}")
        if self.inside and not takes_bytes:
            x = pixels_of(x, self.data_config)
        return self.run(x.contiguous() if self.inside else x.float().contiguous())

    def logits(self, images: Tensor | np.ndarray) -> Tensor:
        """Logits, float32 [B, C], of images as the call takes them; of a file that gives probabilities their
        logarithms, which have the same softmax."""
        out = self(images)
        return out.clamp_min(torch.finfo(out.dtype).tiny).log() if self.output == "probabilities" else out


def _open_onnx(path: Path, threads: int | None) -> tuple[Callable[[Tensor], Tensor], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    there = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    name = session.get_inputs()[0].name
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), text


def _open_pt2(path: Path, threads: int | None) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {KEY: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return torch.no_grad()(module), extra[KEY]


def _open_torchscript(path: Path, threads: int | None) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {KEY: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still read by everybody
        module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra).eval()
    return torch.no_grad()(module.forward), extra[KEY]


_OPEN = {"onnx": _open_onnx, "pt2": _open_pt2, "torchscript": _open_torchscript}
