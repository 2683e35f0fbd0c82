"""What of a run concerns more than one part of it."""

import argparse
from dataclasses import dataclass

from timm_faim.run.options import SHARE, flag, option, whole


@dataclass
class RunOptions:
    """Run."""

    batch_size: int = option("images per process and step", 128, whole(1), "N", alias="-b", marks="usual")
    validation_batch_size: int | None = option(
        "the same in validation", None, whole(1), "N", alias="-vb", marks="runtime"
    )
    model_ema: bool = flag("average the weights; the average is evaluated and saved", marks="training")
    model_ema_decay: float = option("decay of the average", 0.9998, SHARE)
    model_ema_warmup: bool = flag("raise the decay over the first updates")
    seed: int = option(
        "random seed; each sample draws from its place in the run", 42, whole(0, 2**31 - 1), marks="usual"
    )
    output: str = option("folder of runs", "./output", metavar="DIR", marks="usual runtime")
    experiment: str = option(
        "folder of this run (default: time, model and size)", "", metavar="NAME", marks="usual runtime"
    )
    val_interval: int = option("epochs between validations", 1, whole(1), "N")
    val_flip: bool = flag("average the logits of each validation image and its mirror image, in twice the time")
    eval_metric: str | None = option(
        "what makes an epoch the best: top1, top5 or loss, or with --multi-label map, "
        "micro_f1, macro_f1, sample_f1 or loss (default: top1, map, or loss without validation)",
        metavar="NAME",
    )
    eval_only: bool = flag("evaluate on the validation data, do not train", marks="usual launch")
    dry_run: bool = flag("try two updates and a validation batch, and tell what the run would do", marks="usual launch")


def run_words(args: argparse.Namespace) -> list[str]:
    """Options that commands in front of the training have too, as the training takes them."""
    words = []
    for name in ("img_size", "crop_pct", "crop_mode", "class_map", "batch_size", "workers", "output", "experiment"):
        value = getattr(args, name)
        words += [] if value in (None, "") else [f"--{name.replace('_', '-')}", str(value)]
    return words + ["--skip-unreadable"] * args.skip_unreadable + ["--amp", "--amp-dtype", "bfloat16"] * args.amp
