"""Put FAIM heads where a timm model has its linear classifiers, and keep them there.

The classifier modules are those that the model's ``pretrained_cfg['classifier']`` names, plus what
``get_classifier()`` returns and that name misses. Each ``nn.Linear`` or 1×1 ``nn.Conv2d`` found there is replaced by a
FAIMHead of the same width, device and dtype; keys become ``<classifier>.mu`` and so on.

The model's class becomes a subclass made on the fly (``isinstance`` of the timm class still holds) whose
``reset_classifier`` calls timm's and attaches heads again.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from timm_faim.head import FAIMHead, faim_heads

from .config import of_heads
from .moments import branch_of, connect_heads


def attach_heads(model: nn.Module, faim_cfg: dict[str, Any], ready: Mapping[str, FAIMHead] | None = None) -> nn.Module:
    """Replace the classifiers of a timm model by FAIM heads, in place.

    Args:
        model: a model made by timm, with ``pretrained_cfg``; with ``num_classes=0`` the heads come with a later
            ``reset_classifier``.
        faim_cfg: resolved head options, see :func:`timm_faim.models.config.resolve_faim_cfg`.
        ready: heads to put in by classifier name; the other classifiers get fresh ones.

    Raises:
        TypeError: a named classifier that is neither linear nor a 1×1 convolution.
        ValueError: head options out of their range.
    """
    model.faim_cfg = dict(faim_cfg)
    _replace_classifiers(model, ready or {})
    if not isinstance(model, FAIMModelMixin):
        recorded = vars(model).pop("_model_args", None)  # the mixin's property would hide it
        model.__class__ = subclass(type(model), FAIMModelMixin)
        if recorded is not None:
            model._model_args = recorded
    return model


class FAIMModelMixin:
    """What a timm model gains with FAIM heads. No annotations here: TorchScript reads the timm class's own."""

    __jit_unused_properties__ = ["_model_args"]

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, *args, **kwargs) -> None:
        """timm's ``reset_classifier`` with FAIM heads in place of the linear classifiers; 0 removes the head.

        Heads on the indicatrix keep centre and Σ, which belong to the features; prototypes and γ start fresh.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0, got {num_classes}")
        before = {name: head.state_dict() for name, head in faim_heads(self).items()}
        super().reset_classifier(num_classes, *args, **kwargs)
        self.num_classes = num_classes  # some models forget it
        _replace_classifiers(self, {})
        for name, head in faim_heads(self).items():
            head.take_frame(before.get(name, {}))

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        """timm's names and every parameter of heads and charts: prototypes, Σ, β, p and scalars are not decayed."""
        names = set(super().no_weight_decay()) if hasattr(super(), "no_weight_decay") else set()
        for head_name, head in faim_heads(self).items():
            names.update(f"{head_name}.{name}" for name in head.no_weight_decay())
        names.update(name for name, _ in self.named_parameters() if ".faim_chart." in name)
        return names

    @property
    def _model_args(self) -> dict:
        """timm's record of the arguments that shape the model, with ``faim_cfg`` completed by the defaults in force."""
        recorded = {k: v for k, v in self.__dict__.get("_timm_model_args", {}).items() if k != "pretrained_head"}
        return recorded | {"faim_cfg": dict(self.faim_cfg)}

    @_model_args.setter
    def _model_args(self, value: dict) -> None:
        self.__dict__["_timm_model_args"] = value

    def __reduce_ex__(self, protocol):
        return reduce_by_base(self)


class KeepsHeadMixin:
    """A container above a FAIM head: ``fuse()`` (timm's reparameterisation) has no linear layer to fold into."""

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        return self

    def __reduce_ex__(self, protocol):
        return reduce_by_base(self)


