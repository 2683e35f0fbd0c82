"""The additive distance margin on the target class: logit_y = -γ (d_F(x, μ_y) + m), in training only.

Since the logits are -γ d_F, the margin is a subtraction of γ m from the target's logit, so the target need not travel
through the model: :class:`TargetMargin` wraps the criterion, which sees outputs and targets anyway. That works
unchanged under DistributedDataParallel, torch.compile and timm's training tasks
(``ClassificationTask(model, criterion=TargetMargin(criterion, model))``), with hard targets and with Mixup's soft ones.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timm_faim.metric import absolute

from .head import FAIMHead


def subtract_margin(logits: Tensor, target: Tensor, amount: Tensor) -> Tensor:
    """logits [B, C] minus ``amount`` [1] at the target: class indices [B], or soft targets [B, C] as weights.

    With class indices the amount may be one an image, [B]. Negative indices (the ``ignore_index`` of a criterion) are
    left alone.
    """
    amount = amount.to(logits.dtype)
    if target.dim() == logits.dim():
        return logits - amount * target.to(logits.dtype)
    amounts = amount * (target >= 0).to(logits.dtype)
    return logits.scatter_add(-1, target.clamp_min(0).unsqueeze(-1), -amounts.unsqueeze(-1))


def ldam_margins(counts_C: Tensor, margin: float) -> Tensor:
    """``margin`` (n_min / n_k)^(1/4) of each class [C] of n_k images (Cao et al. 2019, LDAM, arXiv:1906.07413)."""
    return margin * (counts_C.min() / counts_C) ** 0.25


def faim_heads(model: nn.Module) -> dict[str, FAIMHead]:
    """The FAIM heads of a model by module name, in module order; empty for a model without one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FAIMHead)}


def gathered(parameter: Tensor) -> Tensor:
    """The parameter, whole where FSDP2 has sharded it; its gradient then is the processes' mean, as FSDP's own are."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    whole = parameter.full_tensor(grad_placements=[Partial()] * parameter.device_mesh.ndim)
    if whole.requires_grad:
        processes = parameter.device_mesh.size()
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


def gathered_gamma(head: FAIMHead) -> Tensor:
    """The head's effective γ [1], whole where it is sharded."""
    return absolute(gathered(head.scale))


class TargetMargin(nn.Module):
    """A criterion(output, target) that first widens the target's distance by each head's ``margin``.

    Args:
        criterion: any classification criterion on (logits, target).
        model: the model in training, wrapped or compiled or not. Its heads are looked up once, so build this after
            ``reset_classifier``. A head's margin counts only while that head is in training mode.
        class_margins: m_k of each class [C] in the place of the heads' own margins; for class indices alone.

    A tuple output of as many logits as there are heads (distilled training) gets each head's own margin. Anything
    else gets the mean of γ m over the heads: exactly what margins inside each head give where the model averages its
    heads (distilled pairs, CrossViT), an approximation where it weighs them otherwise (VOLO, EfficientViM).
    """

    def __init__(self, criterion: nn.Module, model: nn.Module, class_margins: Tensor | None = None) -> None:
        super().__init__()
        self.criterion = criterion
        self.register_buffer("class_margins", class_margins, persistent=False)
        heads = faim_heads(model).values()
        self._heads = [head for head in heads if head.margin > 0 or class_margins is not None]  # a list: no submodules

    def __deepcopy__(self, memo: dict) -> "TargetMargin":
        """A copy for the same heads, or for their copies where the model is copied with it (and before it)."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        nn.Module.__init__(copied)
        copied.criterion = copy.deepcopy(self.criterion, memo)
        copied.register_buffer("class_margins", copy.deepcopy(self.class_margins, memo), persistent=False)
        copied._heads = [memo.get(id(head), head) for head in self._heads]
        return copied.train(self.training)

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of logits [B, C] (or a tuple of them) against class indices [B] or soft targets [B, C]."""
        heads = [head for head in self._heads if head.training]
        if heads:
            amounts = [gathered_gamma(head) * self._margin(head, target) for head in heads]
            mean = torch.stack(amounts).mean(0)
            if isinstance(output, (tuple, list)):
                if len(output) != len(amounts):
                    amounts = [mean] * len(output)
                output = type(output)(subtract_margin(o, target, a) for o, a in zip(output, amounts, strict=True))
            else:
                output = subtract_margin(output, target, mean)
        return self.criterion(output, target)

    def _margin(self, head: FAIMHead, target: Tensor) -> float | Tensor:
        if self.class_margins is None:
            return head.margin
        return self.class_margins.to(target.device)[target.clamp_min(0)]
