"""Prototypes shared with look-alikes: class means drawn towards the directions in which classes differ at all.

Shapes: C classes, D features, E features of what is carried along, r = min(C, D) directions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDING = 1e-10
_UNIT = 0.01  # of a prototype's mean squared length: the variance along one direction of one image at strength 1


def check_share(share: float) -> float:
    """The strength of sharing as it is.

    Raises:
        ValueError: not in [0, 100].
    """
    if not (math.isfinite(share) and 0.0 <= share <= 100.0):
        raise ValueError(f"share must lie in [0, 100], got {share}; 0 shares nothing, 0.5 to 2 are usual")
    return share


def share_prototypes(points_CD: Tensor, counts_C: Tensor, strength: float, carried_CE: Tensor | None = None) -> Tensor:
    """Class means as the means of their posteriors, the prior being the scatter of all class means.

    With B = Σ_k n_k m_k m_k' / n and the variance s of one image along a direction,

        m_k <- n_k B (n_k B + s I)⁻¹ m_k,   s = strength * 1 % of the mean of |m_k|²,

    a weighted sum of all class means in which look-alikes count most, and the more the fewer images a class has: the
    mean of few images keeps what lies along directions in which other classes differ too and loses what is noise. It
    is the posterior of a Gaussian class mean in a frame where images of a class vary alike in all directions (Ioffe
    2006, probabilistic linear discriminant analysis), so it wants points in the frame of Σ; where no class has two
    images there is no such frame and nothing to gain.

    Args:
        points_CD: class means around their centre, in the frame of Σ.
        counts_C: images of each class; a class without any stays as it is and gives nothing.
        strength: in [0, 100]; 0 changes nothing.
        carried_CE: what the same weighted sums are taken of, such as the class means in feature space around their
            centre (default: the points).

    Returns:
        [C, E] in the dtype of what is carried.

    Raises:
        ValueError: strength out of its range.
    """
    carried_CE = points_CD if carried_CE is None else carried_CE
    if not check_share(strength):
        return carried_CE
    points, counts = points_CD.double(), counts_C.double()[:, None]
    root_C1 = (counts / counts.sum()).sqrt()
    U_Cr, e_r, V_Dr = _singular(root_C1 * points)
    variance = _variance(points.square().sum(1), counts, strength)
    parts_Cr = (points @ V_Dr) * _kept(counts, e_r, variance)
    directions_rE = (root_C1 * U_Cr / e_r.sqrt()).t() @ carried_CE.double()
    return torch.where(counts > 0, parts_Cr @ directions_rE, carried_CE.double()).to(carried_CE.dtype)


def sharing_weights(gram_CC: Tensor, counts_C: Tensor, strengths: Sequence[float]) -> list[Tensor | None]:
    """The weights [C, C] of those sums for each strength, from products of the class means; None for strength 0."""
    counts = counts_C.double()[:, None]
    found: list[Tensor | None] = [None] * len(strengths)
    if not any(check_share(strength) for strength in strengths):
        return found
    gram, root_C1 = gram_CC.double(), (counts / counts.sum()).sqrt()
    e_r, U_Cr = torch.linalg.eigh(root_C1 * gram * root_C1.t())
    kept = e_r > _ROUNDING * e_r[-1]
    e_r, U_Cr = e_r[kept], U_Cr[:, kept]
    back_Cr = root_C1 * U_Cr / e_r.sqrt()
    along_Cr = gram @ back_Cr
    eye_CC = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for i, strength in enumerate(strengths):
        if strength:
            share_Cr = _kept(counts, e_r, _variance(gram.diagonal(), counts, strength))
            found[i] = torch.where(counts > 0, (along_Cr * share_Cr) @ back_Cr.t(), eye_CC).to(gram_CC.dtype)
    return found


def _variance(squares_C: Tensor, counts_C1: Tensor, strength: float) -> Tensor:
    return strength * _UNIT * squares_C[counts_C1[:, 0] > 0].mean()


def _kept(counts_C1: Tensor, e_r: Tensor, variance: Tensor) -> Tensor:
    """Of each direction, class by class: n_k B / (n_k B + s)."""
    signal_Cr = counts_C1 * e_r
    return signal_Cr / (signal_Cr + variance)


def _singular(rows_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, squared sizes and V of rows = U sqrt(e) V', by the smaller Gram matrix, an order faster than its own SVD."""
    C, D = rows_CD.shape
    e_r, own = torch.linalg.eigh(rows_CD @ rows_CD.t() if C <= D else rows_CD.t() @ rows_CD)
    kept = e_r > _ROUNDING * e_r[-1]  # below are rounding errors, and the centre's direction
    e_r, own = e_r[kept], own[:, kept]
    other = (rows_CD.t() if C <= D else rows_CD) @ own / e_r.sqrt()
    return (own, e_r, other) if C <= D else (other, e_r, own)
