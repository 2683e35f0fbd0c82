"""Open FAIM checkpoints: the backbone through timm's own loader and filters, the heads by their own keys."""

import logging
from pathlib import Path
from typing import Any, Optional, Union

from timm.models import PretrainedCfg, load_state_dict, load_state_dict_from_hf
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

from timm_faim.head import faim_heads

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]


def read_faim_state_dict(
    pretrained_cfg: Union[None, str, dict[str, Any], PretrainedCfg], cache_dir: Union[None, str, Path] = None
) -> Optional[StateDict]:
    """The weights that a pretrained_cfg points at if they hold FAIM heads; None for a timm tag or a plain backbone."""
    if isinstance(pretrained_cfg, PretrainedCfg):
        pretrained_cfg = pretrained_cfg.to_dict()
    if not isinstance(pretrained_cfg, dict):
        return None
    file = pretrained_cfg.get("file")
    if pretrained_cfg.get("state_dict"):
        state_dict = pretrained_cfg["state_dict"]
    elif pretrained_cfg.get("source") == "local-dir":
        state_dict = load_state_dict_from_path(file)
    elif pretrained_cfg.get("source") == "hf-hub":
        state_dict = load_state_dict_from_hf(pretrained_cfg["hf_hub_id"], cache_dir=cache_dir)
    elif file and str(file).endswith(".safetensors"):
        state_dict = load_state_dict(str(file))
    else:
        return None
    return state_dict if _head_names(state_dict) else None


def split_heads(state_dict: StateDict) -> tuple[StateDict, dict[str, StateDict]]:
    """Backbone entries, and per head name its entries without the prefix."""
    heads: dict[str, StateDict] = {name: {} for name in _head_names(state_dict)}
    backbone = {}
    for key, value in state_dict.items():
        owner = next((name for name in heads if key.startswith(f"{name}.")), None)
        if owner is None:
            backbone[key] = value
        else:
            heads[owner][key[len(owner) + 1 :]] = value
    return backbone, heads


def check_backbone(model: nn.Module, backbone: StateDict) -> None:
    """Refuse a checkpoint that leaves backbone parameters unset (timm's non-strict load only logs them).

    Raises:
        RuntimeError: names the first missing parameters.
    """
    head_names = tuple(f"{name}." for name in faim_heads(model))
    missing = [k for k in model.state_dict() if k not in backbone and not k.startswith(head_names or ("\0",))]
    if missing:
        raise RuntimeError(
            f"the FAIM checkpoint lacks {len(missing)} parameters of the model ({', '.join(missing[:3])}, …); "
            "create the model with the arguments it was trained with"
        )


def load_heads(model: nn.Module, heads: dict[str, StateDict]) -> None:
    """Load head weights where the number of classes agrees; otherwise the head stays fresh, with one log line.

    Raises:
        RuntimeError: the same number of classes but other parameters or shapes, e.g. another ``full_sigma``.
    """
    for name, head in faim_heads(model).items():
        saved = heads.get(name)
        if saved is None or saved["mu"].shape[0] != head.num_classes:
            found = "no such head" if saved is None else f"{saved['mu'].shape[0]} classes"
            _logger.info(f"FAIM head {name!r}: checkpoint has {found}, model {head.num_classes}; the head starts fresh")
            continue
        try:
            head.load_state_dict(saved)
        except RuntimeError as error:
            raise RuntimeError(
                f"FAIM head {name!r} of the checkpoint does not fit this faim_cfg; use the checkpoint's own. {error}"
            ) from error


def _head_names(state_dict: StateDict) -> list[str]:
    names = [key[: -len(".mu")] for key in state_dict if key.endswith(".mu")]
    return [name for name in names if f"{name}.scale" in state_dict and f"{name}.metric.lmbda" in state_dict]
