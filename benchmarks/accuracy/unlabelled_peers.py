"""Peers that are given unlabelled images, on the points of a FAIM head's whitened sphere: the same features for all.

Shapes: N labelled and U unlabelled points, C classes, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from timm_faim import FAIMHead

NEIGHBOURS, ALPHA = 10, 0.8  # of label propagation
HUB, SHARE = 20, 0.5


def cosines(head: FAIMHead, z_UD: Tensor) -> Tensor:
    return z_UD @ F.normalize(head.mu, dim=1).t()


def hub_corrected(head: FAIMHead, z_UD: Tensor) -> Tensor:
    """Cosines less half of the mean of a prototype's nearest 20 points (as CSLS, Lample et al. 2018)."""
    found = cosines(head, z_UD)
    return found - SHARE * found.topk(min(HUB, len(found)), 0).values.mean(0)


def label_propagation(case, z_UD: Tensor) -> Tensor:
    """Zhou et al. 2004, on a graph of the 10 nearest neighbours with cosines cubed (Iscen et al. 2019)."""
    points = torch.cat([case.z, z_UD])
    near = points @ points.t()
    near.fill_diagonal_(0.0)
    values, columns = near.topk(NEIGHBOURS, 1)
    graph = torch.zeros_like(near).scatter_(1, columns, values.clamp_min(0.0) ** 3)
    graph = graph + graph.t()
    root = graph.sum(1).clamp_min(1e-12).rsqrt()
    graph = root[:, None] * graph * root
    start = torch.zeros(len(points), case.classes)
    start[: len(case.z)] = F.one_hot(case.y, case.classes).float()
    spread = start
    for _ in range(50):
        spread = ALPHA * (graph @ spread) + (1.0 - ALPHA) * start
    spread = spread / spread.sum(0).clamp_min(1e-12)
    return spread[len(case.z) :]


def laplacian_shot(case, z_UD: Tensor) -> Tensor:
    """Distances to prototypes and the votes of 3 unlabelled neighbours (Ziko et al. 2020, λ = 0.7 of theirs)."""
    distance = 2.0 - 2.0 * cosines(case.head, z_UD)
    near = z_UD @ z_UD.t()
    near.fill_diagonal_(-2.0)
    columns = near.topk(min(3, len(z_UD) - 1), 1).indices
    graph = torch.zeros_like(near).scatter_(1, columns, 1.0)
    scores = -distance
    p = scores.softmax(1)
    for _ in range(20):
        scores = -distance + 0.7 * (graph @ p)
        p = scores.softmax(1)
    return scores


def _logits(z: Tensor, weight: Tensor, scale: float) -> Tensor:
    return scale * z @ F.normalize(weight, dim=1).t()


@torch.enable_grad()
def tim(case, z_UD: Tensor) -> Tensor:
    """Mutual information of the unlabelled images with cross entropy of the labelled ones (Boudiaf et al. 2020): 150
    steps of Adam on the prototypes, weights 1 of the entropy of the mean, 0.1 of the mean entropy, 0.1 of labels, as
    theirs; the logits' scale is the head's calibrated one."""
    scale, weight = 16.0 / case.T, F.normalize(case.head.mu.detach(), dim=1).requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(150):
        log_p = _logits(z_UD, weight, scale).log_softmax(1)
        mean = log_p.exp().mean(0)
        loss = (mean * mean.clamp_min(1e-12).log()).sum() - 0.1 * (log_p.exp() * log_p).sum(1).mean()
        loss = loss + 0.1 * F.cross_entropy(_logits(case.z, weight, scale), case.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return _logits(z_UD, weight, scale).detach()


@torch.enable_grad()
def _logistic(z: Tensor, y: Tensor, share: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Weighted logistic regression on the sphere by L-BFGS, ridge 1e-3 at scale 16."""
    weight = torch.zeros(classes, z.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=40, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        each = F.cross_entropy(16.0 * z @ weight.t(), y, reduction="none")
        value = (each * share).sum() / share.sum() + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    final = weight.detach()
    return lambda points: 16.0 * points @ final.t()


def self_training(case, z_UD: Tensor) -> Tensor:
    """Logistic regression, three rounds in which the surer half of the unlabelled images joins with its labels."""
    predict = _logistic(case.z, case.y, torch.ones(len(case.y)), case.classes)
    for _ in range(3):
        best = predict(z_UD).softmax(1).max(1)
        sure = best.values >= best.values.median()
        z, y = torch.cat([case.z, z_UD[sure]]), torch.cat([case.y, best.indices[sure]])
        predict = _logistic(z, y, torch.ones(len(y)), case.classes)
    return predict(z_UD)


def logistic(case, z_UD: Tensor) -> Tensor:
    return _logistic(case.z, case.y, torch.ones(len(case.y)), case.classes)(z_UD)


PEERS = {"label propagation": label_propagation, "LaplacianShot": laplacian_shot}
SLOW = {  # on the mean alone
    "TIM": tim,
    "logistic regression, without": logistic,
    "logistic regression, self-trained": self_training,
}
