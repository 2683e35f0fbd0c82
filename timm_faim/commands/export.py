"""Write a model for onnxruntime, torch.export or TorchScript.

timm-faim export output/RUN --output model.onnx
timm-faim export output/RUN --output model.onnx --with-preprocessing --output-kind probabilities --images DIR
timm-faim export output/RUN --output model.onnx --dtype int8 --calibration-images DIR

The file takes batches of any number of images, and is written only if it does what the model does. ONNX files need
pip install 'timm-faim[export]'.
"""

import argparse
from pathlib import Path

from timm_faim.run.options import SHARE, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("checkpoint", metavar="RUN", help="run folder, hf-hub:ORG/NAME, local-dir:FOLDER, or a timm model with weights")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .onnx, .pt2 or .ts")
    add("--format", choices=["onnx", "pt2", "torchscript"], help="default: by the suffix of --output")
    add(
        "--dtype", choices=["float32", "float16", "int8"], default="float32", help="int8 is for onnx (default: float32)"
    )
    add("--output-kind", choices=["logits", "probabilities"], default="logits", help="what comes out (default: logits)")
    add("--with-preprocessing", action="store_true", help="the file takes bytes [B, H, W, 3] of the model's own size "
        "and normalises them; resizing stays outside")  # fmt: skip
    add("--images", "--calibration-images", dest="images", type=Path, metavar="DIR", help="images to check the file "
        "with and to calibrate int8 with (default: drawings that ship with the package, but for int8)")  # fmt: skip
    add("--check-count", type=whole(1, 100_000), default=256, metavar="N", help="images to check with (default: 256)")
    add("--calibration-count", type=whole(1, 10_000), default=128, metavar="N", help="images to calibrate int8 with "
        "(default: 128)")  # fmt: skip
    add("--least-agreement", type=SHARE, metavar="SHARE", help="images on which float16 and int8 must have the model's "
        "first class (default: 0.98 and 0.9)")  # fmt: skip
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")


def run(args: argparse.Namespace) -> None:
    """One file."""
    from timm_faim.export.command import export

    export(args)
