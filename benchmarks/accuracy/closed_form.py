"""Classifiers of frozen features without gradient steps: class means, k-NN, LDA, and FAIM in closed form.

All that use a within-class covariance W share one eigendecomposition W = V diag(w) V', in whose coordinates the shrunk
precision Σ = ((1 - a) W + a tr(W)/D I)⁻¹ is diagonal for every shrinkage a. This is what :func:`timm_faim.fit_` does,
written out so that a search over a costs no further factorisation; ``check.py`` compares the two.

Two identities say what is new here and what is not. With equal class priors the nearest mean under Σ *is* linear
discriminant analysis (Fisher 1936; Rao 1948): ``faim_metric_0.3`` and ``lda_0.3`` predict the same. With λ = 0 the
indicatrix is the cosine of centred, whitened features, known from speaker recognition as within-class covariance
normalisation (WCCN, Hatch et al. 2006); only λ > 0 is Finsler.

Shapes: N images, V views (the first is the centre crop), C classes, D features.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from heads import class_means
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.nn import functional as F

SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0)  # λ
NEIGHBOURS = (1, 3, 5, 10)
FOLDS = 3
TEMPERATURES = torch.logspace(-3, 3, 61)


class Support:
    """Training features [V, N, D] of classes [N], and the moments that the methods share."""

    def __init__(self, features_VND: Tensor, targets_N: Tensor, num_classes: int) -> None:
        self.features = features_VND.flatten(0, 1)
        self.targets = targets_N.repeat(len(features_VND))
        self.centre_D = self.features.mean(0)
        self.means_CD = class_means(self.features, self.targets, num_classes)
        self.residuals = self.features - self.means_CD[self.targets]
        within_DD = self.residuals.t() @ self.residuals / max(len(self.targets) - num_classes, 1)
        if len(self.targets) > num_classes:
            self.eigenvalues_D, self.V_DD = torch.linalg.eigh(within_DD)
        else:  # one image a class: nothing is known within classes
            self.eigenvalues_D, self.V_DD = torch.ones(len(within_DD)), torch.eye(len(within_DD))
        self.eigenvalues_D = self.eigenvalues_D.clamp_min(0.0)
        self.average = self.eigenvalues_D.mean()
        self.rotated_means_CD = (self.means_CD - self.centre_D) @ self.V_DD
        counts_C = torch.bincount(self.targets, minlength=num_classes)
        self.root_share_C1 = (counts_C / len(self.targets)).sqrt()[:, None]

    def root(self, shrinkage: float) -> Tensor:
        """Σ^½ [D] in the eigenbasis."""
        return ((1.0 - shrinkage) * self.eigenvalues_D + shrinkage * self.average).rsqrt()

    def leading(self, means_CD: Tensor) -> Tensor:
        """Leading between-class direction [D] of whitened class means, of length 1."""
        spread_CD = means_CD * self.root_share_C1
        left_C = torch.linalg.eigh(spread_CD @ spread_CD.t())[1][:, -1]
        return F.normalize(left_C @ spread_CD, dim=0)


Scores = Callable[[Support, Tensor, Tensor], Tensor]  # support, features [B, D], the same rotated -> logits [B, C]


def euclidean(support: Support, x: Tensor, _: Tensor) -> Tensor:
    return -torch.cdist(x, support.means_CD)


def cosine(support: Support, x: Tensor, _: Tensor) -> Tensor:
    means_CD = class_means(F.normalize(support.features, dim=1), support.targets, len(support.means_CD))
    return F.normalize(x, dim=1) @ F.normalize(means_CD, dim=1).t()


def centred_cosine(support: Support, x: Tensor, _: Tensor) -> Tensor:
    means_CD = F.normalize(support.means_CD - support.centre_D, dim=1)
    return F.normalize(x - support.centre_D, dim=1) @ means_CD.t()


def neighbours(support: Support, x: Tensor, _: Tensor, k: int) -> Tensor:
    """Log share of each class among the k nearest by cosine; the similarities break ties."""
    similar = F.normalize(x, dim=1) @ F.normalize(support.features, dim=1).t()
    top, index = similar.topk(k, dim=1)
    votes_BC = x.new_zeros(len(x), len(support.means_CD)).scatter_add(1, support.targets[index], 1.0 + 1e-3 * top)
    return (votes_BC / k + 1e-3).log()


def lda(support: Support, _: Tensor, rotated: Tensor, shrinkage: float) -> Tensor:
    """Gaussian discriminants with equal priors, z'm - |m|²/2."""
    root_D = support.root(shrinkage)
    z_BD, m_CD = rotated * root_D, support.rotated_means_CD * root_D
    return z_BD @ m_CD.t() - 0.5 * m_CD.square().sum(1)


def lda_ledoit_wolf_pooled(support: Support, x: Tensor, rotated: Tensor) -> Tensor:
    """LDA with the shrinkage of Ledoit & Wolf (2004) of the pooled within-class residuals."""
    return lda(support, x, rotated, float(ledoit_wolf_shrinkage(support.residuals.numpy(), assume_centered=True)))


def lda_ledoit_wolf(support: Support, x: Tensor, _: Tensor) -> Tensor:
    """scikit-learn's LDA, which shrinks each class's covariance by Ledoit & Wolf (2004) and then averages."""
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    model.fit(support.features.numpy(), support.targets.numpy())
    return torch.from_numpy(model.decision_function(x.numpy())).float()


