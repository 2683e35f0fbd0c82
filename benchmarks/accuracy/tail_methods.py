"""Classifiers of frozen parts of features for unequal classes, each with the strengths that folds choose between.

Every family gives scores for each of its options; what differs between options is what is meant for rare classes. Of a
part "FAIM" is the cosine with the class mean in the frame of Σ, "LDA" and "nearest class mean" as in ``refits.py``;
scores of two parts are blended with fixed weights.

Shapes: N images, C classes, T test images, D features.
"""

import torch
from refits import DEFAULT_WEIGHT, PartFit
from torch import Tensor
from torch.nn import functional as F

from timm_faim.head.sharing import share_prototypes

Scores = dict[tuple[str, str], Tensor]  # (family, option) -> [T, C]
BLEND = {"mean": 1.0 - DEFAULT_WEIGHT, "moments": DEFAULT_WEIGHT}

SHARES = (0.0, 0.5, 1.0, 2.0)
PRIORS = (0.0, -0.01, -0.02, -0.03, -0.05, 0.01)  # τ of τ log n_k, in units of a cosine
LDA_PRIORS = (0.0, -0.05, -0.1, -0.2, -0.4, 0.05)  # in units of a discriminant at its own class mean
NEIGHBOURLY, CONCENTRATION = (0.0, 0.5, 1.0, 2.0), 16.0
LIFT, RIDGES, RIDGE_PRIORS = 5_000, (1e-3, 1e-2, 0.1, 1.0), (0.0, -0.02, -0.05, -0.1)
DECAYS, ADJUSTMENTS, MARGINS = (1e-5, 1e-4), (0.0, 0.5, 1.0, 1.5, 2.0, 3.0), (1.0, 3.0, 10.0)
SCALE, STEPS = 16.0, 40  # of unit features of the logistic regressions; of L-BFGS


def closed_forms(seen: dict[str, Tensor], y: Tensor, classes: int, test: dict[str, Tensor]) -> Scores:
    """FAIM with prototypes shared or not and with a prior, LDA and the nearest class mean."""
    counts_C = torch.bincount(y, minlength=classes)
    fits = {part: PartFit(x, y, classes) for part, x in seen.items()}
    means = {part: fit.frame(fit.means_CD) for part, fit in fits.items()}
    points = {part: F.normalize(fit.frame(test[part]), dim=1) for part, fit in fits.items()}

    def cosines(prototypes: dict[str, Tensor]) -> Tensor:
        return sum(BLEND[p] * points[p] @ F.normalize(m, dim=1).t() for p, m in prototypes.items())

    log_C, found = counts_C.float().log(), {}
    shared = {s: cosines({p: share_prototypes(m, counts_C, s) for p, m in means.items()}) for s in SHARES}
    found |= {("FAIM shared", str(s)): scores for s, scores in shared.items()}
    found |= {("FAIM + prior", str(t)): shared[0.0] + t * log_C for t in PRIORS}
    found |= {("FAIM shared + prior", f"{s}, {t}"): shared[s] + t * log_C for s in SHARES for t in PRIORS}
    look_CC = sum(BLEND[p] * F.normalize(m, dim=1) @ F.normalize(m, dim=1).t() for p, m in means.items())
    for v in NEIGHBOURLY:
        found["FAIM, softmax of look-alikes", str(v)] = cosines(
            {p: softmax_shared(m, counts_C, v, look_CC) for p, m in means.items()}
        )
    lda = sum(BLEND[p] * fits[p].scores("LDA", test[p]) for p in fits)
    found |= {("LDA + prior", str(t)): lda + t * log_C for t in LDA_PRIORS}
    near = sum(BLEND[p] * fits[p].scores("Σ = I", test[p]) for p in fits)
    found |= {("nearest class mean + prior", str(t)): near + t * log_C for t in PRIORS}
    return found


def softmax_shared(means_CD: Tensor, counts_C: Tensor, v: float, cosines_CC: Tensor) -> Tensor:
    """(n_k m_k + v Σ_j p_kj m_j) / (n_k + v), p_k the softmax of β cos + log n over the other classes."""
    logits_CC = (CONCENTRATION * cosines_CC + counts_C.log()).fill_diagonal_(-torch.inf)
    n_C1 = counts_C[:, None].to(means_CD)
    return (n_C1 * means_CD + v * logits_CC.softmax(1) @ means_CD) / (n_C1 + v)


