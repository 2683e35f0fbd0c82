"""Find like images: Recall@K, mAP@R and NMI of a model's distance, beside Euclidean and cosine.

timm-faim retrieve DIR --model output/RUN                       # leave one out
timm-faim retrieve GALLERY --queries QUERIES --model output/RUN
timm-faim retrieve DIR --model hf-hub:ORG/faim_resnet50.my_data

DIR holds one folder of images per class; the classes need not be those of the model.
"""

import argparse
from pathlib import Path

from timm_faim.commands.arguments import add_reading
from timm_faim.run.options import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add = parser.add_argument
    add("gallery", metavar="DIR", help="image folder, one folder per class")
    add(
        "--model",
        required=True,
        metavar="RUN",
        help="run folder, hf-hub:ORG/NAME, local-dir:FOLDER, or a timm model with weights",
    )
    add("--queries", metavar="DIR", help="queries from this folder (default: each image of the gallery in turn)")
    add("-o", "--output", type=Path, metavar="DIR", help="default: retrieval/ in the run folder, else in this one")
    add("--recall-at", type=whole(1), nargs="+", default=[1, 5, 10], metavar="K", help="default: 1 5 10")
    add("--device", metavar="NAME", help="default: a GPU where there is one, else cpu")
    add("--amp", action="store_true", help="run the model in bfloat16 autocast; distances stay in float64")
    add_reading(parser)
    add("--sheet-rows", type=whole(1, 1000), default=12, metavar="N", help="queries on the contact sheet (default: 12)")
    add("--no-sheet", action="store_true", help="draw no contact sheet")
    add(
        "--seed",
        type=whole(0, 2**31 - 1),
        default=42,
        metavar="N",
        help="of the clustering and of the sheet (default: 42)",
    )


def run(args: argparse.Namespace) -> None:
    """One retrieval."""
    from timm_faim.retrieval.command import retrieve

    retrieve(args)