def faim_metric(support: Support, _: Tensor, rotated: Tensor, shrinkage: float) -> Tensor:
    """-d_F with λ = 0."""
    root_D = support.root(shrinkage)
    return -torch.cdist(rotated * root_D, support.rotated_means_CD * root_D)


def faim_indicatrix(support: Support, _: Tensor, rotated: Tensor, shrinkage: float, lmbda: float) -> Tensor:
    """-d_F of (x - c) / F(x - c) to the class means, brought to F = 1 likewise; F(v) = |z| + λ |b'z|, z = Σ^½ v."""
    root_D = support.root(shrinkage)
    z_BD, m_CD = rotated * root_D, support.rotated_means_CD * root_D
    if lmbda == 0.0:
        return -torch.cdist(F.normalize(z_BD, dim=1), F.normalize(m_CD, dim=1))
    b_D = support.leading(m_CD)
    z_BD, m_CD = (v / (v.norm(dim=1) + lmbda * (v @ b_D).abs()).clamp_min(1e-12)[:, None] for v in (z_BD, m_CD))
    return -(torch.cdist(z_BD, m_CD) + lmbda * ((z_BD @ b_D)[:, None] - m_CD @ b_D).abs())


def _choices(scores: Callable[..., Tensor], **grids: tuple) -> list[tuple[dict, Scores]]:
    """Every combination of the grids' values; the first is the default where nothing can be selected."""
    options: list[dict] = [{}]
    for name, values in grids.items():
        options = [o | {name: value} for o in options for value in values]
    return [(o, partial(scores, **o)) for o in options]


def _default_first(values: tuple, default: float) -> tuple:
    return (default, *(v for v in values if v != default))


_A, _L = _default_first(SHRINKAGES, 0.3), _default_first(WEIGHTS, 0.1)
METHODS: dict[str, list[tuple[dict, Scores]]] = {
    "euclidean": _choices(euclidean),
    "cosine": _choices(cosine),
    "centred_cosine": _choices(centred_cosine),
    "knn": _choices(neighbours, k=NEIGHBOURS),
    "lda_0.3": _choices(lda, shrinkage=(0.3,)),
    "lda_cv": _choices(lda, shrinkage=_A),
    "lda_ledoit_wolf_pooled": _choices(lda_ledoit_wolf_pooled),
    "lda_ledoit_wolf": _choices(lda_ledoit_wolf),
    "faim_metric_0.3": _choices(faim_metric, shrinkage=(0.3,)),
    "faim_indicatrix_0.3": _choices(faim_indicatrix, shrinkage=(0.3,), lmbda=(0.0,)),
    "faim_indicatrix_cv": _choices(faim_indicatrix, shrinkage=_A, lmbda=(0.0,)),
    "faim_indicatrix_eye": _choices(faim_indicatrix, shrinkage=(1.0,), lmbda=(0.0,)),
    "faim_indicatrix_cv_beta": _choices(faim_indicatrix, shrinkage=_A, lmbda=_L),
}


def folds(targets_N: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stratified (training, held-out) indices; none where a class has a single image."""
    count = min(FOLDS, int(torch.bincount(targets_N).min()))
    if count < 2:
        return
    order = torch.randperm(len(targets_N), generator=torch.Generator().manual_seed(seed))
    fold_N = torch.empty_like(targets_N)
    for label in targets_N.unique():
        members = order[targets_N[order] == label]
        fold_N[members] = torch.arange(len(members)) % count
    for fold in range(count):
        yield (fold_N != fold).nonzero().flatten(), (fold_N == fold).nonzero().flatten()


def run(
    features_VND: Tensor, targets_N: Tensor, val_ND: Tensor, num_classes: int, seed: int, names: list[str]
) -> dict[str, tuple[Tensor, dict, bool]]:
    """Logits on ``val``, chosen options, and whether cross-validation set a temperature, for each method.

    Options are chosen by held-out accuracy (then likelihood), the temperature by held-out likelihood. sklearn's LDA,
    by far the slowest, has no option to choose and takes the temperature 1 of its own posterior.
    """
    held: dict[tuple[str, int], list[Tensor]] = {}
    held_targets = []
    for train, test in folds(targets_N, seed):
        support = Support(features_VND[:, train], targets_N[train], num_classes)
        x = features_VND[0, test]
        rotated = (x - support.centre_D) @ support.V_DD
        held_targets.append(targets_N[test])
        for name in names:
            if name != "lda_ledoit_wolf":
                for i, (_, scores) in enumerate(METHODS[name]):
                    held.setdefault((name, i), []).append(scores(support, x, rotated))
    support = Support(features_VND, targets_N, num_classes)
    rotated = (val_ND - support.centre_D) @ support.V_DD
    results = {}
    for name in names:
        best, temperature = 0, 1.0
        if (name, 0) in held:
            y = torch.cat(held_targets)
            logits = [torch.cat(held[name, i]) for i in range(len(METHODS[name]))]
            fits = [_temperature(each, y) for each in logits]
            accuracies = [(each.argmax(1) == y).float().mean().item() for each in logits]
            best = max(range(len(logits)), key=lambda i: (accuracies[i], -fits[i][1]))
            temperature = fits[best][0]
        options, scores = METHODS[name][best]
        calibrated = (name, 0) in held or name == "lda_ledoit_wolf"
        results[name] = (scores(support, val_ND, rotated) * temperature, options, calibrated)
    return results


def _temperature(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """The factor of the logits with the best likelihood, and its negative log likelihood."""
    losses = torch.stack([F.cross_entropy(logits * t, targets) for t in TEMPERATURES])
    return TEMPERATURES[losses.argmin()].item(), losses.min().item()