def classifier_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that :func:`attach_heads` replaces, by name, the model's main classifier first.

    Raises:
        TypeError: a named classifier that is neither linear nor a 1×1 convolution.
    """
    layers = {}
    for name in _classifier_names(model):
        layer = _find(model, name)
        if layer is None or isinstance(layer, (nn.Identity, FAIMHead)):
            continue
        if not _is_linear(layer):
            kind = type(layer).__name__
            raise TypeError(f"classifier {name!r} is a {kind}; only linear layers and 1×1 convolutions fit")
        layers[name] = layer
    return layers


def _replace_classifiers(model: nn.Module, ready: Mapping[str, FAIMHead]) -> None:
    branch = branch_of(model)
    for name, layer in classifier_layers(model).items():
        parent_name, _, child_name = name.rpartition(".")
        further = [] if branch is None else branch.widths
        head = ready[name] if name in ready else _head_like(layer, model.faim_cfg, further)
        setattr(model.get_submodule(parent_name), child_name, head)
        _keep_unfused(model, parent_name)
    connect_heads(model)


def _classifier_names(model: nn.Module) -> list[str]:
    """Names of the classifier layers, the model's config first."""
    named = model.pretrained_cfg.get("classifier") or ()
    names = [named] if isinstance(named, str) else list(named)
    modules = dict(model.named_modules())
    by_id = {id(module): name for name, module in modules.items()}
    # without classes some get_classifier() look inside an Identity
    classifiers = model.get_classifier() if model.num_classes > 0 else None
    if not isinstance(classifiers, (tuple, list, nn.ModuleList)):
        classifiers = [classifiers]
    for classifier in classifiers:
        name = by_id.get(id(classifier))
        if name is None or any(_within(known, name) for known in names):
            continue
        layers = [key for key, module in modules.items() if _within(key, name) and _is_linear(module)]
        names.extend(layers[-1:])  # of a container (norm, dropout, linear) the last layer classifies
    return names


def _head_like(layer: nn.Module, faim_cfg: dict[str, Any], further: list[int]) -> FAIMHead:
    """A head in the place of a layer, with ``further`` features beside the layer's own."""
    out_features, in_features = layer.weight.shape[:2]
    options = of_heads(faim_cfg) | {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if further:
        weight = faim_cfg["moments"]["weight"]
        options["part_weights"] = [1.0 - weight, *[weight / len(further)] * len(further)]
        options |= {"parts": [in_features, *further], "rank": faim_cfg["moments"]["rank"]}
    head = FAIMHead(in_features + sum(further), out_features, **options)
    return head.train(layer.training)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _keep_unfused(model: nn.Module, parent_name: str) -> None:
    """Stop ``fuse()`` in every container between the model and a head."""
    while parent_name:
        container = model.get_submodule(parent_name)
        if hasattr(container, "fuse") and not isinstance(container, KeepsHeadMixin):
            container.__class__ = subclass(type(container), KeepsHeadMixin)
        parent_name = parent_name.rpartition(".")[0]


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # inside a container that num_classes=0 leaves out
        return None


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


_MADE: set[type] = set()


@cache
def subclass(base: type, mixin: type) -> type:
    namespace = {"__module__": base.__module__, "__annotations__": dict(getattr(base, "__annotations__", {}))}
    made = type(getattr(mixin, "name_prefix", "FAIM") + base.__name__, (mixin, base), namespace)
    _MADE.add(made)
    return made


def timm_class(cls: type) -> type:
    """The class that a :func:`subclass` was made from; any other class itself."""
    return cls.__bases__[1] if cls in _MADE else cls


def reduce_by_base(module: nn.Module) -> tuple:
    """Pickle and deepcopy by the importable timm class and the mixin: the subclass itself has no import path."""
    mixin, base = type(module).__bases__
    state = module.__getstate__() if hasattr(module, "__getstate__") else module.__dict__
    return _rebuild, (base, mixin), state


def _rebuild(base: type, mixin: type) -> nn.Module:
    cls = subclass(base, mixin)
    return cls.__new__(cls)
