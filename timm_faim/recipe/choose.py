"""A plan chosen by cross-validation on features of the training images; no image is held out for it.

Each candidate is measured in two kinds of folds: look-alikes held out together, which is how images of another day are,
and images held out at random. Its score is the mean over both of the accuracy by class, so that rare classes count.

Shapes: N images, C classes, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timm_faim.calibration import FOLDS, lookalike_folds, same_image
from timm_faim.head import FAIMHead

from .part import Frame, Part
from .plan import SHRINKAGE, SINGLE_WEIGHT, WEIGHT, Plan

WEIGHTS, SHARES = (0.6, 0.75, 0.85, 0.92, 1.0), (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
LEAST, MOST = 20, 10_000  # held-out images: fewer say nothing, more are not needed
MOST_CLASSES = 2_000  # beyond, sharing is not tried: it costs C³
_ROWS = 1 << 22  # numbers in a block of cosines


@dataclass(frozen=True)
class Chosen:
    """A plan, its score in [0, 1] (None: too little data to choose), and scores of simpler plans by name."""

    plan: Plan
    score: float | None
    simpler: dict[str, float]

    def lines(self, names: Sequence[str]) -> list[str]:
        """The plan in words, with what each choice is worth; parts by name."""
        plan = self.plan
        moments = " and ".join(names[i] for i in plan.parts[1:])
        what = [f"{names[0]} and {moments}, {100 * plan.weight:g} % of the distance" if moments else names[0]]
        what += [f"shrinkage {plan.shrinkage:g}", f"sharing {plan.share:g}"]
        if self.score is None:
            return [f"recipe: {'; '.join(what)} (fixed: too few images of the same class to choose by)"]
        lines = [f"recipe: {'; '.join(what)}", f"held-out training images, accuracy by class: {100 * self.score:.1f} %"]
        lines += [f"  {name}: {100 * score:.1f} %" for name, score in self.simpler.items()]
        return lines


class HeldOut:
    """Cosines of held-out images in every fold, under any plan of some features.

    Args:
        parts: features [N, D] of each part, in float32.
        targets: class indices [N].
        num_classes: C.
        rank: directions of Σ of wide parts.
        kinds: folds [N] of the images, -1 where none holds an image out, of one or several kinds; see :meth:`fold`.
    """

    def __init__(
        self, parts: Sequence[Tensor], targets: Tensor, num_classes: int, rank: int, kinds: Sequence[Tensor] = ()
    ) -> None:
        self.targets, self.num_classes = targets, num_classes
        self.parts = [Part(x, targets, num_classes, rank) for x in parts]
        self.kinds = list(kinds)

    @classmethod
    def of_head(cls, head: FAIMHead, features: Tensor, targets: Tensor, folds: int = FOLDS) -> "HeldOut":
        """Of the features [N, D] of a head, in folds; images are alike by the pooled features and the next part."""
        rank = max((frame.rank for frame in head.frames), default=1)
        held = cls(features.split(head.parts, 1), targets, head.num_classes, rank)
        return held.fold(folds, range(len(head.parts))[:2])

    def fold(self, count: int = FOLDS, usual: Sequence[int] = (0,)) -> "HeldOut":
        """Make ``count`` folds of images that are alike by the points of the usual parts, and as many at random."""
        everything = torch.ones_like(self.targets, dtype=torch.bool)
        points = torch.cat([Frame(self.parts[i], everything, SHRINKAGE).points() for i in usual], 1)
        alike = lookalike_folds(points.cpu(), self.targets.cpu(), count).to(self.targets.device)
        mixed = _shuffled_folds(self.targets, count)[_first_copies(points, self.targets)]
        self.kinds = [alike, mixed.where(alike >= 0, alike)]
        return self

    def __len__(self) -> int:
        """Images that are ever held out."""
        return int((self.kinds[0] >= 0).sum())

    def scores(self, plans: Sequence[Plan]) -> list[float]:
        """Accuracy by class of each plan, all of one shrinkage, over both kinds of folds."""
        right = torch.zeros(len(plans), self.num_classes, dtype=torch.float64, device=self.targets.device)
        shares, used = sorted({plan.share for plan in plans}), sorted({i for plan in plans for i in plan.parts})
        for kind in range(len(self.kinds)):
            for rows, cosines in self._blocks(kind, plans[0].shrinkage, used, shares):
                y = self.targets[rows]
                for i, plan in enumerate(plans):
                    hit = _blend(cosines, plan).argmax(1) == y
                    right[i].index_add_(0, y, hit.double())
        held_C = torch.bincount(self.targets[self.kinds[0] >= 0], minlength=self.num_classes) * len(self.kinds)
        return (right / held_C.clamp_min(1))[:, held_C > 0].mean(1).tolist()

    def cosines(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Of each image that is held out with its look-alikes: cosines [M, C], and its number [M]."""
        found = [(rows, _blend(cosines, plan)) for rows, cosines in
                 self._blocks(0, plan.shrinkage, plan.parts, [plan.share])]  # fmt: skip
        if not found:
            return torch.empty(0, self.num_classes), torch.empty(0, dtype=torch.long)
        rows, order = torch.cat([rows for rows, _ in found]).sort()
        return torch.cat([cosines for _, cosines in found])[order].cpu(), rows.cpu()

    def _blocks(
        self, kind: int, shrinkage: float, parts: Sequence[int], shares: Sequence[float]
    ) -> Iterator[tuple[Tensor, dict[tuple[int, float], Tensor]]]:
        """Numbers of held-out images, and their cosines by part and share."""
        size = max(1, _ROWS // self.num_classes)
        for fold in self.kinds[kind][self.kinds[kind] >= 0].unique().tolist():
            hidden = self.kinds[kind] == fold
            frames = {part: Frame(self.parts[part], ~hidden, shrinkage) for part in parts}
            for rows in hidden.nonzero().flatten().split(size):
                found = {}
                for part in parts:
                    each = frames[part].cosines(rows, shares)
                    found |= {(part, share): cosines for share, cosines in zip(shares, each, strict=True)}
                yield rows, found


def has_recipe(head: FAIMHead) -> bool:
    """Whether a head is one that recipes are for: on its indicatrix with a full Σ and without 1-form."""
    return head.cosine and head.space == "indicatrix" and head.full_sigma


def _blend(cosines: dict[tuple[int, float], Tensor], plan: Plan) -> Tensor:
    weighed = [w * cosines[part, plan.share] for part, w in zip(plan.parts, plan.part_weights, strict=True) if w]
    return torch.stack(weighed).sum(0) if len(weighed) > 1 else weighed[0]


def _shuffled_folds(targets: Tensor, count: int) -> Tensor:
    """The fold of each image [N]: the images of a class in turn, in an order of chance that is always the same."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).to(targets.device)
    by_class = order[targets[order].argsort(stable=True)]
    y = targets[by_class]
    first = torch.searchsorted(y, y)
    folds = torch.empty_like(targets)
    folds[by_class] = (torch.arange(len(y), device=y.device) - first + y) % count
    return folds


def _first_copies(points: Tensor, targets: Tensor) -> Tensor:
    """For each image [N] the first one of its class that it is a copy of, mostly itself."""
    first_N, same = torch.arange(len(targets), device=targets.device), same_image(points) ** 0.5
    for label in targets.unique():
        members = (targets == label).nonzero().flatten()
        z = points[members].float()
        first_N[members] = members[(torch.cdist(z, z) <= same).int().argmax(1)]
    return first_N


def sample(targets: Tensor, most: int = MOST) -> Tensor:
    """Numbers of at most ``most`` images, those of all classes in turn and in an order of chance that is always the
    same, ascending."""
    if len(targets) <= most:
        return torch.arange(len(targets), device=targets.device)
    turn = _shuffled_folds(targets, len(targets))
    place = (turn - targets) % len(targets)  # of an image in its class
    return place.argsort(stable=True)[:most].sort().values


def choose(
    held: HeldOut,
    offered: Sequence[tuple[int, ...]] | None = None,
    *,
    shrinkage: float | None = None,
    share: float | None = None,
    weight: float | None = None,
) -> Chosen:
    """The plan with the best score; of several as good the first, which is the simplest.

    The shrinkage stays as it is: choosing it, too, gains nothing.

    Args:
        held: what is chosen by.
        offered: sets of parts, the usual one first; by default the pooled features with the second part, with each of
            the others, with the second and one other, and alone.
        shrinkage, share, weight: given by the user; they stand.
    """
    if offered is None:
        others = range(1, len(held.parts))
        offered = [*((0, i) for i in others), *((0, 1, i) for i in others[1:]), (0,)]
    single = len(held) == 0
    plain = Plan(
        parts=offered[0],
        weight=weight if weight is not None else SINGLE_WEIGHT if single else WEIGHT,
        shrinkage=SHRINKAGE if shrinkage is None else shrinkage,
        share=share or 0.0,
    )
    if len(held) < LEAST:
        return Chosen(plain, None, {})
    shares = [share] if share is not None else [0.0] if held.num_classes > MOST_CLASSES else SHARES
    weights = [weight] if weight is not None else [WEIGHT, *(w for w in WEIGHTS if w != WEIGHT)]
    plans = [replace(plain, parts=parts, weight=w, share=s) for s in shares for parts in offered
             for w in (weights if len(parts) > 1 else weights[:1])]  # fmt: skip
    scores = held.scores(plans)
    best = max(range(len(plans)), key=scores.__getitem__)
    return Chosen(plans[best], scores[best], _simpler(plans, scores, plans[best]))


def _simpler(plans: Sequence[Plan], scores: Sequence[float], best: Plan) -> dict[str, float]:
    """Scores of the best plans that leave out one of the choices."""
    without = {
        "pooled features alone": (len(best.parts) > 1, lambda plan: len(plan.parts) == 1),
        "one stage": (len(best.parts) > 2, lambda plan: len(plan.parts) == 2),
        "without sharing": (best.share > 0, lambda plan: plan.share == 0),
    }
    found = {}
    for name, (chosen, keeps) in without.items():
        values = [score for plan, score in zip(plans, scores, strict=True) if keeps(plan)]
        if chosen and values:
            found[name] = max(values)
    return found
