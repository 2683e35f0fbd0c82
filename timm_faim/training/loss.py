"""The classification loss, and the mixing of images that gives it soft targets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from timm.data import Mixup
from timm.loss import create_classification_loss
from torch import Tensor, nn

from timm_faim import TargetMargin, faim_heads
from timm_faim.head.margin import ldam_margins
from timm_faim.images.splits import DataOptions
from timm_faim.run.errors import UserError
from timm_faim.run.options import SHARE, Number, above, flag, option, real, whole
from timm_faim.training.rare_classes import RareClassLoss

if TYPE_CHECKING:
    from timm_faim.training.options import Options


@dataclass
class MixingOptions:
    """Mixing images."""

    mixup: float = option("mixup", 0.0, real(0, 1000), "ALPHA", marks="usual training")
    cutmix: float = option("cutmix", 0.0, real(0, 1000), "ALPHA", marks="training")
    cutmix_minmax: list[float] | None = option(
        "MIN MAX side of the pasted part; turns cutmix on", None, SHARE, "F", nargs="*", marks="training"
    )
    mixup_prob: float = option("probability of mixup or cutmix", 1.0, SHARE, "P")
    mixup_switch_prob: float = option("probability of cutmix where both are on", 0.5, SHARE, "P")
    mixup_mode: str = option("what shares one mixing ratio", "batch", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = option("no mixing after N epochs; 0: never off", 0, whole(0), "N", marks="training")


@dataclass
class LossOptions:
    """Loss."""

    smoothing: float | None = option(
        "label smoothing (default: 0.1; 0 with --multi-label)",
        None,
        Number(float, 0, 1, below=True),
        "S",
        marks="usual",
    )
    loss: str | None = option(
        "timm's losses (default: ce; bce with --multi-label)",
        choices=("ce", "bce", "asl", "poly", "jsd", "twoway", "zlpr"),
    )
    bce_loss: bool = flag("the same as --loss bce")
    bce_sum: bool = flag("sum the bce loss over the classes")
    bce_target_thresh: float | None = option("soft targets above P are 1 in the bce loss, others 0", None, SHARE, "P")
    bce_pos_weight: float | None = option("weight of the positives in the bce loss", None, above(0, 1e6), "W")
    jsd_loss: bool = flag("the same as --loss jsd; needs --aug-splits", marks="training")


def mixes_images(options: MixingOptions) -> bool:
    """Whether mixup or cutmix is on, so that targets are soft."""
    return bool(options.mixup or options.cutmix or options.cutmix_minmax)


def loss_name(options: LossOptions, data: DataOptions) -> str:
    """The loss by timm's name, whichever flag chose it."""
    return options.loss or (
        "bce" if options.bce_loss or data.multi_label and not options.jsd_loss else "jsd" if options.jsd_loss else "ce"
    )


def build_mixup(mixing: MixingOptions, loss: LossOptions, data: DataOptions, num_classes: int) -> Mixup | None:
    """timm's mixup/cutmix, or None when both are off."""
    if not mixes_images(mixing):
        return None
    return Mixup(
        mixup_alpha=mixing.mixup,
        cutmix_alpha=mixing.cutmix,
        cutmix_minmax=mixing.cutmix_minmax,
        prob=mixing.mixup_prob,
        switch_prob=mixing.mixup_switch_prob,
        mode=mixing.mixup_mode,
        label_smoothing=loss.smoothing,
        num_classes=num_classes,
        multi_label=data.multi_label,
    )


def build_criterion(options: "Options", model: nn.Module, counts_C: Tensor | None = None) -> nn.Module:
    """Training loss of (logits [B, C], target [B] or [B, C]), with the margin of the model's FAIM heads.

    With mixup or cutmix the target must be the soft one of timm's `Mixup`, which holds the smoothing then.

    Args:
        options: the options.
        model: the model in training, or its classifier alone.
        counts_C: training images of each class, for --logit-adjust and --ldam.

    Raises:
        UserError: options that do not go with the loss.
    """
    loss, of_loss = loss_name(options.loss, options.data), options.loss
    try:
        criterion = create_classification_loss(
            loss,
            multi_label=options.data.multi_label,
            smoothing=of_loss.smoothing,
            soft_targets=mixes_images(options.mixing),
            pos_weight=of_loss.bce_pos_weight,
            bce_target_thresh=of_loss.bce_target_thresh,
            bce_sum=of_loss.bce_sum,
            jsd_splits=options.augmentation.aug_splits,
        )
    except ValueError as e:
        raise UserError(f"the {loss} loss: {e}") from e
    if options.distillation.kd_model_name and options.distillation.kd_distill_type == "token":
        model = _main_classifier(model)  # the criterion sees the main head's logits only
    rare, has_faim = options.rare_classes, bool(faim_heads(model))
    if counts_C is not None:
        criterion = RareClassLoss(criterion, counts_C, rare.logit_adjust, 0.0 if has_faim else rare.ldam)
    if not has_faim:
        return criterion
    return TargetMargin(criterion, model, ldam_margins(counts_C, rare.ldam) if rare.ldam else None)


def _main_classifier(model: nn.Module) -> nn.Module:
    classifiers = model.get_classifier()
    return classifiers[0] if isinstance(classifiers, (tuple, list, nn.ModuleList)) else classifiers
