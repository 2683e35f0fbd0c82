"""Scores of "how well known is this image", larger for known classes, of one head and the features it sees.

Shapes: N training and B test images, C classes, D features of a part.
"""

from collections.abc import Iterator
from fractions import Fraction

import torch
from heads import class_means
from torch import Tensor
from torch.nn import functional as F

from timm_faim import FAIMHead, fit_
from timm_faim.calibration import fit_temperature, known_score

CHOSEN, NEAREST = "3/4 probability, rest distance, at 2 T", "nearest prototype = max logit"
SHRINKAGE = 0.3  # as the head's own
FOLDS = 5
MOMENTS_WEIGHT = 0.75  # as models with moments have it
Parts = dict[str, Tensor]  # name -> features of a part, of the same images
Scores = dict[tuple[str, float | None], Tensor]  # (name, parameter) -> [B]


def joined(parts: Parts, names: tuple[str, ...]) -> Tensor:
    """Parts side by side, as a head takes them."""
    return torch.cat([parts[name] for name in names], 1)


def fitted_head(x: Tensor, widths: list[int], y: Tensor, classes: int) -> FAIMHead:
    """A FAIM head in closed form."""
    parts = {} if len(widths) == 1 else {"parts": widths, "part_weights": (1.0 - MOMENTS_WEIGHT, MOMENTS_WEIGHT)}
    return fit_(FAIMHead(x.shape[1], classes, **parts), [(x, y)]).eval()


