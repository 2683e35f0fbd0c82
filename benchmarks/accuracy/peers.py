"""Other classifiers in closed form, for one part of the features each; scores of several parts may be added.

Shapes: N training and B test images, C classes, D features, L random features.
"""

from functools import cached_property

import torch
from heads import class_means
from torch import Tensor
from torch.nn import functional as F

LIFT = 10_000


class Part:
    """Features x [N, D] of classes y [N], and of test images v [B, D]."""

    def __init__(self, x: Tensor, y: Tensor, v: Tensor, num_classes: int) -> None:
        self.x, self.y, self.v, self.classes = x, y, v, num_classes

    @cached_property
    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Training and test images and class means around the mean, in the span of the training images with the mean
        square of what the test images have beside it (of no weight in LDA)."""
        mean = self.x.mean(0)
        x, v = self.x - mean, self.v - mean
        if len(x) < x.shape[1]:
            e, V = torch.linalg.eigh((x @ x.t()).double())
            kept = e > 1e-9 * e[-1]
            basis = (x.t().double() @ (V[:, kept] / e[kept].sqrt())).to(x)
            x, v = x @ basis, v @ basis
        return x, v, class_means(x, self.y, self.classes)

    @cached_property
    def covariance(self) -> Tensor:
        """Within classes, of trace D; of all images where each class has one."""
        x, _, means = self.centred
        rows = x - means[self.y] if len(x) > self.classes else x
        W = (rows.t() @ rows).double()
        return W * (self.x.shape[1] / W.diagonal().sum())

    @cached_property
    def lifted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues of the kernel of relu(x W), W random, and what ridges of any size need."""
        generator = torch.Generator().manual_seed(0)
        W = torch.randn(self.x.shape[1], LIFT, generator=generator).to(self.x)
        a, b = (self.x @ W).relu(), (self.v @ W).relu()
        kernel = (a @ a.t()).double()
        unit = kernel.diagonal().mean()
        e, V = torch.linalg.eigh(kernel / unit)
        one_hot = F.one_hot(self.y, self.classes).double()
        return e, ((b @ a.t()).double() / unit) @ V, V.t() @ one_hot


def lda(part: Part, shrinkage: float) -> Tensor:
    """Linear discriminant analysis with the covariance shrunk towards its trace; at 1e-4 streaming LDA as Hayes and
    Kanan 2020 (arXiv:1909.01520) have it."""
    _, v, means = part.centred
    shrunk = (1.0 - shrinkage) * part.covariance
    shrunk.diagonal().add_(shrinkage)
    P_DC = torch.cholesky_solve(means.t().double(), torch.linalg.cholesky(shrunk))
    squares_C = (means.double() * P_DC.t()).sum(1)
    return ((v.double() @ P_DC - 0.5 * squares_C) / squares_C.mean()).float()


def ranpac(part: Part, ridge: float) -> Tensor:
    """Ridge regression on relu(x W), W random (McDonnell et al. 2023, arXiv:2307.02251)."""
    e, kernel, targets = part.lifted
    return (kernel @ (targets / (e.clamp_min(0.0) + ridge)[:, None])).float()


def _tukey(x: Tensor, power: float) -> Tensor:
    return x.sign() * x.abs().pow(power)


def tukey_ncm(part: Part, power: float) -> Tensor:
    """Cosine to class means after Tukey's ladder of powers (Yang et al. 2021, arXiv:2101.06395)."""
    x, v = (F.normalize(_tukey(each, power), dim=1) for each in (part.x, part.v))
    return v @ F.normalize(class_means(x, part.y, part.classes), dim=1).t()


def fecam(part: Part, amount: float) -> Tensor:
    """FeCAM with one covariance for all classes (Goswami et al. 2023, arXiv:2309.14062): powers of 1/2, shrinkage by
    the mean variance, correlations, and Mahalanobis distances of vectors of length 1."""
    x, v = _tukey(part.x, 0.5), _tukey(part.v, 0.5)
    means = class_means(x, part.y, part.classes)
    rows = x - (means[part.y] if len(x) > part.classes else x.mean(0))
    shrunk = (rows.t() @ rows).double()
    shrunk *= shrunk.shape[0] / shrunk.diagonal().sum()
    shrunk.diagonal().add_(amount)
    scale_D = shrunk.diagonal().rsqrt()
    L = torch.linalg.cholesky(shrunk * scale_D[:, None] * scale_D)
    z, m = (torch.linalg.solve_triangular(L, F.normalize(each.double(), dim=1).t(), upper=False).t()
            for each in (v, means))  # fmt: skip
    return (-torch.cdist(z, m).square() / m.square().sum(1).mean()).float()


def tip_adapter(part: Part, sharpness: float) -> Tensor:
    """Tip-Adapter's cache of training images (Zhang et al. 2021, arXiv:2111.03930), class means in place of text."""
    mean = part.x.mean(0)
    x, v = F.normalize(part.x - mean, dim=1), F.normalize(part.v - mean, dim=1)
    cache = (sharpness * (v @ x.t() - 1.0)).exp() @ F.one_hot(part.y, part.classes).to(x)
    counts = torch.bincount(part.y, minlength=part.classes).clamp_min(1)
    prototypes = F.normalize(class_means(x, part.y, part.classes), dim=1)
    return cache / counts + v @ prototypes.t()


# name -> scores of a part at a number, and the numbers; with one image a class the middle one
PEERS = {
    "LDA": (lda, [1e-4, 0.1, 0.3, 0.6]),
    "RanPAC": (ranpac, [1e-3, 1e-2, 1e-1, 1.0]),
    "FeCAM": (fecam, [0.3, 1.0, 3.0]),
    "Tukey NCM": (tukey_ncm, [0.3, 0.5, 0.7, 1.0]),
    "Tip-Adapter": (tip_adapter, [1.0, 5.5, 20.0]),
}
