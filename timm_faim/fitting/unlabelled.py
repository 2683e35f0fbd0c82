"""Images without labels in a fit: which of them count, their features, and the head that follows them.

Shapes: N held-out and U unlabelled images, C classes, D features.
"""

import argparse
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor, nn
from torch.utils.data import Dataset

from timm_faim import FAIMHead
from timm_faim.adapt import ASSUMPTION, REJECTED, Check, adapt_, evidence
from timm_faim.calibration import Calibration, calibrate
from timm_faim.fitting.extract import extract, only_head
from timm_faim.fitting.heads import held_out_logits, logits_of, points_of
from timm_faim.fitting.store import Features, place
from timm_faim.images.checked import reader_of
from timm_faim.images.files import images_of, list_images
from timm_faim.images.pixels import mode_of
from timm_faim.models.checkpoint import sha256
from timm_faim.recipe import Plan
from timm_faim.run.errors import UserError
from timm_faim.training.data import build_clean_loader
from timm_faim.training.options import Options


@contextmanager
def unlabelled_store(
    args: argparse.Namespace,
    options: Options,
    model: nn.Module,
    data_config: dict[str, Any],
    labelled: Mapping[str, Dataset],
    accelerator: Accelerator,
) -> Iterator[Path | None]:
    """The store with features of the images in --unlabelled, but for the labelled ones, as the split "unlabelled"; None
    without the option. A collective call.

    Raises:
        UserError: no such folder, no images in it but labelled ones, a head that cannot follow them.
    """
    if args.unlabelled is None:
        if args.proportions != "free":
            raise UserError(f"--proportions {args.proportions} is of unlabelled images. Give --unlabelled DIR, too")
        yield None
        return
    if not only_head(model).cosine:
        raise UserError("--unlabelled needs a head whose distance is that of cosines. Leave space, lambda_init and "
                        "learn_metric out of --faim-cfg, or leave --unlabelled out")  # fmt: skip
    if not args.unlabelled.is_dir():
        raise UserError(f"--unlabelled {args.unlabelled} is no folder. Give one with images")
    found = [path for path in list_images([str(args.unlabelled)]) if os.path.isfile(path)]
    paths = without(found, _files(labelled.values()))
    if not paths:
        raise UserError(f"all {len(found)} images in --unlabelled {args.unlabelled} are labelled images of this fit. "
                        "Give a folder with others")  # fmt: skip
    images = images_of(paths, mode_of(data_config["input_size"][0]))
    loader = build_clean_loader(options, images, data_config, accelerator)
    settings = data_config | {"amp": args.amp, "model": [model.pretrained_cfg.get("architecture"), model._model_args]}
    with place(args, model, settings, paths) as folder:
        folder = Path(broadcast_object_list([str(folder)])[0])
        extract(model, {"unlabelled": loader}, folder, accelerator)
        if accelerator.is_main_process:
            out = f"; {len(found) - len(paths)} labelled ones are left out" if len(paths) < len(found) else ""
            print(f"{len(paths)} unlabelled images{out}. This {ASSUMPTION}")
        yield folder


def _files(datasets: Iterable[Dataset]) -> list[str]:
    readers = [reader_of(dataset) for dataset in datasets]
    return [path for r in readers if isinstance(r, ReaderImageFolder) for path, _ in r.samples]


def without(paths: Iterable[str], others: Iterable[str]) -> list[str]:
    """The files that are none of the others, nor copies of them byte for byte; only those of one size are read."""
    by_size: dict[int, set[str]] = {}
    for other in others:
        by_size.setdefault(os.stat(other).st_size, set()).add(os.path.realpath(other))
    digests: dict[int, set[str]] = {}
    left = []
    for path in paths:
        size = os.stat(path).st_size
        if size in by_size:
            if os.path.realpath(path) in by_size[size]:
                continue
            if size not in digests:
                digests[size] = {sha256(Path(other)) for other in by_size[size]}
            if sha256(Path(path)) in digests[size]:
                continue
        left.append(path)
    return left


@dataclass(frozen=True)
class Follow:
    """Moves a fitted head towards unlabelled images, as the calibration of the head without them says."""

    train: Features
    unlabelled: Features
    calibration: Calibration
    proportions: str = "free"

    def __call__(self, head: FAIMHead, chosen: np.ndarray | None = None) -> int:
        """Change a head in place that is fitted to the chosen training images; how many unlabelled images are used."""
        s_C = torch.zeros(head.num_classes, device=head.mu.device)
        for x, target in self.train.blocks(chosen):
            s_C += evidence(head, head.embed(x.to(head.mu.device)), target)
        shares = None
        if self.proportions == "training":
            target = self.train.target if chosen is None else self.train.target[chosen]
            shares = torch.from_numpy(np.bincount(target, minlength=head.num_classes)).float().clamp_min(0.5)
        return adapt_(
            head,
            s_C,
            points_of(head, self.unlabelled),
            temperature=self.calibration.temperature,
            least=self.calibration.reject[REJECTED],
            proportions=shares,
        )


def follow_unlabelled(
    head: FAIMHead,
    features: Mapping[str, Features],
    args: argparse.Namespace,
    plan: Plan,
    fold: np.ndarray | None,
    logits: Tensor,
    target: Tensor,
    log: Callable,
) -> tuple[Tensor, dict[str, Any]]:
    """Move the head in place if held-out images do not speak against it; their logits [N, C] after, and what is put on
    record.

    Args:
        head: fitted to all training images.
        features: of "train", "unlabelled" and perhaps "val".
        args: of `timm-faim fit`.
        plan: that the head is fitted by.
        fold: of the training images that are held out; None: the validation images are.
        logits, target: of the held-out images without the unlabelled ones; N may be 0.
        log: print.

    Raises:
        UserError: no unlabelled image can be read.
    """
    train, unlabelled = features["train"], features["unlabelled"]
    record: dict[str, Any] = {"images": len(unlabelled), "proportions": args.proportions, "kept": False}
    if not len(unlabelled):
        raise UserError(f"no image in --unlabelled {args.unlabelled} can be read. Repair them, or leave it out")
    if not len(target):
        log("unlabelled images: not used, as no image can be held out to check them by. Give two images of a class")
        return logits, record
    source = "validation" if fold is None else "cross-fitted training images"
    follow = Follow(train, unlabelled, calibrate(logits, target, source), args.proportions)
    adapted = copy.deepcopy(head)
    used = follow(adapted)
    record["used"] = used
    if not used:
        log(f"unlabelled images: none of the {len(unlabelled)} looks like one of the classes, not kept")
        return logits, record
    if fold is None:
        after = logits_of(adapted, features["val"])
    else:
        after, _ = held_out_logits(head, train, plan, fold, follow)
    check = Check.of(logits, after, target)
    log(f"{check.line()}; {used} of {len(unlabelled)} look like one of the classes and are used")
    if check.kept:
        head.mu.data.copy_(adapted.mu)
    return (after if check.kept else logits), record | {"kept": check.kept, "check": check.to_json()}
