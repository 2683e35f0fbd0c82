"""What a run tells: summary.csv, learning_curve.png and one line an epoch."""
import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import update_summary

from timm_faim import faim_heads
from timm_faim.training.args import as_recipe
from timm_faim.training.files import atomic_write


def save_args(args: argparse.Namespace, path: Path) -> None:
    """Write the options as a recipe: `--config args.yaml` with another --experiment repeats the run."""
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(as_recipe(args), sort_keys=False), encoding="utf-8")


def head_metrics(model: torch.nn.Module) -> dict[str, float]:
    """λ and γ of every FAIM head, by column name."""
    heads = faim_heads(model)
    metrics = {}
    for name, head in heads.items():
        suffix = f"_{name}" if len(heads) > 1 else ""
        metrics[f"lambda{suffix}"] = round(abs(head.metric.lmbda.item()), 5)  # effective: the sign has no effect
        metrics[f"gamma{suffix}"] = round(abs(head.scale.item()), 4)
    return metrics


def append_summary(path: Path, epoch: int, train: dict[str, Any], val: dict[str, Any], lr: float) -> None:
    """Add one epoch to summary.csv with timm's `update_summary`."""
    with atomic_write(path) as temporary:
        if path.exists():
            shutil.copyfile(path, temporary)
        update_summary(epoch, train, val, temporary, lr=lr)


def draw_learning_curve(path: Path, history: list[dict[str, float]]) -> bool:
    """Draw loss and accuracy over the epochs; False when matplotlib is missing.

    Args:
        path: PNG file.
        history: per epoch `train_loss`, `eval_loss`, `train_top1`, `eval_top1`.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # without pyplot: no window system, nothing to close

    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy in %"), strict=True):
        for part, name in (("train", "training (augmented)"), ("eval", "validation")):
            axes.plot(epochs, [row[f"{part}_{key}"] for row in history], marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def epoch_line(epoch: int, epochs: int, train: dict[str, Any], val: dict[str, Any], is_best: bool) -> str:
    """One line for a person."""
    return (f"epoch {epoch + 1:3d}/{epochs}: training loss {train['loss']:.3f}, top-1 {train['top1']:5.1f} %"
            f" | validation loss {val['loss']:.3f}, top-1 {val['top1']:5.1f} %, top-5 {val['top5']:5.1f} %"
            f" of {val['samples']} images | {train['images_per_s']:.0f} images/s, {train['seconds']:.1f} s"
            f"{'  *' if is_best else ''}")
