"""Contrastive losses beside the classification loss, under the metric of the model's head: --contrastive.

The features that go into the head are compared with the features of all processes, and no parameter is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import ClassificationTask
from torch import nn

from timm_faim import FAIMHead, FAIMInfoNCELoss, FAIMNPairLoss, FAIMTripletLoss, faim_heads
from timm_faim.head.tap import Tap, pooled
from timm_faim.losses.base import FAIMLoss
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import above, option, whole

LOSSES = ("infonce", "supcon", "triplet", "npair")


@dataclass
class ContrastiveOptions:
    """Contrastive losses under the head's metric."""

    contrastive: list[str] | None = option(
        "add losses on the features: infonce, supcon, triplet, npair, for example infonce:0.1",
        metavar="NAME:WEIGHT",
        nargs="*",
        marks="usual faim training",
    )
    views: int = option("augmented views of each image in a batch", 1, whole(1, 64), "N", marks="training")
    samples_per_class: int = option(
        "batches of K images each of --batch-size/K classes; 1: classes equally often, as in cRT's second stage",
        0,
        whole(0),
        "K",
        marks="training",
    )
    contrastive_temperature: float = option(
        "temperature of infonce, supcon and npair", 0.1, above(0, 1000), "T", marks="faim"
    )
    contrastive_margin: float = option(
        "margin of triplet, in units of the distance", 0.2, above(0, 1000), "M", marks="faim"
    )


def parse_losses(words: Sequence[str]) -> dict[str, float]:
    """Weights of the losses of `--contrastive NAME:WEIGHT ...`; a name alone has the weight 1.

    Raises:
        UserError: an unknown loss, a weight that is no positive number, a loss given twice.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, _, number = word.partition(":")
        if name not in LOSSES:
            raise UserError(
                f"unknown loss in --contrastive {word}.{did_you_mean(name, LOSSES)} There are "
                f"{', '.join(LOSSES)}, with a weight as in infonce:0.1"
            )
        try:
            weights[name], given = float(number or 1), name in weights
        except ValueError:
            raise UserError(f"--contrastive {word}: {number!r} is no number. Give a weight as in infonce:0.1") from None
        if given or not 0 < weights[name] < float("inf"):
            raise UserError(
                f"--contrastive {word}: "
                + ("the loss is given twice" if given else "the weight must be a finite number above 0")
            )
    return weights


def build_loss(name: str, options: ContrastiveOptions, head: FAIMHead) -> FAIMLoss:
    """A loss by its name in --contrastive, between the points that the head makes of features."""
    common = {"metric": head, "cross_rank": True, "check_finite": False}
    if name == "triplet":
        return FAIMTripletLoss(margin=options.contrastive_margin, **common)
    if name == "npair":
        return FAIMNPairLoss(temperature=options.contrastive_temperature, **common)
    form = "supcon" if name == "supcon" else "ntxent"
    return FAIMInfoNCELoss(temperature=options.contrastive_temperature, form=form, **common)


class ContrastiveTask(ClassificationTask):
    """timm's classification task with contrastive losses on the inputs of the model's FAIM head.

    Args:
        model: a model with one FAIM head.
        criterion: classification loss.
        options: --contrastive and its options.
        **task: options of `ClassificationTask`.

    Raises:
        UserError: a model without a FAIM head, or with several.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, options: ContrastiveOptions, **task: Any) -> None:
        super().__init__(model, criterion, **task)
        heads = list(faim_heads(model).values())
        if len(heads) != 1:
            name = getattr(model, "pretrained_cfg", {}).get("architecture", "this model")
            raise UserError(
                f"--contrastive compares the features of one FAIM head, and {name} has {len(heads)}. "
                "Leave it out, or choose another model"
            )
        self.weights = parse_losses(options.contrastive)
        self.contrastive = nn.ModuleDict({name: build_loss(name, options, heads[0]) for name in self.weights})
        self._head = (heads[0],)  # in a tuple: the model owns it
        self._tap = Tap({"head": heads[0]})

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the single losses in `parts`."""
        return ("class_loss", *(f"{name}_loss" for name in self.weights))

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Losses of images [B, channels, H, W] and classes [B]: timm's dictionary, with each loss in `parts`."""
        with self._tap:
            result = super().forward(input, target)
        features = self._take_features()
        parts = {"class_loss": result["loss"]}
        for name, loss in self.contrastive.items():
            parts[f"{name}_loss"] = loss(features, target)
            result["loss"] = result["loss"] + self.weights[name] * parts[f"{name}_loss"]
        return result | {"parts": parts}

    def _take_features(self) -> torch.Tensor:
        """The features [B, D] of the forward pass just made, averaged over places and tokens."""
        features = self._tap.take().get("head")
        if features is None:
            raise UserError(
                "--contrastive needs the input of the FAIM head, which this model does not call. Choose another model"
            )
        return pooled(features, self._head[0].in_features)


class Views:
    """An image transform that gives several augmented views of an image, as a tuple: timm collates them one after
    another, [view 1 of all images, view 2 of all images, ...]."""

    def __init__(self, transform: Any, count: int) -> None:
        self.transform, self.count = transform, count

    def __call__(self, image: Any) -> tuple[Any, ...]:
        return tuple(self.transform(image) for _ in range(self.count))
