"""What a training step computes: mixing, loss, and timm's task around the model, with or without a teacher."""

import argparse
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.loss import create_classification_loss
from timm.models import get_pretrained_cfg, resolve_model_input_args
from timm.task import (
    ClassificationTask,
    DistillationTeacher,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from timm_faim import TargetMargin, faim_heads
from timm_faim.models import may_be_converted
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.training.contrastive import ContrastiveTask
from timm_faim.training.rules import loss_name, mixes_images


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup/cutmix, or None when both are off."""
    if not mixes_images(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        multi_label=args.multi_label,
    )


def build_criterion(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """Training loss of (logits [B, C], target [B] or [B, C]), with the margin of the model's FAIM heads.

    With mixup or cutmix the target must be the soft one of timm's `Mixup`, which holds the smoothing then.

    Args:
        args: the options.
        model: the model in training, or its classifier alone.

    Raises:
        UserError: options that do not go with the loss.
    """
    loss = loss_name(args)
    try:
        criterion = create_classification_loss(
            loss,
            multi_label=args.multi_label,
            smoothing=args.smoothing,
            soft_targets=mixes_images(args),
            pos_weight=args.bce_pos_weight,
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            jsd_splits=args.aug_splits,
        )
    except ValueError as e:
        raise UserError(f"the {loss} loss: {e}") from e
    if args.kd_model_name and args.kd_distill_type == "token":
        model = _main_classifier(model)  # the criterion sees the main head's logits only
    return TargetMargin(criterion, model) if faim_heads(model) else criterion


def build_task(args: argparse.Namespace, model: nn.Module, criterion: nn.Module, device: torch.device) -> TrainingTask:
    """timm's training task: calls as task(images, target) -> {"loss", "output", ...}.

    Its `get_trainable_module()` holds all that learns: with --kd-distill-type feature a projection beside the model.

    Args:
        args: the options.
        model: the student.
        criterion: the loss of `build_criterion`.
        device: where the student is; the teacher is put there.

    Raises:
        UserError: a teacher that is unknown, has no trained classifier, has other classes or does not take the
            student's images; a student without a distillation head.
    """
    dtype = getattr(torch, args.model_dtype or "float32")
    common = {"criterion": criterion, "device": device, "dtype": dtype, "verbose": False}
    if args.multi_label:
        return MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **common)
    if args.contrastive:
        return ContrastiveTask(model, args=args, **common)
    if not args.kd_model_name:
        return ClassificationTask(model, **common)

    student = resolve_data_config(vars(args), model=model)
    channels = student["input_size"][0] if args.input_size else args.in_chans or 3
    input_size = (channels, *student["input_size"][1:])
    teacher = _build_teacher(args, model, input_size, device, dtype)
    common |= {"distill_loss_weight": args.distill_loss_weight, "task_loss_weight": args.task_loss_weight}
    try:
        if args.kd_distill_type == "feature":
            task = FeatureDistillationTask(
                model,
                teacher,
                student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim,
                **common,
            )
        elif args.kd_distill_type == "token":
            task = TokenDistillationTask(
                model, teacher, distill_type=args.kd_token_distill_type, temperature=args.kd_temperature, **common
            )
        else:
            task = LogitDistillationTask(
                model, teacher, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
            )
    except ValueError as e:
        raise UserError(f"--kd-distill-type {args.kd_distill_type}: {' '.join(str(e).split())}") from e
    # timm takes the student's normalisation from its pretrained config, whatever --mean and --std say.
    for key in ("mean", "std"):
        setattr(task, f"student_{key}", _per_channel(student[key], channels).to(device, dtype))
    return task


def _build_teacher(
    args: argparse.Namespace, model: nn.Module, input_size: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> DistillationTeacher:
    """The teacher with its own classes: timm would put a fresh classifier on one with other classes, silently."""
    name = args.kd_model_name
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"unknown --kd-model-name {name!r}.{did_you_mean(name.split('.')[0], timm.list_models())} "
            "A model of your own is local-dir:FOLDER"
        )
    try:
        if ":" not in name and not getattr(get_pretrained_cfg(name), "has_weights", False):
            raise ValueError("timm has no pretrained weights for it.")  # creating it first may take a while
        sized = resolve_model_input_args(name, {"input_size": input_size})
        teacher = timm.create_model(
            name, pretrained=True, **{key: sized[key] for key in ("in_chans", "img_size") if key in sized}
        )
    except Exception as e:  # a download fails in as many ways as there are libraries below
        raise UserError(
            f"cannot open the teacher --kd-model-name {name}: {' '.join(str(e).split())}. It must be a "
            "timm model with pretrained weights, local-dir:FOLDER or hf-hub:NAME"
        ) from e
    teacher = teacher.to(device, dtype).eval().requires_grad_(False)
    if args.kd_distill_type != "feature":
        # λ = 0: the head was converted from the weights' own classifier, and is not fresh
        if faim_heads(teacher) and ":" not in name and not may_be_converted(teacher.faim_cfg):
            raise UserError(
                f"--kd-model-name {name} has pretrained features, but a fresh FAIM head and so no logits "
                "to learn from. Take a trained one, local-dir:FOLDER, or --kd-distill-type feature"
            )
        if teacher.num_classes != model.num_classes:
            raise UserError(
                f"--kd-model-name {name} has {teacher.num_classes} classes, the data {model.num_classes}. "
                "Take a teacher trained on these classes, local-dir:FOLDER, or --kd-distill-type feature"
            )
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, *input_size, device=device, dtype=dtype))
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"--kd-model-name {name} does not take the student's images of "
            f"{'x'.join(map(str, input_size))}: {' '.join(str(e).split())}"
        ) from e
    wrapped = DistillationTeacher(teacher, device=device, dtype=dtype)
    for key in ("mean", "std"):
        setattr(wrapped, f"{key}_kd", _per_channel(teacher.pretrained_cfg[key], input_size[0]).to(device, dtype))
    return wrapped


def _per_channel(values: Any, channels: int) -> torch.Tensor:
    """Mean or standard deviation as [1, channels, 1, 1]."""
    return torch.tensor(adapt_to_chs(tuple(values), channels)).view(1, -1, 1, 1)


def _main_classifier(model: nn.Module) -> nn.Module:
    classifiers = model.get_classifier()
    return classifiers[0] if isinstance(classifiers, (tuple, list, nn.ModuleList)) else classifiers
