"""Heads trained on frozen features: one loop, one search for all methods.

Every head sees the same centred features (x - mean) / rms with scalar rms, starts from data (class means, or FAIM's
closed-form fit), and gets the same number of trials: the same Sobol points, mapped onto its own ranges.

A FAIM head with a fixed full Σ is trained in the orthonormal frame of its metric (z = A x, A'A = Σ): features are moved
there once and the head keeps its distances with Σ = I. That is the same function at a small part of the cost; only
AdamW, which depends on coordinates, sees the prototypes in the metric's own.

Shapes: N images, V views (the first is the centre crop), C classes, D features.
"""

from dataclasses import dataclass

import heads
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from timm_faim import FAIMHead, fit_

SHRINKAGE = 0.3
BATCH = 128
_LR = {"lr": (1e-4, 1e-2, "log"), "weight_decay": (1e-2, 10.0, "log")}
_LARGE_LR = {"lr": (1e-3, 1e-1, "log"), "weight_decay": (1e-2, 10.0, "log")}  # prototypes of the features' size
_SMOOTHING = {"smoothing": (0.0, 0.2, "linear")}

# Beside heads.METHODS: logistic regression, and two controls that get FAIM's Σ: whitened features under usual heads.
SPACES = {"logistic": {"C": (1e-4, 1e2, "log")}, "whitened_linear": _LR | _SMOOTHING}
SPACES |= {
    name: (_LARGE_LR if name in ("euclidean", "faim_mahalanobis") else _LR)
    | ranges
    | ({} if "margin" in ranges else _SMOOTHING)
    for name, (_, ranges) in heads.METHODS.items()
}
SPACES["whitened_arcface"] = SPACES["arcface"]


def sobol_settings(method: str, trials: int) -> list[dict[str, float]]:
    """``trials`` settings of a method from the first Sobol points (scrambled with a fixed seed)."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(trials)
    settings = []
    for point in points.tolist():
        settings.append({n: heads.place(u, r) for u, (n, r) in zip(point, SPACES[method].items(), strict=False)})
    return settings


@dataclass
class TrainingSet:
    """Centred features [V·N, D], and the same whitened by the shrunk within-class precision."""

    x: Tensor
    y: Tensor
    num_classes: int
    mean_D: Tensor
    rms: Tensor
    full: FAIMHead  # closed-form fits: full Σ, and Σ = I
    eye: FAIMHead
    frame_x: Tensor

    @classmethod
    def of(cls, features_VND: Tensor, targets_N: Tensor, num_classes: int) -> "TrainingSet":
        x, y = features_VND.flatten(0, 1), targets_N.repeat(len(features_VND))
        mean_D = x.mean(0)
        x = x - mean_D
        rms = x.square().mean().sqrt()
        x = x / rms
        D = x.shape[1]
        full = fit_(FAIMHead(D, num_classes), [(x, y)], SHRINKAGE)
        eye = fit_(FAIMHead(D, num_classes, full_sigma=False), [(x, y)], 1.0)
        return cls(x, y, num_classes, mean_D, rms, full, eye, (x @ full.whiten).detach())

    def inputs(self, method: str) -> Tensor:
        return self.frame_x if uses_frame(method) else self.x

    def transform(self, method: str, x: Tensor) -> Tensor:
        """Other features [N, D] as :meth:`inputs` has them."""
        x = (x - self.mean_D) / self.rms
        return (x @ self.full.whiten.to(x.dtype)).detach() if uses_frame(method) else x

    def head(self, method: str, **options: float) -> nn.Module:
        """A head of a method, started from this set."""
        builder, _ = heads.METHODS[method.removeprefix("whitened_")]
        D = self.x.shape[1]
        if method not in ("faim_indicatrix", "faim_indicatrix_beta", "faim_indicatrix_eye"):
            head = builder(D, self.num_classes, **options)
            if isinstance(head, FAIMHead):
                fit_(head, [(self.x, self.y)], 1.0 if method == "faim_sphere" else SHRINKAGE)
            else:
                head.start_(self.inputs(method), self.y)
            return head
        if method == "faim_indicatrix_eye":
            head = builder(D, self.num_classes, **options)
            head.load_state_dict(self.eye.state_dict() | {"scale": head.scale.detach()})
            return head
        return in_frame(self.full, learn_one_form=method == "faim_indicatrix_beta", **options)


def uses_frame(method: str) -> bool:
    return method in ("faim_indicatrix", "faim_indicatrix_beta") or method.startswith("whitened_")


@torch.no_grad()
def in_frame(head: FAIMHead, learn_one_form: bool, scale: float, margin: float, lmbda: float = 0.1) -> FAIMHead:
    """The indicatrix head of features in the orthonormal frame of ``head``, with Σ = I there; β learned or λ = 0."""
    D, C = head.in_features, head.num_classes
    options = dict(full_sigma=False, learn_metric=learn_one_form, lambda_init=lmbda if learn_one_form else 0.0)
    moved = heads.Faim(D, C, scale_init=scale, margin=margin, **options)
    moved.whiten.requires_grad_(False)
    moved.metric.beta.copy_(head.metric.beta)
    moved.center.copy_(head.center @ head.whiten)
    moved.mu.copy_(head.mu)
    return moved


def train(method: str, data: TrainingSet, setting: dict[str, float], seed: int, steps: int) -> nn.Module:
    """A head after ``steps`` of AdamW with a cosine schedule; logistic regression by L-BFGS instead."""
    torch.manual_seed(seed)
    if method == "logistic":
        return logistic(data, setting["C"])
    setting = dict(setting)
    lr, decay, smoothing = setting.pop("lr"), setting.pop("weight_decay"), setting.pop("smoothing", 0.0)
    head = data.head(method, **setting).train()
    matrices = [p for p in head.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in head.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x, y = data.inputs(method), data.y
    order = torch.cat([torch.randperm(len(x)) for _ in range(-(-steps * BATCH // len(x)))])
    for step in range(steps):
        batch = order[step * BATCH : (step + 1) * BATCH]
        loss = F.cross_entropy(head(x[batch], y[batch]), y[batch], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def logistic(data: TrainingSet, C: float, iterations: int = 40) -> nn.Module:
    """Softmax regression with the penalty |W|² / (2 C N) on the mean loss (scikit-learn's C); deterministic."""
    head = heads.Linear(data.x.shape[1], data.num_classes)
    head.start_(data.x, data.y)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(data.x), data.y) + head.weight.square().sum() / (2.0 * C * len(data.x))
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.eval()
