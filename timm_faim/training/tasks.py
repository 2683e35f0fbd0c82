"""What a training step computes: timm's task around the model, with or without a teacher."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.data.loader import adapt_to_chs
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

from timm_faim import faim_heads
from timm_faim.models import may_be_converted
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import above, option, real, whole
from timm_faim.training.contrastive import ContrastiveTask
from timm_faim.training.model import build_data_config

if TYPE_CHECKING:
    from timm_faim.training.options import Options


@dataclass
class DistillationOptions:
    """Distillation."""

    kd_model_name: str | None = option(
        "teacher: a pretrained timm name, local-dir:RUN or hf-hub:NAME", metavar="NAME", marks="usual training"
    )
    kd_distill_type: str = option(
        "what is matched: logits, pooled features, or the distillation head of models like DeiT",
        "logit",
        choices=("logit", "feature", "token"),
    )
    kd_loss_type: str = option("loss between logits", "kl", choices=("kl",))
    kd_temperature: float = option("temperature of the softmax", 4.0, above(0, 1000), "T")
    kd_token_distill_type: str = option("target of the distillation head", "soft", choices=("soft", "hard"))
    kd_student_feature_dim: int | None = option("width of the student's features (default: found)", None, whole(1), "D")
    kd_teacher_feature_dim: int | None = option("width of the teacher's features (default: found)", None, whole(1), "D")
    distill_loss_weight: float | None = option(
        "weight of distillation (default: 1, or 1 - the other)", None, real(0, 1e6), "W", marks="training"
    )
    task_loss_weight: float | None = option(
        "weight of the classification loss (default: 1)", None, real(0, 1e6), "W", marks="training"
    )


def build_task(options: "Options", model: nn.Module, criterion: nn.Module, device: torch.device) -> TrainingTask:
    """timm's training task: calls as task(images, target) -> {"loss", "output", ...}.

    Its `get_trainable_module()` holds all that learns: with --kd-distill-type feature a projection beside the model.

    Args:
        options: the options.
        model: the student.
        criterion: the loss of `build_criterion`.
        device: where the student is; the teacher is put there.

    Raises:
        UserError: a teacher that is unknown, has no trained classifier, has other classes or does not take the
            student's images; a student without a distillation head.
    """
    kd = options.distillation
    dtype = getattr(torch, options.device.model_dtype or "float32")
    common = {"criterion": criterion, "device": device, "dtype": dtype, "verbose": False}
    if options.data.multi_label:
        return MultiLabelClassificationTask(model, threshold=options.data.multilabel_threshold, **common)
    if options.contrastive.contrastive:
        return ContrastiveTask(model, options=options.contrastive, **common)
    if not kd.kd_model_name:
        return ClassificationTask(model, **common)

    student = build_data_config(options.input, model)
    teacher = _build_teacher(kd, model, student["input_size"], device, dtype)
    common |= {"distill_loss_weight": kd.distill_loss_weight, "task_loss_weight": kd.task_loss_weight}
    try:
        if kd.kd_distill_type == "feature":
            task = FeatureDistillationTask(
                model,
                teacher,
                student_feature_dim=kd.kd_student_feature_dim,
                teacher_feature_dim=kd.kd_teacher_feature_dim,
                **common,
            )
        elif kd.kd_distill_type == "token":
            task = TokenDistillationTask(
                model, teacher, distill_type=kd.kd_token_distill_type, temperature=kd.kd_temperature, **common
            )
        else:
            task = LogitDistillationTask(
                model, teacher, loss_type=kd.kd_loss_type, temperature=kd.kd_temperature, **common
            )
    except ValueError as e:
        raise UserError(f"--kd-distill-type {kd.kd_distill_type}: {' '.join(str(e).split())}") from e
    # timm takes the student's normalisation from its pretrained config, whatever --mean and --std say.
    for key in ("mean", "std"):
        setattr(task, f"student_{key}", _per_channel(student[key], student["input_size"][0]).to(device, dtype))
    return task


def _build_teacher(
    options: DistillationOptions,
    model: nn.Module,
    input_size: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> DistillationTeacher:
    """The teacher with its own classes: timm would put a fresh classifier on one with other classes, silently."""
    name = options.kd_model_name
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
    if options.kd_distill_type != "feature":
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
