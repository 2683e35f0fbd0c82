"""Names of a model's classes, and the number that goes with them everywhere in the model."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from timm_faim.head import FAIMHead, faim_heads
from timm_faim.run.errors import did_you_mean, few


def heads_of(model: nn.Module) -> dict[str, FAIMHead]:
    """The FAIM heads of a timm model by name, all of as many classes.

    Raises:
        ValueError: there are none, or the model is none of timm's.
    """
    heads = faim_heads(model)
    if not heads:
        raise ValueError("the model has no FAIM head, and classes are prototypes of one; create it under its faim_ name"
                         ", or convert it with timm_faim.convert_")  # fmt: skip
    if not isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        raise ValueError(f"{type(model).__name__} is no model of timm's create_model: it has no pretrained_cfg to keep "
                         "class names in")  # fmt: skip
    if len(numbers := {head.num_classes for head in heads.values()}) > 1:
        raise ValueError(f"the FAIM heads {', '.join(heads)} have different numbers of classes: {sorted(numbers)}")
    return heads


def class_names(model: nn.Module, label_names: Sequence[str] | None = None) -> list[str]:
    """Class names in the order of the logits.

    Args:
        model: with FAIM heads.
        label_names: instead of those that the model has, or where it has none.

    Raises:
        ValueError: no names, too few or many, or two classes of one name.
    """
    number = next(iter(heads_of(model).values())).num_classes
    names = model.pretrained_cfg.get("label_names") if label_names is None else label_names
    if not names:
        raise ValueError(
            f"the model has no class names; give them, in the order of its {number} classes, as label_names"
        )
    names = [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]
    if len(names) != number:
        raise ValueError(f"{len(names)} class names for {number} classes; give one for each, in their order")
    check_distinct(names)
    return names


def check_distinct(names: Iterable[str]) -> None:
    """Refuse empty names and names that stand twice.

    Raises:
        ValueError: names them.
    """
    counts = Counter(names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"class names must differ, and {few(twice)} would stand twice")
    if wrong := [
        name for name in counts if not isinstance(name, str) or not name.strip() or len(name.splitlines()) > 1
    ]:
        raise ValueError(f"a class name must be one line of text, got {wrong[0]!r}")


def numbers_of(names: Sequence[str], wanted: Iterable[str]) -> list[int]:
    """The numbers of classes by name.

    Raises:
        ValueError: a name that no class has, with the nearest ones; a name given twice.
    """
    place = {name: k for k, name in enumerate(names)}
    wanted = list(wanted)
    for name in wanted:
        if name not in place:
            raise ValueError(f"the model has no class {name!r}.{did_you_mean(str(name), names)}")
    if twice := [name for name, count in Counter(wanted).items() if count > 1]:
        raise ValueError(f"class {few(twice)} is named twice")
    return [place[name] for name in wanted]


def set_names(model: nn.Module, names: Sequence[str], renamed: Mapping[str, str] | None = None) -> None:
    """Record class names, and their number everywhere: model, its config and arguments, and what holds the heads.

    Descriptions of classes that are no more are dropped, those of ``renamed`` ones (old to new) kept.
    """
    number = len(names)
    cfg = dict(model.pretrained_cfg, label_names=tuple(names), num_classes=number)
    if texts := cfg.get("label_descriptions"):
        now = {(renamed or {}).get(name, name): text for name, text in texts.items()}
        cfg["label_descriptions"] = {name: text for name, text in now.items() if name in set(names)} or None
    model.pretrained_cfg = cfg
    if hasattr(model, "default_cfg"):  # timm's older name of the same
        model.default_cfg = cfg
    for key in ("_timm_model_args", "_model_args"):
        if "num_classes" in (recorded := vars(model).get(key) or {}):
            vars(model)[key] = dict(recorded, num_classes=number)
    model.num_classes = number
    for path, head in faim_heads(model).items():
        head.num_classes = head.out_features = number
        while path := path.rpartition(".")[0]:
            holder = model.get_submodule(path)
            if isinstance(getattr(holder, "num_classes", None), int):
                holder.num_classes = number
