"""Cosines of held-out images under heads in closed form that have not seen them, without a fit for each.

A part of the features is factored once: class sums, squared lengths, and a basis of the directions that Σ has. What a
fold takes away is then taken away in that basis, where the covariance within classes is small.

Shapes: N images, n of them in a fold, C classes, D features, r directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_faim.head.closed_form import root_of_shrunk, shrinkage_of
from timm_faim.head.sharing import sharing_weights

_WIDE = 2048  # features; fewer have a full Σ
_SPARE, _ROUNDS, _SEED = 64, 2, 0  # of the search for leading directions
_SMALL = 1e-12


class Part:
    """One part of the features of N images, as its frame in a head sees it.

    Args:
        x_ND: features, in float32.
        targets_N: class indices.
        num_classes: C.
        rank: directions of Σ of a part with more than 2,048 features.
    """

    def __init__(self, x_ND: Tensor, targets_N: Tensor, num_classes: int, rank: int) -> None:
        self.targets, self.num_classes = targets_N, num_classes
        self.x = x_ND - x_ND.mean(0)
        self.lengths_N = self.x.square().sum(1)
        self.sums_CD = self.sums(self.x, targets_N)
        self.basis_Dr = self._basis(rank)
        self.in_basis_Nr = self.x if self.basis_Dr is None else self.x @ self.basis_Dr
        self.second_rr = self.in_basis_Nr.t() @ self.in_basis_Nr

    def sums(self, rows: Tensor, targets: Tensor) -> Tensor:
        return rows.new_zeros(self.num_classes, rows.shape[1]).index_add_(0, targets, rows)

    def _basis(self, rank: int) -> Tensor | None:
        """The leading directions of all images, twice as many as Σ will have, by iterated random projections (Halko,
        Martinsson and Tropp 2011, algorithm 4.4); None where all directions are kept.

        Not those of the residuals within classes: beside these an image is the mean of its class, which has seen it.
        """
        N, D = self.x.shape
        if D <= _WIDE:
            return None
        rank *= 2
        q = min(rank + _SPARE, N, D)
        generator = torch.Generator().manual_seed(_SEED)
        Q_Dq = self.x.t() @ torch.randn(N, q, generator=generator).to(self.x)
        for _ in range(_ROUNDS):
            Q_Dq = self.x.t() @ (self.x @ torch.linalg.qr(Q_Dq).Q)
        Q_Dq = torch.linalg.qr(Q_Dq).Q
        small_Nq = self.x @ Q_Dq
        vectors = torch.linalg.eigh((small_Nq.t() @ small_Nq).double()).eigenvectors.flip(1)[:, :rank]
        return Q_Dq @ vectors.to(Q_Dq)


class Frame:
    """z = A (x - c) of a part and the class means in it, from the images that a mask [N] says are seen.

    Products of such points are those of x - c, but for the directions of the basis, where the inverse root of the
    covariance comes between; all up to a factor, which is nothing on the sphere.
    """

    def __init__(self, part: Part, seen_N: Tensor, shrinkage: float) -> None:
        self.part = part
        hidden_N = ~seen_N
        self.counts_C = torch.bincount(part.targets[seen_N], minlength=part.num_classes)
        n, single = int(seen_N.sum()), int(self.counts_C.max()) == 1
        sums_CD = part.sums_CD - part.sums(part.x[hidden_N], part.targets[hidden_N])
        self.center_D = sums_CD.sum(0) / n
        around_CD = sums_CD / self.counts_C.clamp_min(1)[:, None] - self.center_D
        self.means_CD = around_CD * (self.counts_C > 0)[:, None]
        self.means_Cr = self._in_basis(self.means_CD)
        hidden_r, center_r = part.in_basis_Nr[hidden_N], self._in_basis(self.center_D[None])
        second_rr = part.second_rr - hidden_r.t() @ hidden_r - n * center_r.t() @ center_r
        total = part.lengths_N[seen_N].sum() - n * self.center_D.square().sum()
        if not single:
            second_rr -= self.means_Cr.t() @ (self.means_Cr * self.counts_C[:, None])
            total = total - (self.counts_C * self.means_CD.square().sum(1)).sum()
        shrinkage = shrinkage_of(single, shrinkage)
        floor = shrinkage * total.clamp_min(_SMALL * part.lengths_N.sum()) / part.x.shape[1]
        shrunk_rr = ((1.0 - shrinkage) / floor).double() * second_rr.double()
        shrunk_rr.diagonal().add_(1.0)
        self.root_rr = root_of_shrunk(shrunk_rr, 1.0)
        self.framed_Cr = self._framed(self.means_Cr)

    def _in_basis(self, rows: Tensor) -> Tensor:
        return rows if self.part.basis_Dr is None else rows @ self.part.basis_Dr

    def _framed(self, rows_r: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.root_rr, rows_r.t().double(), upper=False).t().to(rows_r)

    def grams(self) -> Tensor:
        """Products of the class means [C, C]."""
        outside = self.means_CD @ self.means_CD.t() - self.means_Cr @ self.means_Cr.t()
        return self.framed_Cr @ self.framed_Cr.t() + (0.0 if self.part.basis_Dr is None else outside)

    def cosines(self, rows: Tensor, shares: Sequence[float]) -> list[Tensor]:
        """Cosines [n, C] of some of the images (their numbers [n]) to the prototypes, shared at each strength."""
        x_nD = self.part.x[rows] - self.center_D
        x_nr = self._in_basis(x_nD)
        framed_nr = self._framed(x_nr)
        products_nC, squares_n = framed_nr @ self.framed_Cr.t(), framed_nr.square().sum(1)
        if self.part.basis_Dr is not None:
            products_nC += x_nD @ self.means_CD.t() - x_nr @ self.means_Cr.t()
            squares_n += x_nD.square().sum(1) - x_nr.square().sum(1)
        lengths_n1 = squares_n.clamp_min(_SMALL).sqrt()[:, None]
        gram_CC, found = self.grams(), []
        for weights_CC in sharing_weights(gram_CC, self.counts_C, shares):
            if weights_CC is None:
                found.append(products_nC / lengths_n1 / gram_CC.diagonal().clamp_min(_SMALL).sqrt())
                continue
            squares_C = ((weights_CC @ gram_CC) * weights_CC).sum(1)
            found.append((products_nC @ weights_CC.t()) / lengths_n1 / squares_C.clamp_min(_SMALL).sqrt())
        return found

    def points(self) -> Tensor:
        """Points [N, D] of all images on the sphere, in half precision."""
        if self.part.basis_Dr is None:
            z_ND = self._framed(self.part.x - self.center_D)
        else:
            x_ND = self.part.x - self.center_D
            x_Nr = x_ND @ self.part.basis_Dr
            z_ND = x_ND + (self._framed(x_Nr) - x_Nr) @ self.part.basis_Dr.t()
        return torch.nn.functional.normalize(z_ND, dim=1).half()
