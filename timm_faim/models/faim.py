"""The ``faim_`` twin of every timm architecture with a classifier, in timm's own registry.

timm reads the registering module: entry functions are found among its globals, their pretrained configs in
``default_cfgs``, and its last name (``faim``) is what ``timm.list_modules()`` shows.
"""

import logging
import sys
from collections import deque
from dataclasses import replace
from typing import Any

import timm
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import nn

from timm_faim.head.convert import contradiction

from .attach import attach_heads
from .blocks import insert_charts
from .checkpoint import (
    check_backbone,
    check_classes,
    load_branch,
    load_charts,
    load_heads,
    read_faim_state_dict,
    read_published,
    split_branch,
    split_charts,
    split_heads,
)
from .config import PREFIX, of_heads, resolve_faim_cfg
from .convert import convert_
from .moments import add_branch
from .published import Entry, published
from .saved import SOURCES, check_source
from .stages import find_stage

_logger = logging.getLogger(__name__)

PRETRAINED_HEADS = ("keep", "fresh")
default_cfgs: dict[str, DefaultCfg] = {}  # the name that timm's register_model looks up
__all__: list[str] = []  # register_model appends the entry names


def has_classifier(arch: str) -> bool:
    """Whether a timm architecture can classify: its ``*_enc`` encoders have no classifier and no reset_classifier."""
    return not arch.endswith("_enc")


def register_twins() -> None:
    """Register ``faim_<arch>`` for every timm architecture with a classifier, with the backbone's pretrained tags."""
    for arch in timm.list_models():
        if has_classifier(arch) and not arch.startswith(PREFIX):
            _register_twin(arch)


def _register_twin(arch: str) -> None:
    name = PREFIX + arch

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(arch, pretrained, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    entry.__module__ = __name__
    entry.__doc__ = f"timm's {arch} with FAIM heads; ``faim_cfg`` takes their options."
    setattr(sys.modules[__name__], name, entry)
    cfgs = _backbone_cfgs(arch) | {tag: entry.cfg() for tag, entry in published().get(name, {}).items()}
    if cfgs:
        pretrained = any(cfg.has_weights for cfg in cfgs.values())
        default_cfgs[name] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=pretrained)
    register_model(entry)


def _backbone_cfgs(arch: str) -> dict[str, PretrainedCfg]:
    """Pretrained configs of a timm architecture by tag, the default tag first.

    Read where timm's own registration reads them. ``get_arch_pretrained_cfgs`` says the same with a deep copy of each,
    which for all architectures takes 70 ms of every import.
    """
    known = getattr(sys.modules[model_entrypoint(arch).__module__], "default_cfgs", {}).get(arch)
    if not isinstance(known, DefaultCfg):
        return {split_model_name_tag(full)[1]: cfg for full, cfg in get_arch_pretrained_cfgs(arch).items()}
    cfgs = {}
    for tag in known.tags:
        cfg = known.cfgs[tag]
        if cfg.hf_hub_id == "timm/":  # timm completes this with the name that it registers, here the backbone's
            cfg = replace(cfg, hf_hub_id=f"timm/{arch}.{tag}" if tag else f"timm/{arch}")
        cfgs[tag] = cfg
    return cfgs


def _create(
    arch: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    faim_cfg: dict[str, Any] | None = None,
    pretrained_head: str = "keep",
    **kwargs: Any,
) -> nn.Module:
    """Build timm's model, weights loaded into timm's own layers first, then put FAIM heads in place of classifiers.

    With ``pretrained_head="keep"`` weights for as many classes as the model's bring their head along: a FAIM head as it
    is, a linear classifier converted in closed form. With ``"fresh"``, and for other classes, heads start as
    ``faim_cfg`` says.
    """
    if pretrained_head not in PRETRAINED_HEADS:
        raise ValueError(f"pretrained_head must be one of {PRETRAINED_HEADS}, got {pretrained_head!r}")
    keeps = pretrained_head == "keep"
    if isinstance(pretrained_cfg, str) and (entry := published().get(PREFIX + arch, {}).get(pretrained_cfg)):
        return _create_published(arch, entry, pretrained, pretrained_cfg_overlay, faim_cfg, keeps, **kwargs)
    given_cfg, faim_cfg = faim_cfg, resolve_faim_cfg(faim_cfg)
    num_classes = kwargs.get("num_classes")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must be >= 0, got {num_classes}")
    source = resolve_pretrained_cfg(arch, pretrained_cfg, pretrained_cfg_overlay)
    if source.source in SOURCES:
        given = {key: value for key, value in kwargs.items() if key != "pretrained_model_args"}
        check_source(PREFIX + arch, source, given | kwargs.get("pretrained_model_args", {}))
    state_dict = read_faim_state_dict(source, kwargs.get("cache_dir")) if pretrained else None
    if state_dict is not None:
        return _create_from_checkpoint(arch, source, state_dict, faim_cfg, keeps, **kwargs)

    # a tag is handed on as the string: some models compare it
    model = model_entrypoint(arch)(
        pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs
    )
    if kwargs.get("features_only"):
        return insert_charts(model, arch, faim_cfg, kwargs)
    if num_classes is None:
        _say_default_classes(model, arch)
    why_not = _not_convertible(model, arch, keeps) if pretrained else "no weights"
    if why_not is None:
        if reason := contradiction(given_cfg or {}):
            raise ValueError(f"faim_cfg {reason}, or start a fresh head with pretrained_head='fresh'")
        return insert_charts(convert_(model, faim_cfg=of_heads(given_cfg)), arch, faim_cfg, kwargs)
    _attach(model, arch, faim_cfg, kwargs)
    insert_charts(model, arch, faim_cfg, kwargs)
    if pretrained and model.num_classes > 0:
        tag = model.pretrained_cfg.get("tag") or "default"
        _logger.info(f"{PREFIX}{arch}: backbone weights loaded ({tag}), the FAIM head starts fresh: {why_not}")
    return model


