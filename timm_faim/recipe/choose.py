"""A plan chosen by cross-validation on features of the training images; no image is held out for it.

Each candidate is measured in two kinds of folds: look-alikes held out together, which is how images of another day are,
and images held out at random. Its score is the mean over both of the accuracy by class, so that rare classes count.

Shapes: N images, C classes, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from timm_faim.calibration import FOLDS, lookalike_folds

from .part import Frame, Part
from .plan import SHRINKAGE, SINGLE_WEIGHT, WEIGHT, Plan

WEIGHTS, SHRINKAGES, SHARES = (0.6, 0.75, 0.85, 0.92, 1.0), (0.1, 0.3, 0.5), (0.0, 0.5, 1.0, 2.0, 4.0)
LEAST, MOST = 20, 10_000  # held-out images: fewer say nothing, more are not needed
MOST_CLASSES = 2_000  # beyond, sharing is not tried: it costs C³
_ROWS = 1 << 22  # numbers in a block of cosines


@dataclass(frozen=True)
class Chosen:
    """A plan, its score in [0, 1] (None: too little data to choose), scores of simpler plans by name, and what it says
    of held-out images: cosines [M, C] to the prototypes of the others and their numbers [M] among those given."""

    plan: Plan
    score: float | None
    simpler: dict[str, float]
    cosines: Tensor
    numbers: Tensor

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
        folds: number of folds of look-alikes, and of those at random.
        usual: the parts by whose points images are alike.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        targets: Tensor,
        num_classes: int,
        rank: int,
        folds: int = FOLDS,
        usual: Sequence[int] = (0,),
    ) -> None:
        self.targets, self.num_classes = targets, num_classes
        self.parts = [Part(x, targets, num_classes, rank) for x in parts]
        everything = torch.ones_like(targets, dtype=torch.bool)
        points = [Frame(self.parts[i], everything, SHRINKAGE).points() for i in usual]
        alike = lookalike_folds(torch.cat(points, 1).cpu(), targets.cpu(), folds).to(targets.device)
        mixed = _shuffled_folds(targets, folds).where(alike >= 0, alike)
        self.kinds = [alike, mixed]

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
    usual: int | None,
    fixed: Plan | None = None,
    shrinkage: float | None = None,
    share: float | None = None,
    weight: float | None = None,
) -> Chosen:
    """The plan with the best score; of several as good the simplest, then the first.

    First the parts, their weight and the share together, at the usual shrinkage, then the shrinkage.

    Args:
        held: what is chosen by.
        usual: the number of the part that a head reads beside the pooled features where nothing is chosen; None
            where there is no other part.
        fixed: a plan that is not to be chosen but taken.
        shrinkage, share, weight: given by the user; they stand.
    """
    single = len(held) == 0
    plain = Plan(
        parts=(0,) if usual is None else (0, usual),
        weight=weight if weight is not None else SINGLE_WEIGHT if single else WEIGHT,
        shrinkage=SHRINKAGE if shrinkage is None else shrinkage,
        share=share or 0.0,
    )
    if fixed is not None or len(held) < LEAST:
        plan = fixed or plain
        return Chosen(plan, None, {}, *held.cosines(plan))
    plans = list(_candidates(plain, len(held.parts), held.num_classes, share, weight))
    scores = held.scores(plans)
    best = max(range(len(plans)), key=scores.__getitem__)
    plan, score = plans[best], scores[best]
    simpler = _simpler(plan, plans, scores)
    for other in SHRINKAGES if shrinkage is None else ():
        if other == plain.shrinkage:
            continue
        tried = replace(plan, shrinkage=other)
        (value,) = held.scores([tried])
        if value > score:
            simpler[f"shrinkage {plain.shrinkage:g}"] = scores[best]
            plan, score = tried, value
    return Chosen(plan, score, simpler, *held.cosines(plan))


def _candidates(plain: Plan, parts: int, classes: int, share: float | None, weight: float | None) -> Iterator[Plan]:
    """From the simplest on."""
    shares = [share] if share is not None else [0.0] if classes > MOST_CLASSES else SHARES
    weights = [plain.weight] + [w for w in WEIGHTS if w != plain.weight] if weight is None else [weight]
    others = [others for count in (1, 2) for others in combinations(range(1, parts), count)]
    others.sort(key=lambda each: each != plain.parts[1:])  # the usual one first
    for s in shares:
        yield replace(plain, parts=(0,), share=s)
        for each in others:
            yield from (replace(plain, parts=(0, *each), weight=w, share=s) for w in weights)


def _simpler(plan: Plan, plans: Sequence[Plan], scores: Sequence[float]) -> dict[str, float]:
    """Scores of the best plans that leave out one of the choices."""
    kinds = {
        "pooled features alone": [i for i, p in enumerate(plans) if len(p.parts) == 1],
        "without sharing": [i for i, p in enumerate(plans) if p.parts == plan.parts and p.share == 0.0],
        "one stage": [i for i, p in enumerate(plans) if len(p.parts) == 2],
    }
    chosen = {
        "pooled features alone": len(plan.parts) > 1,
        "without sharing": plan.share > 0,
        "one stage": len(plan.parts) > 2,
    }
    return {name: max(scores[i] for i in which) for name, which in kinds.items() if which and chosen[name]}
