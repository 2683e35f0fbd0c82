"""Moments of features that forget, and a FAIM head that follows them while it trains.

Shapes: B images of a batch, C classes, D features of all parts.
"""

import torch
from finetune import BATCH
from heads import METHODS, Cosine
from joint import ProductHead
from torch import Tensor, nn
from torch.nn import functional as F

from timm_faim import FAIMHead, fit_
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.statistics import HeadStatistics


class RunningStatistics(HeadStatistics):
    """Moments by class in which a batch t steps ago weighs ``decay`` ** t.

    They begin as those of features [N, D] of classes [N], weighed as if all batches before had been these, so that the
    first refresh starts from the closed form and not from a handful of images.
    """

    def __init__(self, head: FAIMHead, x: Tensor, y: Tensor, decay: float) -> None:
        super().__init__(head)
        self.decay = decay
        self.update(x, y)
        self._scale(BATCH / (1.0 - decay) / len(y))

    def _scale(self, factor: float) -> None:
        for moment in (self.counts_C, self.sums_CD, self.second):
            moment.mul_(factor)
        for scatter in self.scatters:
            scatter.trace.mul_(factor)
            scatter.rows.mul_(factor**0.5)

    def step(self, x_BD: Tensor, y_B: Tensor) -> None:
        """Forget a step's share and add a batch: ``update``, where there is one part without the checks that wait for a
        GPU."""
        self._scale(self.decay)
        x = x_BD.to(self.sums_CD)
        if self.scatters:
            self._add_residuals(x, y_B)
        self.counts_C.index_add_(0, y_B, torch.ones_like(x[:, 0]))
        self.sums_CD.index_add_(0, y_B, x)
        first = x[:, : self.parts[0]]
        self.second.addmm_(first.t(), first)


@torch.no_grad()
def refresh_(head: FAIMHead, stats: HeadStatistics) -> None:
    """Centre and Σ of ``head`` from moments; prototypes stay points of feature space, as long as they were.

    Only a prototype's direction from the centre counts, so its point is the one as far from the centre, under Σ, as
    the mean of its class. Adam's moments stay in the coordinates of the frame before: Σ's Cholesky factor moves little
    from one refresh to the next.
    """
    parts = range(len(head.parts))
    means = (stats.sums_CD / stats.counts_C.clamp_min(1e-12)[:, None]).split(head.parts, 1)
    before = head.mu.double().split(head.parts, 1)
    points = []
    for i in parts:
        radius_C1 = _into(head, i, means[i]).norm(dim=1, keepdim=True)
        points.append(_out_of(head, i, F.normalize(before[i], dim=1) * radius_C1))
    lengths = [each.norm(dim=1, keepdim=True) for each in before]
    fit_from_statistics_(head, stats)
    head.mu.copy_(torch.cat([F.normalize(_into(head, i, points[i]), dim=1) * lengths[i] for i in parts], 1))


def _into(head: FAIMHead, part: int, x: Tensor) -> Tensor:
    """(x - c) A of a part's float64 points."""
    return head.frames[part - 1](x) if part else (x - head.center.double()) @ head.whiten.double()


def _out_of(head: FAIMHead, part: int, z: Tensor) -> Tensor:
    """c + z A⁻¹, the inverse of :func:`_into`; the first part's A is a lower Cholesky factor."""
    if part == 0:
        inverse = torch.linalg.solve_triangular(head.whiten.double(), z, upper=False, left=False)
        return inverse + head.center.double()
    frame = head.frames[part - 1]
    directions, back = frame.directions.double(), 1.0 / (1.0 + frame.stretch.double()) - 1.0
    return z + ((z @ directions) * back) @ directions.t() + frame.center.double()


class CosineSum(nn.Module):
    """The sum of the logits of a cosine classifier of each part."""

    def __init__(self, widths: list[int], num_classes: int, scale: float) -> None:
        super().__init__()
        self.widths = widths
        self.classifiers = nn.ModuleList(Cosine(D, num_classes, scale=scale) for D in widths)

    def forward(self, x: Tensor) -> Tensor:
        pieces = zip(self.classifiers, x.split(self.widths, 1), strict=True)
        return torch.stack([each(piece) for each, piece in pieces]).sum(0)

    def start_(self, x: Tensor, y: Tensor) -> None:
        """Class means of features [N, D] of classes [N]."""
        for each, piece in zip(self.classifiers, x.split(self.widths, 1), strict=True):
            each.start_(piece, y)


class WatchedHead(nn.Module):
    """A FAIM head on all parts, alone or plus a cosine classifier of each part; keeps the batch that it saw last.

    Args:
        widths: of the parts, by name.
        num_classes: C.
        scale, margin: of the FAIM head; the scale also of the cosine classifiers.
        cosine: logits = logits of FAIM + those of the cosine classifiers, trained as one.
    """

    def __init__(
        self, widths: dict[str, int], num_classes: int, *, scale: float, margin: float, cosine: bool = False
    ) -> None:
        super().__init__()
        self.widths = list(widths.values())
        if len(widths) > 1:
            self.faim = ProductHead(widths, num_classes, scale=scale, margin=margin)
        else:
            self.faim = METHODS["faim_indicatrix"][0](*self.widths, num_classes, scale=scale, margin=margin)
        self.cosine = CosineSum(self.widths, num_classes, scale) if cosine else None
        self.register_buffer("seen_BD", torch.zeros(BATCH, sum(self.widths)), persistent=False)
        self.register_buffer("seen_B", torch.zeros(BATCH, dtype=torch.long), persistent=False)

    def _sum(self, faim: Tensor, x: Tensor) -> Tensor:
        return faim if self.cosine is None else faim + self.cosine(x)

    def forward(self, x: Tensor) -> Tensor:
        return self._sum(self.faim(x), x)

    def loss(self, x: Tensor, target: Tensor, smoothing: float) -> Tensor:
        self.seen_BD.copy_(x.detach())
        self.seen_B.copy_(target)
        return F.cross_entropy(self._sum(self.faim(x, target), x), target, label_smoothing=smoothing)

    def start_(self, x: Tensor, y: Tensor) -> None:
        """FAIM in closed form, the cosine classifiers at class means."""
        fit_(self.faim, [(x, y)])
        if self.cosine is not None:
            self.cosine.start_(x, y)
