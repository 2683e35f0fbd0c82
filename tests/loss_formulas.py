"""The losses by their formulas, in loops over a float64 matrix of literal distances: what the tests compare with."""

import functools

import torch
from torch.nn import functional as F

from timm_faim import FAIMInfoNCELoss, FAIMNPairLoss, FAIMTripletLoss

TEMPERATURE, MARGIN = 0.4, 0.7

LOSSES = {
    "ntxent": functools.partial(FAIMInfoNCELoss, temperature=TEMPERATURE),
    "supcon": functools.partial(FAIMInfoNCELoss, temperature=TEMPERATURE, form="supcon"),
    "npair": functools.partial(FAIMNPairLoss, temperature=TEMPERATURE),
    **{
        f"{mining}{'-soft' if soft else ''}": functools.partial(
            FAIMTripletLoss, margin=MARGIN, mining=mining, soft_margin=soft
        )
        for mining in ("batch-hard", "semi-hard", "all")
        for soft in (False, True)
    },
}
MATRIX_LOSSES = [name for name in LOSSES if name != "npair"]  # these have rows to go through in blocks


def build(name, metric=None, **options):
    return LOSSES[name](metric, **options)


def relative_error(value, oracle):
    return ((value.double() - oracle).norm() / oracle.norm().clamp_min(1e-12)).item()


# d is a matrix of distances [B, N]; positives and negatives are lists of columns, one a row.


def mean(terms, like):
    return torch.stack(terms).mean() if terms else like.sum() * 0


def oracle_ntxent(d, positives, negatives):
    e = torch.exp(-d / TEMPERATURE)
    return mean(
        [
            -torch.log(e[i, p] / (e[i, p] + sum(e[i, n] for n in negatives[i])))
            for i in range(len(d))
            for p in positives[i]
        ],
        d,
    )


def oracle_supcon(d, positives, negatives):
    e = torch.exp(-d / TEMPERATURE)
    anchors = []
    for i in range(len(d)):
        others = sum(e[i, j] for j in positives[i] + negatives[i])
        if positives[i]:
            anchors.append(mean([-torch.log(e[i, p] / others) for p in positives[i]], d))
    return mean(anchors, d)


def oracle_triplets(d, triplets, soft, only_positive):
    differences = [d[a, p] - d[a, n] for a, p, n in triplets]
    if soft:
        return mean([torch.log1p(torch.exp(t)) for t in differences], d)
    losses = [torch.relu(t + MARGIN) for t in differences]
    return mean([loss for loss in losses if loss > 0 or not only_positive], d)


def chosen_triplets(mining, d, positives, negatives):
    rows = [i for i in range(len(d)) if positives[i] and negatives[i]]
    if mining == "all":
        return [(i, p, n) for i in rows for p in positives[i] for n in negatives[i]]
    if mining == "batch-hard":
        return [(i, max(positives[i], key=lambda j: d[i, j]), min(negatives[i], key=lambda j: d[i, j])) for i in rows]
    triplets = []
    for i in rows:
        for p in positives[i]:
            farther = [n for n in negatives[i] if d[i, n] > d[i, p]]
            n = min(farther, key=lambda j: d[i, j]) if farther else max(negatives[i], key=lambda j: d[i, j])
            triplets.append((i, p, n))
    return triplets


def oracle_npair(d, labels, ref_labels, is_own):
    chosen = []
    for c in sorted(set(labels.tolist())):
        anchors = [i for i, label in enumerate(labels) if label == c]
        positives = [j for j, label in enumerate(ref_labels) if label == c]
        if is_own:
            positives = positives[1:]
        if positives:
            chosen.append((anchors[0], positives[0]))
    e = torch.exp(-d / TEMPERATURE)
    return mean([-torch.log(e[a, p] / sum(e[a, other] for _, other in chosen)) for a, p in chosen], d)


def oracle(name, metric, x, labels, ref=None, ref_labels=None, indices=None, normalize=False):
    """The loss by its formula and the literal distance."""
    is_own = ref is None
    x = F.normalize(x, dim=1) if normalize else x
    y, ref_labels = (x, labels) if is_own else (F.normalize(ref, dim=1) if normalize else ref, ref_labels)
    d = metric.reference(x, y)
    if name == "npair":
        return oracle_npair(d, labels, ref_labels, is_own)
    mining, soft = name.removesuffix("-soft"), name.endswith("-soft")
    is_triplet = name not in ("ntxent", "supcon")
    if indices is not None and len(indices) == 3 and is_triplet:
        return oracle_triplets(d, zip(*(t.tolist() for t in indices), strict=True), soft, mining == "all")
    B, N = d.shape
    if indices is None:
        positives = [[j for j in range(N) if labels[i] == ref_labels[j] and not (is_own and i == j)] for i in range(B)]
        negatives = [[j for j in range(N) if labels[i] != ref_labels[j]] for i in range(B)]
    else:
        a, p, b, n = (t.tolist() for t in (indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])))
        positives = [sorted({j for i, j in zip(a, p, strict=True) if i == row}) for row in range(B)]
        negatives = [sorted({j for i, j in zip(b, n, strict=True) if i == row}) for row in range(B)]
    if not is_triplet:
        return (oracle_ntxent if name == "ntxent" else oracle_supcon)(d, positives, negatives)
    return oracle_triplets(d, chosen_triplets(mining, d, positives, negatives), soft, mining == "all")


def mined(labels, ref_labels, is_own, triplets, seed):
    """About half of all pairs or triplets, as a miner would give them."""
    same = labels[:, None] == ref_labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool) if is_own else same
    every = (positive[:, :, None] & ~same[:, None, :]).nonzero() if triplets else None
    generator = torch.Generator().manual_seed(seed)

    def some(rows):
        return rows[torch.rand(len(rows), generator=generator) < 0.5].unbind(1)

    return some(every) if triplets else (*some(positive.nonzero()), *some((~same).nonzero()))
