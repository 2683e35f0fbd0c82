"""Write a classifier as a file, check that the file does what the model does, and only then give it its name.

Shapes: N images, c channels, H and W of the model's input, C classes.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timm_faim.export.exported import Exported
from timm_faim.export.packages import KEY, format_of, need
from timm_faim.export.program import Program, data_config_of, normalised
from timm_faim.export.quantise import quantise
from timm_faim.run.files import atomic_write
from timm_faim.version import __version__

FORMATS, DTYPES, OUTPUTS = ("onnx", "pt2", "torchscript"), ("float32", "float16", "int8"), ("logits", "probabilities")
TOLERANCE = 3e-4  # of float32: the largest difference over the mean spread of an image's outputs over the classes
AGREEMENT = {"float16": 0.98, "int8": 0.9}  # of the first class
_BATCH = 16


class ParityError(ValueError):
    """The file does not do what the model does, and was not kept."""


@dataclass(frozen=True)
class Parity:
    """How far a file is from its model on some images.

    ``difference`` is the largest one over the mean spread (highest less lowest) of an image's outputs over the classes.
    ``before`` and ``after`` are the first classes that
    model and file give the images, ``notes`` what is to say about the file.
    """

    difference: float
    before: list[int]
    after: list[int]
    notes: tuple[str, ...] = ()

    @property
    def agreement(self) -> float:
        """Share of images with the same first class."""
        return sum(a == b for a, b in zip(self.before, self.after, strict=True)) / len(self.before)

    def __str__(self) -> str:
        return (f"on {len(self.before)} images the first class agrees on {100 * self.agreement:.2f} %, the largest "
                f"difference is {self.difference:.1e} of the spread of the outputs")  # fmt: skip


@torch.no_grad()
def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    dtype: str = "float32",
    preprocessing: bool = False,
    output: str = "logits",
    images: Tensor | None = None,
    calibration: Tensor | None = None,
    agreement: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Parity:
    """Write a timm model, with FAIM heads or without, for batches of any number of images.

    The file is opened and run on ``images``, one at a time and in batches; it gets its name only if its outputs are
    those of the model as it is (heads not folded, normalised outside of the file).

    Args:
        model: in eval mode.
        path: the file; one that is there is replaced at once, when the new one has passed.
        format: one of `FORMATS`; by default by the suffix of the path.
        dtype: one of `DTYPES`. ``float16``: weights and arithmetic but those of folded heads, which compute in float32.
            ``int8``: ONNX alone, static quantisation of weights and activations outside of the heads.
        preprocessing: the file takes bytes [B, H, W, c] and normalises them itself; resizing stays outside.
        output: one of `OUTPUTS`.
        images: bytes [N, H, W, c] to check with, real ones; by default a pattern, which says less.
        calibration: bytes [N, H, W, c], for int8.
        agreement: the least share of images with the same first class for float16 (0.98) and int8 (0.9).
        metadata: what the file is to say besides, such as label_names and classifier; plain types.

    Raises:
        ParityError: the outputs differ too much; nothing is written.
        UserError: a missing package, or a suffix of another format.
        ValueError: an unknown format, dtype or output; int8 without images, or in another format.
    """
    path = Path(path)
    format = format_of(path) if format is None else format
    for name, value, known in (("format", format, FORMATS), ("dtype", dtype, DTYPES), ("output", output, OUTPUTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if format_of(path) != format:
        raise ValueError(f"a file of format {format} must not end in {path.suffix}, by which files are opened")
    if format == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    if dtype == "int8" and format != "onnx":
        raise ValueError(f"int8 is for onnx, got format {format!r}")
    if dtype == "int8" and (calibration is None or not len(calibration)):
        raise ValueError("int8 needs calibration images; their activations set the ranges")
    config = data_config_of(model)
    program = Program(model, config, preprocessing=preprocessing, output=output, half=dtype == "float16")
    said = _description(model, config, program, dtype) | dict(metadata or {})
    pixels = _pattern(program.size) if images is None else images
    with atomic_write(path) as temporary:
        named = temporary.with_name(f"{temporary.name}{path.suffix}")  # files are opened by their suffix
        try:
            _WRITE[format](program, named, json.dumps(said))
            if dtype == "int8":
                quantise(named, calibration if preprocessing else normalised(calibration, config), program.float_scopes)
            parity = _compare(Exported(named), model, config, pixels, output)
            _judge(parity, path, dtype, agreement)
            named.replace(temporary)
        finally:
            named.unlink(missing_ok=True)
    return replace(parity, notes=tuple(program.notes))


def _description(model: nn.Module, config: dict[str, Any], program: Program, dtype: str) -> dict[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("label_names")
    return {
        "architecture": cfg.get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "label_names": list(names) if names else None,
        **config,
        "preprocessing": "inside" if program.preprocessing else "outside",
        "outputs": [program.output],
        "dtype": dtype,
        "notes": program.notes,
        "versions": {"timm_faim": __version__, "torch": torch.__version__},
    }


def _pattern(size: tuple[int, ...]) -> Tensor:
    """Bytes [4, H, W, c] of waves of several lengths, where no images are given."""
    c, H, W = size
    rows, columns = torch.linspace(0, 9, H)[:, None, None], torch.linspace(0, 7, W)[None, :, None]
    waves = [(k * rows + torch.arange(c) + columns * (5 - k)).sin() for k in (1.0, 2.0, 3.5, 4.5)]
    return (127.5 * (torch.stack(waves) + 1.0)).to(torch.uint8)


def _compare(file: Exported, model: nn.Module, config: dict[str, Any], pixels: Tensor, output: str) -> Parity:
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    got, wanted = [], []
    try:
        for batch in (pixels[:1], *pixels.split(_BATCH)):
            x = normalised(batch, config)
            got.append(file(batch if file.inside else x))
            logits = model(x.to(device, next(model.parameters()).dtype)).float().cpu()
            wanted.append(logits.softmax(-1) if output == "probabilities" else logits)
    finally:
        model.train(was_training)
    got_NC, wanted_NC = torch.cat(got), torch.cat(wanted)
    spread = (wanted_NC.amax(1) - wanted_NC.amin(1)).mean().clamp_min(1e-12)
    difference = float((got_NC - wanted_NC).abs().max() / spread)
    before, after = (out_NC[1:].argmax(1).tolist() for out_NC in (wanted_NC, got_NC))  # the first one is there twice
    return Parity(difference, before, after)


def _judge(parity: Parity, path: Path, dtype: str, agreement: float | None) -> None:
    if dtype == "float32":
        if not parity.difference <= TOLERANCE:  # NaN too
            raise ParityError(f"{path} is not written: {parity}, and float32 may differ by {TOLERANCE:g}")
        return
    least = AGREEMENT[dtype] if agreement is None else agreement
    if not (parity.agreement >= least and parity.difference < float("inf")):
        raise ParityError(f"{path} is not written: {parity}, and {dtype} is to agree on {100 * least:g} %")


def _write_onnx(program: Program, path: Path, said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = torch.onnx.export(
            program,
            (program.example(),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("B")},),
            input_names=["images"],
            output_names=[program.output],
            verbose=False,
        )
    written.model.metadata_props[KEY] = said
    written.save(path, external_data=False)


def _write_pt2(program: Program, path: Path, said: str) -> None:
    exported = torch.export.export(program, (program.example(),), dynamic_shapes=({0: torch.export.Dim("B")},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that share memory
        torch.export.save(exported, path, extra_files={KEY: said})


def _write_torchscript(program: Program, path: Path, said: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(program, program.example(), check_trace=False)
        torch.jit.save(traced, path, _extra_files={KEY: said})


_WRITE = {"onnx": _write_onnx, "pt2": _write_pt2, "torchscript": _write_torchscript}