def ranpac(seen: dict[str, Tensor], y: Tensor, classes: int, test: dict[str, Tensor]) -> Scores:
    """Ridge regression on random ReLU features (McDonnell et al. 2023), images weighed alike or classes alike."""
    counts_C = torch.bincount(y, minlength=classes).float()
    one_hot, found = F.one_hot(y, classes).double(), {}
    for part, x in seen.items():
        W = torch.randn(x.shape[1], LIFT, generator=torch.Generator().manual_seed(0))
        lifted = (x @ W).relu_()
        unit = lifted.square().sum(1).mean().sqrt()
        lifted, other = lifted / unit, (test[part] @ W).relu_() / unit
        gram, cross = (lifted @ lifted.t()).double(), (other @ lifted.t()).double()
        for name, power in (("images", 0.0), ("classes", 1.0)):
            cost_N = (counts_C[y] / counts_C.mean()).double() ** power
            for ridge in RIDGES:
                scores = (cross @ torch.linalg.solve(gram + torch.diag(ridge * cost_N), one_hot)).float()
                for t in RIDGE_PRIORS:
                    key = ("RanPAC", f"{name}, {ridge:g}, {t}")
                    found[key] = found.get(key, 0.0) + BLEND[part] * (scores + t * counts_C.log())
    return found


def logistic(seen: dict[str, Tensor], y: Tensor, classes: int, test: dict[str, Tensor]) -> Scores:
    """Logistic regressions on unit features: logit adjustment, LDAM's margin, and class-balanced (cRT)."""
    x, t = joined(seen, seen), joined(seen, test)
    e, Q = torch.linalg.eigh((x @ x.t()).double())
    kept = e > 1e-6 * e[-1]
    Q, root = Q[:, kept].float(), e[kept].sqrt().float()
    x, t = Q * root, (t @ x.t()) @ Q / root  # the same regression in N coordinates
    counts_C = torch.bincount(y, minlength=classes).float()
    prior_C, margin_C = (counts_C / counts_C.sum()).log(), (counts_C.min() / counts_C) ** 0.25
    alike_N, balanced_N = torch.ones(len(y)) / len(y), 1.0 / (counts_C[y] * classes)
    found = {}
    for decay in DECAYS:
        plain = None
        for tau in ADJUSTMENTS:
            weight = regression(x, y, tau * prior_C, alike_N, decay, plain)
            plain = weight if plain is None else plain
            found["logistic regression, logit adjustment", f"{decay:g}, {tau}"] = t @ weight[:-1] + weight[-1]
        for margin in MARGINS:
            offset_NC = -margin * margin_C * F.one_hot(y, classes)
            weight = regression(x, y, offset_NC, alike_N, decay, plain)
            found["LDAM", f"{decay:g}, {margin}"] = t @ weight[:-1] + weight[-1]
        weight = regression(x, y, torch.zeros(classes), balanced_N, decay, plain)
        found["cRT", f"{decay:g}"] = t @ weight[:-1] + weight[-1]
    plain = [key for key in found if key[1].endswith(", 0.0")]
    return found | {("logistic regression", option): found[family, option] for family, option in plain}


def joined(seen: dict[str, Tensor], parts: dict[str, Tensor]) -> Tensor:
    """Parts around the mean of the seen ones on their spheres, side by side."""
    return SCALE * torch.cat(
        [BLEND[p] ** 0.5 * F.normalize(x - seen[p].mean(0), dim=1) for p, x in parts.items()], dim=1
    )


def regression(
    x: Tensor, y: Tensor, offset: Tensor, cost_N: Tensor, decay: float, start: Tensor | None = None
) -> Tensor:
    """Weights and bias [r + 1, C] that minimise the weighed cross entropy of logits plus ``offset``, by L-BFGS."""
    classes = offset.shape[-1]
    weight = (torch.zeros(x.shape[1] + 1, classes) if start is None else start.clone()).requires_grad_()
    optimiser = torch.optim.LBFGS([weight], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        losses_N = F.cross_entropy(x @ weight[:-1] + weight[-1] + offset, y, reduction="none")
        loss = (cost_N * losses_N).sum() + 0.5 * decay * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach()


FAMILIES = (closed_forms, ranpac, logistic)
