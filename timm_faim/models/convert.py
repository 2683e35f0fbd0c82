"""Turn a timm model with linear classifiers into its FAIM twin, in closed form."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_faim.head import FAIMHead, faim_heads
from timm_faim.head.convert import agreement, contradiction, from_linear, probe_features
from timm_faim.head.tap import layer_inputs

from .attach import attach_heads, classifier_layers
from .config import PREFIX, of_heads, resolve_faim_cfg

_logger = logging.getLogger(__name__)

Batch = Tensor | Sequence[Tensor]

_MAX_FEATURES = 1024  # kept for a head: few numbers are measured, and heads on tokens see hundreds an image


def convert_(
    model: nn.Module, batches: None | Tensor | Iterable[Batch] = None, faim_cfg: Mapping[str, Any] | None = None
) -> nn.Module:
    """Make a timm model with linear classifiers its ``faim_`` twin, in place, without training.

    Each classifier becomes the head that :func:`timm_faim.from_linear` makes of it; if one needs a prior, all have
    one. ``model.faim_cfg`` describes them (λ = 0, the prior, γ of the main classifier; other heads' γ are in the state
    dict), so that the model saves, opens and resets as one created under its ``faim_`` name. One log line (level
    INFO) says how far the heads agree with the layers: on the features of ``batches``, or else on made-up ones.

    Args:
        model: a model made by timm, with weights.
        batches: of images [B, ...] or (images, …), or one tensor of images; a few hundred measure what is estimated
            otherwise. The model reads them in eval mode on its own device. A classifier that eval mode does not reach
            is converted from its weights alone, with a warning.
        faim_cfg: head options, only those that differ from the defaults.

    Returns:
        The model, whose class is now a subclass of its own.

    Raises:
        TypeError: a classifier that is neither linear nor a 1×1 convolution; ``faim_cfg`` values of other types.
        ValueError: a model that timm did not make, that has no classifier or FAIM heads already; options that
            contradict a conversion or are unknown; weights or features that are not finite; no batches.
    """
    arch = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not arch or not hasattr(model, "get_classifier"):
        raise ValueError(f"{type(model).__name__} is no classification model of timm's; convert its linear layers with "
                         "timm_faim.from_linear")  # fmt: skip
    if faim_heads(model):
        raise ValueError(f"{arch} has FAIM heads already: {', '.join(faim_heads(model))}")
    options = resolve_faim_cfg({"preset": "flat", **(faim_cfg or {})})
    if reason := contradiction(faim_cfg or {}):
        raise ValueError(f"faim_cfg {reason}")
    if options["blocks"]:
        raise ValueError(f"faim_cfg blocks={options['blocks']}: blocks are put in when a model is created, under its "
                         "faim_ name with pretrained=True")  # fmt: skip
    layers = classifier_layers(model)
    if not layers:
        raise ValueError(f"{arch} has no classifier to convert; create it with the classes of its weights")
    features = {} if batches is None else _classifier_inputs(model, layers, batches)
    heads = _convert_layers(layers, features, of_heads(faim_cfg))

    main = next(iter(heads.values()))
    options.update(lambda_init=0.0, scale_init=main.scale_init, prior=main.prior is not None)
    if not arch.startswith(PREFIX):
        model.pretrained_cfg["architecture"] = PREFIX + arch
    attach_heads(model, options, heads)
    said = "; ".join(_say_agreement(name, heads[name], layers[name], features.get(name)) for name in heads)
    _logger.info(f"{model.pretrained_cfg['architecture']}: linear classifier converted in closed form: {said}")
    return model


def _convert_layers(
    layers: Mapping[str, nn.Module], features: Mapping[str, Tensor], faim_cfg: Mapping[str, Any] | None
) -> dict[str, FAIMHead]:
    """A head of each layer, all with a prior or all without: one faim_cfg describes them."""
    heads = {n: from_linear(layer, features=features.get(n), faim_cfg=faim_cfg) for n, layer in layers.items()}
    if any(head.prior is not None for head in heads.values()):
        for name, head in heads.items():
            if head.prior is None:
                heads[name] = from_linear(
                    layers[name], features=features.get(name), prior=True, faim_cfg={**(faim_cfg or {}), "prior": True}
                )
    return heads


def _say_agreement(name: str, head: FAIMHead, layer: nn.Module, features: Tensor | None) -> str:
    measured_on = "made-up features" if features is None else "calibration features"
    features = probe_features(layer) if features is None else features
    got = agreement(head, layer, features)
    return (
        f"{name!r} agrees in {got['top1']:.2f} % of top-1, {got['top5']:.2f} % of top-5, KL {got['kl']:.1e}, "
        f"on {len(features)} {measured_on}"
    )


def _classifier_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Tensor | Iterable[Batch]
) -> dict[str, Tensor]:
    """Features [N, D] that reach each classifier; tokens and positions count as features of their own."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    parameter = next(model.parameters())
    every = ((batch[0] if isinstance(batch, (tuple, list)) else batch, None)
             for batch in ([batches] if isinstance(batches, Tensor) else batches))  # fmt: skip
    for inputs, _ in layer_inputs(model, layers, every, lambda images: model(images.to(parameter))):
        for name, x in inputs.items():
            x = x.movedim(1, -1) if isinstance(layers[name], nn.Conv2d) else x
            room = _MAX_FEATURES - sum(map(len, kept[name]))
            if room > 0:
                kept[name].append(x.reshape(-1, x.shape[-1])[:room].cpu())
    if not any(kept.values()):
        raise ValueError("batches hold no images that reach a classifier; leave batches out to use the weights alone")
    for name in (name for name, parts in kept.items() if not parts):
        _logger.warning(f"classifier {name!r} is not reached in eval mode and is converted from its weights alone")
    return {name: torch.cat(parts) for name, parts in kept.items() if parts}
