"""Losses for classes of unequal size: the logits that the loss sees move by class, those of the model do not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_faim.head.margin import ldam_margins, subtract_margin
from timm_faim.images.datasets import TrainingData, targets_of
from timm_faim.run.errors import UserError
from timm_faim.run.options import option, real


@dataclass
class RareClassOptions:
    """Classes of unequal size."""

    logit_adjust: float = option(
        "add TAU times the log share of each class to the logits in the loss; 1 is balanced softmax",
        0.0,
        real(0, 10),
        "TAU",
        marks="training",
    )
    ldam: float = option(
        "margin at the target: MARGIN for the rarest class, less by the fourth root of the images for others; of a "
        "FAIM head in units of the distance, in the place of its own, else of logits",
        0.0,
        real(0, 100),
        "MARGIN",
        marks="training",
    )


def asked(options: RareClassOptions) -> list[str]:
    """The flags that are on."""
    return [flag for flag, on in (("--logit-adjust", options.logit_adjust), ("--ldam", options.ldam)) if on]


def class_counts(options: RareClassOptions, data: TrainingData) -> Tensor | None:
    """Training images of each class [C], at least 1, where a loss asks for them.

    Raises:
        UserError: data that do not tell their classes without being read.
    """
    if not asked(options):
        return None
    targets = targets_of(data.train)
    if targets is None:
        raise UserError(
            f"{asked(options)[0]} needs to know how many images each class has, which these data do not tell. Leave it "
            "out, or give the images as class folders"
        )
    return torch.bincount(torch.tensor(targets), minlength=data.num_classes).clamp_min(1)


class RareClassLoss(nn.Module):
    """A criterion on logits + τ log π - m_y, π the shares of the classes in training.

    Logit adjustment (Menon et al. 2021, arXiv:2007.07314); with τ = 1 it is balanced softmax (Ren et al. 2020,
    arXiv:2007.10740). The margin is LDAM's (Cao et al. 2019, arXiv:1906.07413) of a model without FAIM heads.

    Args:
        criterion: takes (logits [B, C], class indices [B]), and what it takes else is passed on.
        counts_C: training images of each class.
        tau: τ >= 0.
        margin: of the rarest class, in logits.
    """

    def __init__(self, criterion: nn.Module, counts_C: Tensor, tau: float, margin: float = 0.0) -> None:
        super().__init__()
        self.criterion = criterion
        self.register_buffer("moved_C", tau * (counts_C / counts_C.sum()).log(), persistent=False)
        self.register_buffer("margins_C", ldam_margins(counts_C, margin), persistent=False)

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of logits [B, C], or a tuple of them, against class indices [B]."""
        if isinstance(output, (tuple, list)):
            return self.criterion(type(output)(self._moved(each, target) for each in output), target)
        return self.criterion(self._moved(output, target), target)

    def _moved(self, logits: Tensor, target: Tensor) -> Tensor:
        margins_B = self.margins_C.to(logits.device)[target.clamp_min(0)]
        return subtract_margin(logits + self.moved_C.to(logits), target, margins_B)
