"""What a closed-form fit needs to know of the features: counts, sums and second moments by class, in one pass.

Shapes: N samples, C classes, K of them in a batch, D features.
"""

import torch
from torch import Tensor

from timm_faim.metric import RowScatter

from .head import FAIMHead


class HeadStatistics:
    """Running moments of a head's features by class; float64 on the head's device, O(C·D) or with full Σ + O(D²).

    Of features in parts the second moments are those of the first; of the others the residuals within classes are kept
    by their leading directions.
    """

    def __init__(self, head: FAIMHead) -> None:
        C, D, device = head.num_classes, head.in_features, head.mu.device
        self.parts = head.parts
        self.counts_C = torch.zeros(C, dtype=torch.float64, device=device)
        self.sums_CD = torch.zeros(C, D, dtype=torch.float64, device=device)
        shape = (self.parts[0],) * (2 if head.full_sigma else 1)
        self.second = torch.zeros(shape, dtype=torch.float64, device=device)
        self.scatters = [RowScatter(frame.in_features, max(256, 2 * frame.rank), device) for frame in head.frames]

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add features [N, D] of classes ``targets`` [N] (integers in [0, C))."""
        C, D = self.sums_CD.shape
        if targets.dim() != 1:
            raise ValueError(f"expected class indices [B], got targets of shape {list(targets.shape)} (Mixup off?)")
        if features.dim() != 2 or features.shape[1] != D or targets.shape != features.shape[:1]:
            raise ValueError(
                f"expected features [N, {D}] and targets [N], got {list(features.shape)} and {list(targets.shape)}"
            )
        if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < C):
            raise ValueError(f"targets must lie in [0, {C}), got {int(targets.min())} to {int(targets.max())}")
        x = features.to(self.sums_CD)
        if not torch.isfinite(x).all():
            raise ValueError("features contain NaN or inf; check the backbone's weights and the input normalisation")
        if self.scatters:
            self._add_residuals(x, targets)
        self.counts_C += torch.bincount(targets, minlength=C)
        self.sums_CD.index_add_(0, targets, x)
        first = x[:, : self.parts[0]]
        self.second += first.t() @ first if self.second.dim() == 2 else first.square().sum(0)

    def _add_residuals(self, x_ND: Tensor, targets: Tensor) -> None:
        """What the features add to the scatter within classes: residuals from their own means, and a row a class for
        the way from the mean before (Chan, Golub and LeVeque 1983)."""
        classes, place_N = targets.unique(return_inverse=True)
        new_K = torch.bincount(place_N, minlength=len(classes)).to(x_ND)
        means_KD = x_ND.new_zeros(len(classes), x_ND.shape[1]).index_add_(0, place_N, x_ND) / new_K[:, None]
        rows_ND = (x_ND - means_KD[place_N])[new_K[place_N] > 1]
        self._add_rows(torch.cat([rows_ND, self._between(classes, new_K, means_KD)]))

    def _between(self, classes: Tensor, new_K: Tensor, means_KD: Tensor) -> Tensor:
        """A row for each class that has been there: sqrt(n m / (n + m)) of the way from its mean of n to that of m."""
        old_K = self.counts_C[classes]
        way_KD = means_KD - self.sums_CD[classes] / old_K.clamp_min(1.0)[:, None]
        return (way_KD * (old_K * new_K / (old_K + new_K)).sqrt()[:, None])[old_K > 0]

    def add_between(self) -> None:
        """Add the scatter of the class means around the mean of all features, class by class of any size."""
        mean_D = self.sums_CD.sum(0) / self.counts_C.sum()
        means_CD = self.sums_CD / self.counts_C.clamp_min(1.0)[:, None]
        self._add_rows(((means_CD - mean_D) * self.counts_C.sqrt()[:, None])[self.counts_C > 0])

    def _add_rows(self, rows_ND: Tensor) -> None:
        for scatter, rows in zip(self.scatters, rows_ND[:, self.parts[0] :].split(self.parts[1:], 1), strict=True):
            scatter.add(rows)

    def all_reduce(self) -> None:
        """Sum the moments over all ranks of an initialised process group."""
        for scatter in self.scatters:
            scatter.all_reduce()
        if self.scatters:
            self._add_ways_between_ranks()
        for moment in (self.counts_C, self.sums_CD, self.second):
            torch.distributed.all_reduce(moment)

    def _add_ways_between_ranks(self) -> None:
        """The scatter of the ranks' class means around each other, the same on all of them."""
        own_counts, own_sums = self.counts_C, self.sums_CD
        self.counts_C, self.sums_CD = torch.zeros_like(own_counts), torch.zeros_like(own_sums)
        for rank in range(torch.distributed.get_world_size()):
            counts, sums = own_counts.clone(), own_sums.clone()
            torch.distributed.broadcast(counts, rank)
            torch.distributed.broadcast(sums, rank)
            classes = counts.nonzero().flatten()
            self._add_rows(self._between(classes, counts[classes], sums[classes] / counts[classes, None]))
            self.counts_C += counts
            self.sums_CD += sums
        self.counts_C, self.sums_CD = own_counts, own_sums