def cross_folds(y: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stratified (training, held-out) indices; the one image of a class is never held out."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    fold_N = torch.full_like(y, -1)
    for i, label in enumerate(y.unique()):
        members = order[y[order] == label]
        if len(members) > 1:
            fold_N[members] = (torch.arange(len(members)) + i) % count
    for fold in fold_N.unique():
        if fold >= 0:
            yield (fold_N != fold).nonzero().flatten(), (fold_N == fold).nonzero().flatten()


@torch.no_grad()
def held_out_logits(x: Tensor, widths: list[int], y: Tensor, classes: int, count: int, seed: int = 0):
    """Logits of training images under heads fitted without them, and their classes; None where nothing can be."""
    logits, targets = [], []
    for train, held in cross_folds(y, count, seed):
        logits.append(fitted_head(x[train], widths, y[train], classes)(x[held]))
        targets.append(y[held])
    return (torch.cat(logits), torch.cat(targets)) if logits else None


class Gaussian:
    """|v|² under the inverse of a shrunk covariance of rows, per feature; in the space of the rows."""

    def __init__(self, rows: Tensor, degrees: int) -> None:
        rows = rows.double()
        e, V = torch.linalg.eigh(rows @ rows.t() if len(rows) < rows.shape[1] else rows.t() @ rows)
        kept = e > 1e-10 * e[-1]
        e, V = e[kept], V[:, kept]
        self.U = ((rows.t() @ V) / e.sqrt() if len(rows) < rows.shape[1] else V).float()
        self.floor = SHRINKAGE * (rows.square().sum() / degrees / rows.shape[1])
        self.gain = 1.0 - self.floor / ((1.0 - SHRINKAGE) * e / degrees + self.floor)

    def whiten(self, v: Tensor) -> Tensor:
        """Rows whose squares add up to it."""
        shrunk = (v @ self.U) * (1.0 - (1.0 - self.gain).sqrt()).float()
        return (v - shrunk @ self.U.t()) / (self.floor * v.shape[1]).sqrt().float()


class Known:
    """Head, training features and Gaussians of the known classes."""

    def __init__(self, seen: Parts, names: tuple[str, ...], y: Tensor, classes: int, T: float) -> None:
        self.names, self.y, self.classes, self.T = names, y, classes, T
        self.seen, self.x = seen, joined(seen, names)
        self.widths = [seen[name].shape[1] for name in names]
        self.head = fitted_head(self.x, self.widths, y, classes)
        shares = (1.0,) if len(names) == 1 else (1.0 - MOMENTS_WEIGHT, MOMENTS_WEIGHT)
        self.shares = dict(zip(names, shares, strict=True))

    @torch.no_grad()
    def logit_scores(self, logits: Tensor) -> Scores:
        """What the logits alone say; the distance to the nearest prototype is the largest logit. GEN: a generalised
        entropy, Σ (p (1 - p))^0.1 (Liu et al. 2023, CVPR)."""
        log_p, best = (logits / self.T).log_softmax(1), logits.topk(2, 1).values
        energy = (logits / self.T).logsumexp(1)
        found: Scores = {
            (NEAREST, None): best[:, 0],
            ("probability at T", None): log_p.amax(1),
            ("probability at γ = 16", None): logits.log_softmax(1).amax(1),
            ("margin of the two best", None): best[:, 0] - best[:, 1],
            ("energy at T", None): energy,
            ("negative entropy at T", None): (log_p.exp() * log_p).sum(1),
            ("GEN at T", None): -(log_p.exp() * -torch.expm1(log_p)).clamp_min(0.0).pow(0.1).sum(1),
            ("probability at 2 T", None): (logits / (2.0 * self.T)).log_softmax(1).amax(1),
            ("probability at 4 T", None): (logits / (4.0 * self.T)).log_softmax(1).amax(1),
            ("nearest - mean of all", None): best[:, 0] - logits.mean(1),
            ("nearest and probability, half each", None): best[:, 0] / self.T - 0.5 * energy,
        }
        warm = logits / (2.0 * self.T)
        for share in ("1/2", "9/10"):
            found[f"{share} probability, rest distance, at 2 T", None] = warm.amax(1) - float(
                Fraction(share)
            ) * warm.logsumexp(1)
        found[CHOSEN, None] = known_score(logits / self.T)
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            found["nearest and probability, share by CV", share] = best[:, 0] / self.T - share * energy
        for temper in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
            found["probability, temperature by CV", temper] = (logits / (temper * self.T)).log_softmax(1).amax(1)
        return found

    @torch.no_grad()
    def feature_scores(self, test: Parts, logits: Tensor) -> Scores:
        """Those that need the features, and parameters that are to be chosen."""
        x, found = joined(test, self.names), {}
        spaces = {
            "features": (self._normalised(self.seen), self._normalised(test)),
            "whitened sphere": (self.head.embed(self.x), self.head.embed(x)),
        }
        for space, (bank, points) in spaces.items():
            nearest = (points @ bank.t()).topk(min(20, len(bank)), 1).values
            for k in (k for k in (1, 2, 3, 5, 10, 20) if k <= nearest.shape[1]):
                found[f"kNN, {space}", k] = nearest[:, k - 1]
        cosine = 1.0 - 0.5 * (logits / self.head.gamma()).square()
        points = spaces["whitened sphere"][1]
        Q, R = torch.linalg.qr(self.head.project(self.head.mu).t())
        residual = (points - (points @ Q) @ Q.t()).norm(dim=1)
        norm = self.head._in_first_frame(x[:, : self.widths[0]]).norm(dim=1).log()
        for share in (0.0, 0.25, 0.5, 1.0, 2.0):
            found["nearest, - share · whitened residual", share] = cosine.amax(1) - share * residual
        for share in (-0.3, -0.1, 0.0, 0.1, 0.3):
            found["nearest, - share · log whitened norm", share] = cosine.amax(1) - share * norm
        return found | self._vim(x, cosine)

    def _vim(self, x: Tensor, cosine: Tensor) -> Scores:
        """Virtual-logit matching (Wang et al. 2022, arXiv:2203.10807), logits γ cos / T."""
        factor = self.head.gamma() / self.T
        weights = []
        for name in self.names:
            v = self.seen[name]
            size = (v - v.mean(0)).square().sum(1).mean()
            weights.append((self.shares[name] / size).sqrt().expand(v.shape[1]))
        scale, centre = torch.cat(weights), self.x.mean(0)
        rows, tests = (self.x - centre) * scale, (x - centre) * scale
        e, V = torch.linalg.eigh((rows @ rows.t()).double())
        e, V = e.flip(0)[:512], V.flip(1)[:, :512]
        U = ((V[:, e > 1e-8 * e[0]].t() @ rows.double()) / e[e > 1e-8 * e[0]].sqrt()[:, None]).to(rows)
        own = factor * (1.0 - 0.5 * (self.head(self.x) / self.head.gamma()).square()).amax(1)
        found: Scores = {}
        for kept in (d for d in (16, 32, 64, 128, 256, 512) if d < 0.8 * len(rows)):
            V = U[:kept]
            seen_r, r = ((v - (v @ V.t()) @ V).norm(dim=1) for v in (rows, tests))
            alpha = own.mean() / seen_r.mean()
            found["ViM", kept] = (factor * cosine).logsumexp(1) - alpha * r
        return found

    def _normalised(self, parts: Parts) -> Tensor:
        return torch.cat([F.normalize(parts[n], dim=1) * self.shares[n] ** 0.5 for n in self.names], 1)

    @torch.no_grad()
    def gaussian_scores(self, test: Parts) -> Scores:
        """Mahalanobis distance to the nearest class mean (Lee et al. 2018, arXiv:1807.03888), and relative to that
        from the mean of all (Ren et al. 2021, arXiv:2106.09022); of parts the weighted means."""
        nearest: Tensor | float = 0.0
        whole: Tensor | float = 0.0
        for name in self.names:
            x, v = self.seen[name], test[name]
            means, centre = class_means(x.double(), self.y, self.classes).to(x), x.mean(0)
            within = Gaussian(x - means[self.y], len(x) - self.classes)
            total = Gaussian(x - centre, len(x) - 1)
            distances = torch.cdist(within.whiten(v - centre), within.whiten(means - centre)).square()
            nearest = nearest + self.shares[name] * distances
            whole = whole + self.shares[name] * total.whiten(v - centre).square().sum(1)
        return {("Mahalanobis", None): -nearest.amin(1), ("relative Mahalanobis", None): whole - nearest.amin(1)}


def all_scores(known: Known, test: Parts, features: bool, gaussians: bool) -> tuple[Scores, Tensor]:
    """Every score of test images, and their logits."""
    with torch.no_grad():
        logits = known.head(joined(test, known.names))
    found = known.logit_scores(logits) | (known.feature_scores(test, logits) if features else {})
    return found | (known.gaussian_scores(test) if gaussians else {}), logits


def pseudo_unknown(y: Tensor, classes: int, seed: int, groups: int = 3) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of training images: (those to fit, held-out ones of their classes, those of a group of classes taken as unknown),
    as indices."""
    group_C = torch.randperm(classes, generator=torch.Generator().manual_seed(seed)) % groups
    held = next(iter(cross_folds(y, 3, seed)))[1]
    is_held = torch.zeros(len(y), dtype=torch.bool)
    is_held[held] = True
    for g in range(groups):
        out = group_C[y] == g
        yield ((~out & ~is_held).nonzero().flatten(), (~out & is_held).nonzero().flatten(), out.nonzero().flatten())


def chosen_parameters(seen: Parts, names: tuple[str, ...], y: Tensor, classes: int, T: float, seed: int, measure):
    """name -> the parameter with the best mean of ``measure(known, unknown)`` over groups of training classes."""
    totals: dict[tuple[str, float | None], float] = {}
    for fit, held, out in pseudo_unknown(y, classes, seed):
        own = y[fit].unique()
        known = Known({p: x[fit] for p, x in seen.items()}, names, torch.searchsorted(own, y[fit]), len(own), T)
        rows = torch.cat([held, out])
        scores, _ = all_scores(known, {p: x[rows] for p, x in seen.items()}, features=True, gaussians=False)
        for key, value in scores.items():
            if key[1] is not None:
                totals[key] = totals.get(key, 0.0) + measure(value[: len(held)], value[len(held) :])
    best: dict[str, float | None] = {}
    for (name, parameter), total in totals.items():
        if name not in best or total > totals[name, best[name]]:
            best[name] = parameter
    return best


def by_name(scores: Scores, parameters: dict[str, float | None]) -> dict[str, Tensor]:
    """The scores at their parameters."""
    return {name: value for (name, p), value in scores.items() if p is None or parameters.get(name) == p}


def temperature(seen: Parts, names: tuple[str, ...], y: Tensor, classes: int) -> float:
    """T from training images, each under a head that is fitted without it."""
    x, widths = joined(seen, names), [seen[name].shape[1] for name in names]
    return fit_temperature(*held_out_logits(x, widths, y, classes, FOLDS), doubt=1.0)
