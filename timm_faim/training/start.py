"""What a run keeps of the weights that it starts from: --l2-sp and --wise-ft, for every model alike."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from timm_faim.run.errors import UserError
from timm_faim.run.files import atomic_write
from timm_faim.run.options import AUTO, above, option, real
from timm_faim.run.weights import whole_tensors
from timm_faim.training.checkpoints import FOLDER

FILE = f"{FOLDER}/start.safetensors"
AUTO_SHARES = (1.0, 0.75, 0.5, 0.25)  # of equally good ones the first


def share_or_auto(text: str) -> float | str:
    """The type of --wise-ft."""
    try:
        return text if text == AUTO else above(0, 1)(text)
    except ArgumentTypeError as e:
        raise ArgumentTypeError(str(e).replace("must be", f"must be {AUTO} or", 1)) from None


@dataclass
class StartOptions:
    """Staying near the pretrained weights."""

    l2_sp: float = option(
        "at the full learning rate an update pulls the backbone towards its start by this share of the way, instead of "
        "decaying its weights; 0: not",
        0.0,
        real(0, 1),
        "SHARE",
        marks="training",
    )
    wise_ft: float | str | None = option(
        "after the last epoch average the weights, A of the end and 1 - A of the start, A > 0 and at most 1; auto: the "
        "best of 0.25, 0.5, 0.75 and 1 on the validation images",
        None,
        share_or_auto,
        "A",
        marks="usual training",
    )

    @property
    def shares(self) -> tuple[float, ...]:
        """Shares of the end to try after the last epoch; none where the end stays as it is."""
        if self.wise_ft == AUTO:
            return AUTO_SHARES
        return () if self.wise_ft in (None, 1.0) else (self.wise_ft,)

    @property
    def flags(self) -> list[str]:
        """Those that are given."""
        return [flag for flag, on in (("--l2-sp", self.l2_sp), ("--wise-ft", self.shares)) if on]


class StartWeights:
    """Copies of the floating-point tensors of a model, by name, taken when they are those to keep near.

    Args:
        model: bare, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = floating(model)

    def keep_in(self, run_folder: Path, is_resumed: bool, is_main: bool) -> None:
        """Take those of the run that is resumed, where its folder has them; keep these there otherwise.

        Raises:
            UserError: the file is damaged or of another model.
        """
        file = run_folder / FILE
        if not (is_resumed and file.exists()):
            if is_main:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as temporary:
                    save_file(whole_tensors(self.tensors), temporary)
            return
        try:
            stored = load_file(file)
            for name, tensor in self.tensors.items():
                tensor.copy_(stored[name])
        except (SafetensorError, KeyError, RuntimeError) as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(
                f"{file} does not hold the start of this run: {reason}. Remove it to take the weights of --model again"
            ) from e


class Pull:
    """L2-SP (Li et al. 2018, arXiv:1802.01483), apart from the gradient as AdamW's decay is: w ← w - s (w - w_start)
    after each update, of the backbone; s follows the schedule and is `share` at the full learning rate.

    Args:
        share: of the way that is taken back.
        optimizer: prepared, its groups split into parts; the decay of the backbone's weights is taken out.
        model: bare; its parameters are those of the optimiser.
        start: of the model.
    """

    def __init__(self, share: float, optimizer: Any, model: nn.Module, start: StartWeights) -> None:
        self.share = share
        self.anchors = {id(p): start.tensors[name] for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            if group["part"] == "backbone":
                group["weight_decay"] = 0.0

    @torch.no_grad()
    def step(self, optimizer: Any) -> None:
        """Pull once, by the learning rates that the update had."""
        for group in optimizer.param_groups:  # loading a checkpoint makes new ones
            full = group["initial_lr"] * group["lr_scale"]
            if group["part"] == "backbone" and full:
                anchors = [self.anchors[id(p)] for p in group["params"]]
                torch._foreach_lerp_(group["params"], anchors, min(1.0, self.share * group["lr"] / full))


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's floating-point tensors by name."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}


@torch.no_grad()
def set_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Overwrite tensors of a model by name; others stay."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)


def averaged(start: dict[str, Tensor], end: dict[str, Tensor], share: float, as_trained: set[str]) -> dict[str, Tensor]:
    """``share`` of the end, the rest of the start, statistics of batch norms alike (WiSE-FT, Wortsman et al. 2022,
    arXiv:2109.01903).

    Args:
        start, end: tensors by name.
        share: in [0, 1]; 1 is exactly the end.
        as_trained: names that are taken from the end.
    """
    return {
        name: tensor if name in as_trained else torch.lerp(start[name].to(tensor), tensor, share)
        for name, tensor in end.items()
    }
