"""What a file computes: a model with its heads folded, from pixels or from normalised images, to one output.

Shapes: B images, c channels, H and W of the model's input, C classes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_faim import FAIMHead, FoldedHead, faim_heads
from timm_faim.models.moments import NAME as MOMENTS

UNFOLDED = "an unfolded Randers head"


class Program(nn.Module):
    """Images to one output in float32.

    Args:
        model: in eval mode; copied, its heads folded.
        data_config: its preprocessing, of timm's ``resolve_model_data_config``.
        preprocessing: takes bytes [B, H, W, c] and normalises them; else float32 [B, c, H, W], normalised.
        output: ``"logits"`` or ``"probabilities"``.
        half: the model in float16, and the matrices of folded heads stored in it; their arithmetic is in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        data_config: Mapping[str, Any],
        *,
        preprocessing: bool = False,
        output: str = "logits",
        half: bool = False,
    ) -> None:
        super().__init__()
        self.size = tuple(data_config["input_size"])
        self.preprocessing, self.output = preprocessing, output
        self.model, self.notes = fold_heads(model, half=half)
        self.float_scopes = [f"model.{name}" for name in [*faim_heads(model), MOMENTS]]
        self.dtype = torch.float16 if half else torch.float32
        for name in ("mean", "std"):
            self.register_buffer(name, per_channel(data_config[name], self.size[0]), persistent=False)
        self.eval().requires_grad_(False)

    def example(self, count: int = 2) -> Tensor:
        """Images as the program takes them."""
        c, H, W = self.size
        if self.preprocessing:
            return torch.arange(count * H * W * c).remainder(251).to(torch.uint8).reshape(count, H, W, c)
        return torch.linspace(-2.0, 2.0, count * H * W * c).reshape(count, c, H, W)

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocessing:
            images = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
        out = self.model(images.to(self.dtype)).float()
        return out.softmax(-1) if self.output == "probabilities" else out


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """The preprocessing of a model in plain types: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    config = resolve_model_data_config(model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def per_channel(values: list[float], channels: int) -> Tensor:
    """Mean or standard deviation of pixels in 0..1 as a tensor [1, c, 1, 1] for bytes."""
    values = list(values)
    values = values * channels if len(values) == 1 else values
    return 255.0 * torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)


def normalised(pixels: Tensor, data_config: Mapping[str, Any]) -> Tensor:
    """Bytes [B, H, W, c] as the model takes them, float32 [B, c, H, W]."""
    mean, std = (per_channel(data_config[name], pixels.shape[-1]) for name in ("mean", "std"))
    return (pixels.permute(0, 3, 1, 2).float() - mean) / std


def pixels_of(images: Tensor, data_config: Mapping[str, Any]) -> Tensor:
    """The bytes [B, H, W, c] that normalised images [B, c, H, W] were made of, exactly."""
    mean, std = (per_channel(data_config[name], images.shape[1]) for name in ("mean", "std"))
    return (images.float() * std + mean).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def fold_heads(model: nn.Module, *, half: bool = False) -> tuple[nn.Module, list[str]]:
    """A copy of a model on the CPU in eval mode, with a FoldedHead in the place of each FAIM head that folds.

    Args:
        model: with FAIM heads or without.
        half: the rest of the model in float16, as :class:`Program` says.

    Returns:
        The copy, and what is to say about it: heads with a 1-form, and flat ones, stay as they are.
    """
    model = copy.deepcopy(model).cpu().eval()
    heads, notes = faim_heads(model), []
    folded: dict[str, FoldedHead] = {}
    for name, head in heads.items():
        if head.cosine:
            folded[name] = _folded(head)
        else:
            kind = UNFOLDED if not head.metric.symmetric else f"an unfolded head: {head.kind}"
            notes.append(f"{kind} ({name})")
    model = model.half() if half else model.float()
    for name, head in folded.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, head.store_matrices(torch.float16) if half else head)
    return model, notes


def _folded(head: FAIMHead) -> FoldedHead:
    folded = FoldedHead(head.float())
    for hook in head._forward_pre_hooks.values():  # that puts second moments beside the features
        folded.register_forward_pre_hook(hook)
    return folded.eval()