def _not_convertible(model: nn.Module, arch: str, keeps: bool) -> str | None:
    """Why a model with its weights loaded does not keep their classes as a FAIM head; None if it does."""
    if not keeps:
        return "as asked for by pretrained_head='fresh'"
    classes = model.pretrained_cfg.get("num_classes")
    if model.num_classes != classes:
        return f"the weights have {classes} classes, the model {model.num_classes}"
    if model.num_classes < 2 or _embeds(model, arch):
        return "the weights have no classes"
    if next(model.parameters()).is_meta:
        return "the weights are on the meta device"
    return None


def _create_from_checkpoint(
    arch: str, source: PretrainedCfg, state_dict: dict[str, Any], faim_cfg: dict[str, Any], keeps: bool, **kwargs: Any
) -> nn.Module:
    backbone, charts = split_charts(state_dict)
    backbone, moments = split_branch(backbone)
    backbone, heads = split_heads(backbone)
    kwargs.setdefault("num_classes", source.num_classes)
    if kwargs["num_classes"] == source.num_classes:
        check_classes(heads, source.num_classes)
    # num_classes=-1 differs from every model's: timm then loads without a classifier, through its own filters
    weights_only = replace(
        source, state_dict=backbone, source=None, file=None, url=None, hf_hub_id=None, num_classes=-1, custom_load=False
    )
    model = model_entrypoint(arch)(pretrained=True, pretrained_cfg=weights_only.to_dict(), **kwargs)
    if kwargs.get("features_only"):
        insert_charts(model, arch, faim_cfg, kwargs)
        load_charts(model, charts, is_part=True)
        return model
    model.pretrained_cfg.clear()  # the same dict is default_cfg
    model.pretrained_cfg.update(replace(source, state_dict=None).to_dict())
    _attach(model, arch, faim_cfg, kwargs)
    load_branch(model, moments, heads)
    check_backbone(model, backbone, strict=model.num_classes == source.num_classes)
    load_heads(model, heads, keeps)
    insert_charts(model, arch, faim_cfg, kwargs)
    load_charts(model, charts)
    return model


def _create_published(
    arch: str,
    entry: Entry,
    pretrained: bool,
    overlay: dict[str, Any] | None,
    faim_cfg: dict[str, Any] | None,
    keeps: bool,
    **kwargs: Any,
) -> nn.Module:
    """The model of an entry of hub_configs/, as it was trained unless the arguments say otherwise."""
    saved = {"num_classes": entry.num_classes, "faim_cfg": None, **entry.model_args}
    saved_cfg = saved.pop("faim_cfg")
    faim_cfg = resolve_faim_cfg(saved_cfg if faim_cfg is None else faim_cfg)
    kwargs = saved | kwargs
    names = entry.label_names()
    source = replace(entry.cfg(), label_names=tuple(names) if names else None, **(overlay or {}))
    if pretrained:
        weights = read_published(entry, kwargs.get("cache_dir"))
        return _create_from_checkpoint(arch, source, weights, faim_cfg, keeps, **kwargs)
    model = model_entrypoint(arch)(pretrained=False, pretrained_cfg=source.to_dict(), **kwargs)
    if not kwargs.get("features_only"):
        _attach(model, arch, faim_cfg, kwargs)
    return insert_charts(model, arch, faim_cfg, kwargs)


def _attach(model: nn.Module, arch: str, faim_cfg: dict[str, Any], arguments: dict[str, Any]) -> None:
    model.pretrained_cfg["architecture"] = PREFIX + arch
    if moments := faim_cfg["moments"]:
        stages = [find_stage(arch, arguments, wanted) for wanted in moments["stages"] or [None]]
        add_branch(model, stages, moments["components"])
        faim_cfg = faim_cfg | {"moments": moments | {"stages": [stage.name for stage in stages]}}
    attach_heads(model, faim_cfg)


def _embeds(model: nn.Module, arch: str) -> bool:
    """Whether the outputs are a CLIP tower's embedding, which timm counts as classes."""
    clip = "clip" in f"{arch}.{model.pretrained_cfg.get('tag')}"
    return clip and model.num_classes in (512, 640, 768, 1024, 1152, 1280)


def _say_default_classes(model: nn.Module, arch: str) -> None:
    tag = str(model.pretrained_cfg.get("tag"))
    if model.num_classes == 0:
        _logger.warning(f"{PREFIX}{arch}: the weights {tag!r} have no classes, so there is no head; pass num_classes")
    elif _embeds(model, arch):
        _logger.warning(
            f"{PREFIX}{arch}: the {model.num_classes} outputs of {tag!r} embed, they are no classes; pass num_classes"
        )
