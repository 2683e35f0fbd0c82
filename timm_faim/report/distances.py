"""What the distance of a FAIM head is made of, in float64 on the CPU.

Shapes: N vectors, C classes, D features.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_faim import FAIMHead
from timm_faim.head.parts import point_cosines
from timm_faim.metric.functional import one_form_term, squared_norm


@dataclass(frozen=True)
class Geometry:
    """The metric of a head in numbers.

    `spectrum` [D] are the eigenvalues of Σ, largest first; `beta` [D] is |β| per coordinate and `whitened` [D] its
    coordinates |T⁻¹β| in a Σ-orthonormal frame (Σ = TT', T diagonal or lower-triangular), both largest first, with β
    as the metric uses it (a Randers metric shrinks it); `dual_norm` is sqrt(β'Σ⁻¹β), the length of `whitened`, so that
    λ · dual_norm is the largest share that the 1-form can have of the Riemannian part.
    """

    lmbda: float
    gamma: float
    spectrum: Tensor
    beta: Tensor
    whitened: Tensor
    dual_norm: float

    @property
    def strongest(self) -> float:
        """λ sqrt(β'Σ⁻¹β): the 1-form over the Riemannian part, in the direction where it is largest."""
        return self.lmbda * self.dual_norm

    @property
    def has_one_form(self) -> bool:
        """Whether the 1-form adds anything."""
        return self.lmbda > 0

    @property
    def condition(self) -> float:
        """Largest over smallest eigenvalue of Σ."""
        return float(self.spectrum[0] / self.spectrum[-1].clamp_min(torch.finfo(self.spectrum.dtype).tiny))


class HeadDistances:
    """Distances of one head to its prototypes, split into their two parts."""

    def __init__(self, head: FAIMHead) -> None:
        self.head = head
        self.exact = copy.deepcopy(head).cpu().double().requires_grad_(False)
        self.metric = self.exact.metric

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The head's logits [N, C] of features [N, D] as `head_features` gives them, which are points already."""
        head = self.exact
        logits = -head.gamma() * head.metric(features, head.project(head.mu))
        return logits if head.prior is None else logits + head.prior

    @torch.no_grad()
    def parts(self, features: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Riemannian part sqrt(v'Σv + ε) [N] and 1-form part [N] of d_F(x, μ_k), which sum to it.

        The 1-form part is λ|β'v| with the metric's smoothing; of a Randers metric it has a sign.

        Args:
            features: x [N, D] as `head_features` gives them.
            classes: k [N], one for each row.
        """
        prototypes = self.exact.project(self.exact.mu[classes.cpu()])
        v = features - prototypes
        metric = self.metric
        sigma, tril, beta, lmbda = metric.tensors(torch.float64)
        riemannian = torch.sqrt(squared_norm(v, sigma, tril, metric.eps) + metric.eps)
        term = one_form_term(torch.mv(v, beta), metric.symmetric, metric.eps)
        return riemannian, lmbda * term

    @torch.no_grad()
    def parts_right(self, features: Tensor, target: Tensor) -> list[float]:
        """Share in per cent of the rows that each part of the features alone would classify as their class, by the
        cosines to the prototypes; then that of all together.

        Args:
            features: x [N, D], N > 0, as `head_features` gives them.
            target: classes [N].
        """
        alone = [cosines.argmax(1) for cosines in point_cosines(self.exact, features)]
        together = self.logits(features).argmax(1)
        return [100 * float((k == target).double().mean()) for k in (*alone, together)]

    @torch.no_grad()
    def geometry(self) -> Geometry:
        """λ, γ, the spectrum of Σ and the size of β."""
        sigma, _, beta, lmbda = self.metric.tensors(torch.float64)
        whitened = self.metric(self.metric.beta, frame=True).one_form_D
        if not self.exact.full_sigma:
            spectrum = sigma if self.exact.whiten is None else self.exact.whiten.square()
        else:
            dense = self.exact.sigma().to(self.head.mu.device if self.head.mu.is_cuda else "cpu")
            spectrum = torch.linalg.eigvalsh(dense).cpu()
        return Geometry(
            lmbda=float(lmbda),
            gamma=float(self.head.gamma()),
            spectrum=spectrum.sort(descending=True).values,
            beta=beta.abs().sort(descending=True).values,
            whitened=whitened.abs().sort(descending=True).values,
            dual_norm=float(whitened.norm()),
        )
