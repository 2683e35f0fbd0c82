"""Habits of the libraries that open timm's models: each is a function of a case, an architecture in one form.

A habit that fails with the ``faim_`` name may fail with timm's own name as well; then it is not ours, and is skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn

from timm_faim import faim_heads

SHARED = dict(blocks=2, block_shared=True)
FORMS = {
    "default": {},
    "founding": dict(preset="founding"),
    "randers": dict(learn_metric=True, lambda_init=0.1, symmetric=False),
    "blocks": dict(blocks=1),
    "moments": dict(moments=dict(components=6)),
}
# architecture: what it is made with to be small; images have 32 pixels
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "test_vit": dict(img_size=32),
    "test_resnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "deit_tiny_distilled_patch16_224": dict(img_size=32, depth=4, embed_dim=48),
    "lcnet_035": {},
    "swin_tiny_patch4_window7_224": dict(
        img_size=32, window_size=2, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)
    ),
    "resnetv2_18": dict(channels=(16, 16, 24, 32), stem_chs=16),  # its classifier is a 1×1 convolution
}
WITHOUT_PLACES = ("test_efficientnet", "lcnet_035")  # for a block
CLASSES = 5


@dataclass
class Case:
    """An architecture in a form; None is timm's own."""

    arch: str
    form: str | None

    @property
    def name(self) -> str:
        return self.arch if self.form is None else f"faim_{self.arch}"

    @property
    def size(self) -> int:
        return 32 if self.arch in ARCHITECTURES else timm.get_pretrained_cfg_value(self.arch, "input_size")[-1]

    def arguments(self) -> dict[str, Any]:
        given = {"num_classes": CLASSES, **ARCHITECTURES.get(self.arch, {})}
        return given if self.form is None else given | {"faim_cfg": FORMS.get(self.form, SHARED)}

    def make(self, **arguments: Any) -> nn.Module:
        """A model in eval mode; its charts, which start as the identity, bend."""
        model = timm.create_model(self.name, **(self.arguments() | arguments)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "faim_chart" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def x(self, count: int = 2) -> Tensor:
        """Images, always the same."""
        return torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def same(self, model: Callable, wanted: Any, count: int = 2) -> None:
        """The model gives what another one (or a tensor) gives."""
        with torch.no_grad():
            wanted = wanted if isinstance(wanted, Tensor) else wanted(self.x(count))
            close(model(self.x(count)), wanted)


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-3) -> None:
    scale = float(wanted.detach().abs().max())
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol * max(scale, 1e-3))


def step(model: nn.Module, x: Tensor, forward: Callable | None = None) -> None:
    """One training step that moves something, with finite numbers."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    model.train()
    out = (model if forward is None else forward)(x)
    out = out if isinstance(out, Tensor) else out[0]
    nn.functional.cross_entropy(out.float(), torch.arange(len(x)) % out.shape[1]).backward()
    grads = [p.grad for p in parameters if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    optimizer.step()
    model.eval()


def heads(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The FAIM heads of a model by name, or what it calls its classifiers."""
    if found := faim_heads(model):
        return list(found.items())
    classifiers = model.get_classifier()
    classifiers = classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]
    return [(name, module) for name, module in model.named_modules() if any(module is c for c in classifiers)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def cases(habits: dict[str, Callable], heavy: tuple[str, ...] = ()) -> list[Any]:
    """Every habit in every form, on one architecture in turn; the others are slow.

    Args:
        heavy: habits that take seconds: not slow in two forms, on an architecture that is soon compiled.
    """
    names, found = list(ARCHITECTURES), []
    for i, habit in enumerate(habits.values()):
        for j, form in enumerate(FORMS):
            fit = [arch for arch in names if not (form == "blocks" and arch in WITHOUT_PLACES)]
            for k, arch in enumerate(fit):
                fast = (k - i - 3 * j) % len(fit) == 0
                if habit.__name__ in heavy:
                    fast = arch == "test_resnet" and form in ("default", "blocks")
                found.append(
                    pytest.param(
                        habit,
                        Case(arch, form),
                        id=f"{habit.__name__}-{form}-{arch}",
                        marks=() if fast else pytest.mark.slow,
                    )
                )
    return found


def parity(habit: Callable, case: Case, limits: dict[tuple[str, str], str], folder: Path | None = None) -> None:
    """What the plain architecture does the faim one does; a documented limit fails here once it is gone.

    Args:
        limits: why a habit fails, by its name and the form.
    """
    if (habit.__name__, case.form) in limits:
        with pytest.raises(Exception):  # noqa: B017  of whatever kind
            habit(case, *([] if folder is None else [folder]))
        return
    folders = [] if folder is None else [folder / "ours", folder / "theirs"]
    for made in folders:
        made.mkdir()
    try:
        habit(case, *folders[:1])
    except Exception as ours:
        try:
            torch.manual_seed(0)
            habit(Case(case.arch, None), *folders[1:])
        except Exception as theirs:
            pytest.skip(f"timm's own {case.arch} neither: {type(theirs).__name__}: {str(theirs)[:100]}")
        raise ours


def listed(namespace: dict[str, Any], module: str, arguments: tuple[str, ...] = ("case",)) -> dict[str, Callable]:
    """The habits of a test file: its functions of these arguments alone."""
    found = {}
    for name, value in namespace.items():
        code = getattr(value, "__code__", None)
        if code is not None and value.__module__ == module and code.co_varnames[: code.co_argcount] == arguments:
            found[name] = value
    return found
