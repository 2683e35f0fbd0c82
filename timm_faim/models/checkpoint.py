"""Open FAIM checkpoints: the backbone through timm's own loader and filters, the heads by their own keys."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm.models import PretrainedCfg, load_state_dict, load_state_dict_from_hf
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

from timm_faim.head import faim_heads
from timm_faim.version import __version__

from .moments import NAME, branch_of
from .published import Entry

_logger = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

CHART = ".faim_chart."  # in the keys of the charts of FAIM blocks


def read_faim_state_dict(
    pretrained_cfg: None | str | dict[str, Any] | PretrainedCfg, cache_dir: None | str | Path = None
) -> StateDict | None:
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
    elif file and not pretrained_cfg.get("custom_load") and Path(file).suffix not in (".npz", ".npy"):
        state_dict = load_state_dict(str(file))
    else:
        return None
    return state_dict if _head_names(state_dict) or any(CHART in key for key in state_dict) else None


def read_published(entry: Entry, cache_dir: None | str | Path = None) -> StateDict:
    """The weights of an entry of hub_configs/, from the Hub or its cache, verified against the entry's sha256.

    Raises:
        RuntimeError: the entry is not published yet, or the file is not the one that the entry names.
    """
    if not entry.revision:
        raise RuntimeError(f"{entry.name} is not published yet; pretrained=False gives its model without weights")
    path = hf_hub_download(
        entry.repo_id,
        "model.safetensors",
        revision=entry.revision,
        cache_dir=cache_dir,
        library_name="timm_faim",
        library_version=__version__,
    )
    if (found := sha256(Path(path))) != entry.sha256:
        raise RuntimeError(
            f"{path} has sha256 {found}, {entry.path.name} says {entry.sha256}; remove the file and "
            "load again. If that does not help the repository has been changed: don't use it"
        )
    return load_file(path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


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


def split_charts(state_dict: StateDict) -> tuple[StateDict, StateDict]:
    """Entries of backbone and heads, and those of the charts of FAIM blocks."""
    charts = {key: value for key, value in state_dict.items() if CHART in key}
    return {key: value for key, value in state_dict.items() if key not in charts}, charts


def split_branch(state_dict: StateDict) -> tuple[StateDict, StateDict]:
    """All other entries, and those of the branch of second moments without its name."""
    prefix = f"{NAME}."
    branch = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    return {key: value for key, value in state_dict.items() if not key.startswith(prefix)}, branch


def load_branch(model: nn.Module, saved: StateDict, heads: Mapping[str, StateDict]) -> None:
    """Load the projections of second moments; a checkpoint without any leaves those of the model as they start.

    Raises:
        RuntimeError: the checkpoint has moments and the model none, or of other stages or numbers of components; or its
            ``heads`` read moments, and it lacks those.
    """
    branch = branch_of(model)
    if not saved and any(key.startswith("frames.") for head in heads.values() for key in head):
        raise RuntimeError(f"the checkpoint's FAIM head reads second moments, and the checkpoint lacks their {NAME}; "
                           "save the whole state dict")  # fmt: skip
    if branch is None and saved and model.num_classes > 0:
        raise RuntimeError("the checkpoint's FAIM head reads second moments; use the checkpoint's own faim_cfg "
                           "(moments=…)")  # fmt: skip
    if branch is None or not saved:
        return
    try:
        branch.load_state_dict(saved)
    except RuntimeError as error:
        names = ", ".join(stage.name for stage in branch.stages)
        raise RuntimeError(f"the checkpoint has second moments of other stages than {names}, or other numbers of "
                           f"components; use its own faim_cfg (moments=…). {error}") from error  # fmt: skip


def load_charts(model: nn.Module, saved: StateDict, is_part: bool = False) -> None:
    """Load the charts of FAIM blocks; those of a checkpoint without any stay the identity, with one log line.

    Args:
        model: has the charts.
        saved: their entries of a checkpoint.
        is_part: the model may lack blocks of the checkpoint (``features_only`` with ``out_indices``).

    Raises:
        RuntimeError: the checkpoint has other blocks than the model, or of another shape.
    """
    charts = {name: chart for name, chart in model.named_modules() if f".{name}.".endswith(CHART)}
    if not saved:
        if charts:
            _logger.info(f"the checkpoint has no FAIM blocks; those of the model ({len(charts)}) start as the identity")
        return
    wanted = {f"{name}.{key}": (name, key) for name, chart in charts.items() for key in chart.state_dict()}
    # timm's feature extractors write stages_3 for stages.3, or model.stages or body.stages for stages
    by_name = {key.removeprefix("model.").removeprefix("body.").replace("_", "."): key for key in wanted}
    found = {by_name.get(key.replace("_", "."), key): value for key, value in saved.items()}
    if is_part:
        found = {key: value for key, value in found.items() if key in wanted}
    if found.keys() != wanted.keys():
        places = sorted({key.partition(CHART)[0] for key in saved})
        raise RuntimeError(f"the checkpoint has FAIM blocks at {', '.join(places)}, this model {len(charts)} others or "
                           "of another kind; use the checkpoint's own faim_cfg (blocks=…)")  # fmt: skip
    try:
        for name, chart in charts.items():
            chart.load_state_dict({key: found[full] for full, (owner, key) in wanted.items() if owner == name})
    except RuntimeError as error:
        raise RuntimeError(f"FAIM blocks of the checkpoint do not fit this faim_cfg; use the checkpoint's own. {error}"
                           ) from error  # fmt: skip


def check_backbone(model: nn.Module, backbone: StateDict, strict: bool) -> None:
    """Refuse a checkpoint that leaves backbone parameters unset (timm's non-strict load only logs them).

    Args:
        strict: every parameter must be there; else up to half may miss with a warning, as after a change of
            ``global_pool`` for new classes.

    Raises:
        RuntimeError: names the first missing parameters.
    """
    head_names = (*(f"{name}." for name in faim_heads(model)), f"{NAME}.")
    wanted = [key for key in model.state_dict() if not key.startswith(head_names)]
    missing = [key for key in wanted if key not in backbone]
    if not missing:
        return
    names = ", ".join(missing[:3])
    message = f"the FAIM checkpoint lacks {len(missing)} of {len(wanted)} backbone tensors ({names}, …)"
    if strict or 2 * len(missing) > len(wanted):
        raise RuntimeError(f"{message}; create the architecture that it was trained as, with the same arguments")
    _logger.warning(f"{message}; they keep their initialisation")


def check_classes(heads: Mapping[str, StateDict], num_classes: int) -> None:
    """Refuse weights of another number of classes than their own config says; the head would start at random.

    Raises:
        RuntimeError: names both numbers.
    """
    for name, saved in heads.items():
        if saved["mu"].dim() != 2 or len(saved["mu"]) != num_classes:
            raise RuntimeError(
                f"the config says {num_classes} classes and the weights of the FAIM head {name!r} have prototypes of "
                f"shape {list(saved['mu'].shape)}: they do not belong together. Restore the config.json of these "
                "weights, or ask for another num_classes to start with a fresh head"
            )


def load_heads(model: nn.Module, heads: dict[str, StateDict], keeps: bool = True) -> None:
    """Load head weights where the number of classes agrees; otherwise, or where ``keeps`` is False, the head stays
    fresh, with one log line, and has centre and metric of the weights.

    Raises:
        RuntimeError: the same number of classes but other heads, parameters or shapes, e.g. another ``full_sigma``.
    """
    if unused := heads.keys() - faim_heads(model).keys():
        if model.num_classes > 0 and len(unused) == len(heads):
            raise RuntimeError(f"the checkpoint's FAIM heads {sorted(unused)} have no place in this model")
        _logger.warning(f"FAIM heads of the checkpoint that the model does not have: {sorted(unused)}")
    for name, head in faim_heads(model).items():
        saved = heads.get(name)
        classes = len(saved["mu"]) if saved is not None and saved["mu"].dim() == 2 else 0
        if classes != head.num_classes or not keeps:
            found = f"{classes} classes" if classes else "no such head"
            kept = "; centre and metric are the checkpoint's" if head.take_frame(saved or {}) else ""
            _logger.info(
                f"FAIM head {name!r}: checkpoint has {found}, model {head.num_classes}; the head starts fresh{kept}"
            )
            continue
        try:
            head.load_state_dict(saved)
        except RuntimeError as error:
            raise RuntimeError(
                f"FAIM head {name!r} of the checkpoint does not fit this faim_cfg; use the checkpoint's own. {error}"
            ) from error


def _head_names(state_dict: StateDict) -> list[str]:
    names = [key[: -len(".mu")] for key in state_dict if key.endswith(".mu")]
    # λ is at the head itself in state dicts of the founding code
    lambdas = ("metric.lmbda", "lmbda")
    return [n for n in names if f"{n}.scale" in state_dict and any(f"{n}.{key}" in state_dict for key in lambdas)]
