"""The work of `timm-faim export`: from a run folder to a file, with a line about each thing that a person must know."""

import argparse
from pathlib import Path
from typing import Any

from timm_faim.export.packages import format_of, need
from timm_faim.export.program import data_config_of
from timm_faim.export.samples import Samples, bundled_drawings, read_samples
from timm_faim.export.write import Parity, ParityError, export_model
from timm_faim.run.errors import MODEL_ERRORS, UserError
from timm_faim.run.files import check_writable
from timm_faim.run.opening import Opened, open_model


def export(args: argparse.Namespace) -> Parity:
    """One file.

    Raises:
        UserError: wrong input, or a file that does not do what the model does.
    """
    format = _check(args)
    opened = open_model(args.checkpoint, "RUN")
    config = data_config_of(opened.model)
    count = max(args.check_count, args.calibration_count if args.dtype == "int8" else 0)
    folder = bundled_drawings() if args.images is None else args.images
    samples = read_samples(folder, config, count, args.skip_unreadable)
    try:
        parity = export_model(
            opened.model,
            args.output,
            format=format,
            dtype=args.dtype,
            preprocessing=args.with_preprocessing,
            output=args.output_kind,
            images=samples.spread(args.check_count).pixels,
            calibration=samples.spread(args.calibration_count).pixels,
            agreement=args.least_agreement,
            metadata=_said(opened, args.output_kind),
        )
    except ParityError as e:
        raise UserError(f"{e}. {_mend(args)}") from e
    except OSError as e:
        raise UserError(f"cannot write {args.output}: {e.strerror or e}. Choose another --output") from e
    except MODEL_ERRORS as e:  # torch's exporters meet a model that they cannot write
        raise UserError(f"cannot write {args.checkpoint} as {format}: {e}. Try another --format") from e
    _report(args, parity, samples, opened)
    return parity


def _check(args: argparse.Namespace) -> str:
    """Refuse what cannot be done before the model is opened; the format of the file."""
    format = format_of(args.output)
    if args.format not in (None, format):
        raise UserError(f"--format {args.format} does not go with --output {args.output}, which is opened as {format}. "
                        "Name the file after its format")  # fmt: skip
    if args.dtype == "int8" and format != "onnx":
        raise UserError(f"--dtype int8 is for onnx, and --output {args.output} is {format}. Name a file .onnx")
    if args.dtype == "int8" and args.images is None:
        raise UserError("--dtype int8 takes its ranges from images. Give --calibration-images DIR, some of those that "
                        "the model was trained on")  # fmt: skip
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder. Name a file in it")
    if not args.output.parent.is_dir():
        raise UserError(f"there is no folder {args.output.parent} for --output {args.output}. Make it, or name another")
    check_writable(args.output.parent)
    if format == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    return format


def _said(opened: Opened, output_kind: str) -> dict[str, Any]:
    """What the file says besides what the model itself does."""
    said: dict[str, Any] = {"label_names": opened.label_names}
    record = dict(opened.record)
    if output_kind == "probabilities" and isinstance(record.get("calibration"), dict):
        record["calibration"] = record["calibration"] | {"reject": {}}  # of logits, which softmax does not keep
    return said | ({"classifier": record} if record else {})


def _mend(args: argparse.Namespace) -> str:
    if args.dtype == "float32":
        return "Try another --format"
    mend = "Try --dtype float32" + (" or float16, or more images of the classes" if args.dtype == "int8" else "")
    return f"{mend}, or accept it with --least-agreement"


def _report(args: argparse.Namespace, parity: Parity, samples: Samples, opened: Opened) -> None:
    for note in parity.notes:
        print(f"in the file: {note}")
    print(parity)
    if args.images is None and args.dtype != "float32":
        print("these were drawings that ship with the package; give --images DIR for what the dtype costs on your own")
    if args.images is not None and (right := _right(parity, samples, opened, args)) is not None:
        print(right)
    megabytes = Path(args.output).stat().st_size / 2**20
    print(f"written: {args.output} ({megabytes:.1f} MiB)")


def _right(parity: Parity, samples: Samples, opened: Opened, args: argparse.Namespace) -> str | None:
    """Accuracy before and after, where the folders of the images are classes of the model."""
    names = {name: k for k, name in enumerate(opened.label_names or [])}
    folders = samples.spread(args.check_count).folders
    if not all(folder in names for folder in folders):
        return None
    wanted = [names[folder] for folder in folders]
    shares = [
        100 * sum(a == b for a, b in zip(first, wanted, strict=True)) / len(wanted)
        for first in (parity.before, parity.after)
    ]
    return f"top-1 on these images: the model {shares[0]:.2f} %, the file {shares[1]:.2f} %"
