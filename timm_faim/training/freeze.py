"""Parts of the model that do not learn: --freeze, --head-only, --train-last and --freeze-norms."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_faim import faim_heads
from timm_faim.run.errors import UserError, did_you_mean
from timm_faim.run.options import above, flag, option, whole


@dataclass
class LearningOptions:
    """What learns, and how fast."""

    freeze: list[str] | None = option(
        "freeze the modules of these names, for example layer1 'blocks.*'", metavar="GLOB", nargs="*", marks="training"
    )
    head_only: bool = flag("train the classifier only", marks="usual training")
    train_last: int | None = option(
        "train the classifier, the last N blocks and the norm after them", None, whole(1, 10_000), "N", marks="training"
    )
    freeze_norms: bool = flag(
        "batch norms keep the statistics and weights that they start with", marks="usual training"
    )
    cache_features: bool = flag("with --head-only: compute the features once", marks="usual training")
    cache_views: int = option(
        "augmented views per image to cache; 0: one view without augmentation",
        0,
        whole(0, 10_000),
        "N",
        marks="training",
    )
    lr_scale_backbone: float = option("factor on the learning rate of the backbone", 1.0, above(0, 1e6), "F")
    lr_scale_mu: float = option(
        "factor on the learning rate of the prototypes μ, or a plain model's classifier",
        1.0,
        above(0, 1e6),
        "F",
        marks="usual",
    )
    lr_scale_scalars: float = option(
        "factor on the learning rate of λ, γ and the prior", 1.0, above(0, 1e6), "F", marks="faim"
    )


def apply_freeze(options: LearningOptions, model: nn.Module) -> list[nn.Module]:
    """Set `requires_grad` as the options say, and return the outermost frozen modules.

    The training loop keeps those in eval mode: a frozen batch norm does not take new statistics, a frozen dropout
    drops nothing.

    Args:
        options: without --freeze, --head-only, --train-last and --freeze-norms nothing changes.
        model: a bare timm model, before the optimiser is built.

    Raises:
        UserError: a name that matches nothing, more blocks than the model has, or nothing left to learn.
    """
    if options.freeze:
        frozen = _freeze_matching(model, options.freeze)
    elif options.head_only or options.train_last is not None:
        learns = classifier_parameters(model)
        if options.train_last is not None:
            learns |= _last_parameters(model, options.train_last)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learns and parameter.requires_grad)
        frozen = _outermost_frozen(model)
    else:
        frozen = []
    if options.freeze_norms:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        for parameter in (p for norm in norms for p in norm.parameters()):
            parameter.requires_grad_(False)
        frozen += norms
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(options.freeze or ())} leaves nothing to learn. Give fewer names")
    return frozen


def _freeze_matching(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    names = [name for name in (*modules, *parameters) if name]
    matched: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise UserError(
                f"--freeze {pattern} matches no module of the model.{did_you_mean(pattern, names)} At the "
                f"top are {', '.join(name for name, _ in model.named_children())}"
            )
        matched.update(dict.fromkeys(hits))
    for name in matched:
        for parameter in modules[name].parameters() if name in modules else [parameters[name]]:
            parameter.requires_grad_(False)
    return [
        modules[name]
        for name in matched
        if name in modules and not any(name.startswith(f"{other}.") for other in matched)
    ]


def classifier_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of FAIM heads, or of what timm calls the classifier."""
    names = set(faim_heads(model))
    if not names:
        named = model.pretrained_cfg.get("classifier") or ()
        names.update([named] if isinstance(named, str) else named)
        classifiers = model.get_classifier()
        found = {id(c) for c in (classifiers if isinstance(classifiers, (tuple, list)) else [classifiers])}
        names.update(name for name, module in model.named_modules() if id(module) in found)
    return {key for key, _ in model.named_parameters() if any(key.startswith(f"{name}.") for name in names)}


def _last_parameters(model: nn.Module, count: int) -> set[str]:
    """Names of the parameters of the last `count` blocks and of all that comes after them.

    Blocks are those of timm's layer decay: what the model's `group_matcher` tells apart between the stem, its first
    group, and what it leaves unmatched, the final norm and the classifier. A norm that belongs to the last block there
    goes with it.
    """
    model_name = model.pretrained_cfg.get("architecture") or type(model).__name__
    if not hasattr(model, "group_matcher"):
        raise UserError(f"--train-last: timm does not say what the blocks of {model_name} are. Use --freeze")
    matcher = model.group_matcher(coarse=False)
    groups = [set(names) for _, names in sorted(group_parameters(model, matcher).items())]
    classifier = classifier_parameters(model)
    after = set().union(*(group for group in groups if group & classifier))
    blocks = [group for group in groups if not group & classifier]
    stem = matcher.get("stem") if isinstance(matcher, dict) else None
    stem_and_rest = group_parameters(model, {"stem": stem}) if stem is not None else {}
    if stem is None or len(stem_and_rest) > 1 and blocks[:1] and blocks[0] <= set(stem_and_rest[0]):
        blocks = blocks[1:]
    if count > len(blocks):
        raise UserError(
            f"--train-last {count}: {model_name} has {len(blocks)} blocks. Give at most {len(blocks)}, or "
            "leave it out to train everything"
        )
    return after.union(*blocks[len(blocks) - count :])


def _outermost_frozen(model: nn.Module) -> list[nn.Module]:
    """Modules without a learning parameter, from the outside in.

    A module without any parameter, beside some that have, is frozen with the next one that has: dropout in front of
    the classifier is the classifier's, dropout after the patch embedding is the backbone's.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return [model]
    frozen: list[nn.Module] = []
    waiting: list[nn.Module] = []
    for child in model.children():
        parameters = list(child.parameters())
        if not parameters:
            waiting.append(child)
            continue
        if not parameters[0].requires_grad:
            frozen += waiting
        waiting = []
        frozen += _outermost_frozen(child)
    return frozen
