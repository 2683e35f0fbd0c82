"""A head without 1-form for inference: one product with the classes, and what it takes to know |z|.

Shapes: C classes, D features, P parts' widths.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from timm_faim.metric import LowRankFrame

from .head import FAIMHead

_BLOCK, _MOST_BLOCKS = 256, 4  # more and narrower ones save little more, and each is a call


class FoldedHead(nn.Module):
    """The logits of a head on the indicatrix or the sphere, from one linear layer.

    With m̂ = μ/|μ|, v = x - c and z = v A, the squared distance is linear in u = v / |z|:

        logits = -γ sqrt(2 + ε - 2 u (A m̂')),   |z|² = |R v|² with A' = Q R,

    of which R is triangular: in blocks it takes little more than half of the numbers and products of A. (On the sphere
    c = 0 and A = I.) For one x the classes stand in the order of u (A m̂') alone, which :func:`timm_faim.to_linear`
    keeps.

    Of features in parts u is √w_i v_i / |z_i| side by side, and the layer is still one. Where Σ has few directions U,
    |z|² = |v|² + (2 k + k²)·(U'v)².

    Takes what the head takes and gives it in the dtype of its buffers. The matrices may be stored in half precision,
    for which they are scaled to at most 1 (:meth:`store_matrices`); the arithmetic is in at least float32.

    Args:
        head: copied; later changes of it have no effect here.

    Raises:
        ValueError: a head with a 1-form, or one that is flat.

    Shapes: [..., D] to [..., C], and [B, D, H, W] to [B, C, H, W].
    """

    def __init__(self, head: FAIMHead) -> None:
        super().__init__()
        if not head.cosine:
            raise ValueError(f"a head of space={head.space!r} with a 1-form or a metric that learns does not fold; use "
                             "it as it is")  # fmt: skip
        self.num_classes, self.in_features, self.eps = head.num_classes, head.in_features, head.metric.eps
        self.out_features = head.num_classes
        self.parts = head.parts
        like = {"device": head.mu.device, "dtype": torch.promote_types(head.mu.dtype, torch.float32)}
        with torch.no_grad():
            means = list(head.project(head.mu).double().split(self.parts, 1))
            if head.part_weights is not None:
                means = [mu * w.double().sqrt() for mu, w in zip(means, head.part_weights, strict=True)]
            found = [_first_part(head, means[0])]
            found += [_further_part(frame, mu) for frame, mu in zip(head.frames, means[1:], strict=True)]
            square = head.gamma().double().square()
            weight, largest = _scaled(-2.0 * square * torch.cat([pulled for _, pulled in found], 1))
            kept = {"weight": weight, "bias": ((2.0 + self.eps) * square).expand(self.num_classes),
                    "least": self.eps * square, "prior": head.prior}  # fmt: skip
            for name, value in kept.items():
                self.register_buffer(name, None if value is None else value.detach().to(**like, copy=True))
            self.units = nn.ModuleList(unit for unit, _ in found)
            for unit in self.units:
                unit.gain.copy_(largest)
            self.units.to(**like)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D] ([B, C, H, W] of [B, D, H, W])."""
        convolutional = x.dim() == 4 and x.shape[-1] != self.in_features and x.shape[1] == self.in_features
        if convolutional:
            x = x.permute(0, 2, 3, 1)
        wide = torch.promote_types(self.bias.dtype, torch.float32)
        pieces = x.to(wide).split(self.parts, -1)
        u = torch.cat([unit(pieces[i]) for i, unit in enumerate(self.units)], -1)
        squares = nn.functional.linear(u, self.weight.to(wide), self.bias.to(wide))
        logits = squares.clamp_min(self.least.to(wide)).sqrt().neg()
        if self.prior is not None:
            logits = logits + self.prior.to(wide)
        logits = logits.to(self.bias.dtype)
        return logits.permute(0, 3, 1, 2) if convolutional else logits

    @torch.jit.ignore
    def store_matrices(self, dtype: torch.dtype) -> "FoldedHead":
        """Keep all matrices, in place, in a dtype such as float16, and the vectors and scalars as they are."""
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.dim() == 2:
                tensor.data = tensor.data.to(dtype)
        return self


class _Unit(nn.Module):
    """v / |z| times a gain, of one part, with |z|² = own·v² + growth·(R v)².

    Args:
        center: c [P], None for 0.
        own: [P]; None for 0.
        rows: R, of blocks [r_i, P_i] for the last P_i of the P features each.
        growth: [Σ r_i].
    """

    def __init__(
        self, center: Tensor | None, own: Tensor | None, rows: Sequence[Tensor] = (), growth: Tensor | None = None
    ) -> None:
        super().__init__()
        for name, value in {"center": center, "own": own, "growth": growth}.items():
            self.register_buffer(name, value)
        self.register_buffer("gain", torch.ones((), dtype=torch.float64))
        self.rows = nn.ParameterList(nn.Parameter(block, requires_grad=False) for block in rows)

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.center is None else x - self.center.to(x.dtype)
        square = v.new_full((), 1e-9)  # beside |z|², as in the head
        if self.own is not None:
            square = square + (v.square() * self.own.to(v.dtype)).sum(-1, keepdim=True)
        if self.growth is not None:
            found = [nn.functional.linear(v[..., v.shape[-1] - R.shape[1] :], R.to(v.dtype)) for R in self.rows]
            square = square + (torch.cat(found, -1).square() * self.growth.to(v.dtype)).sum(-1, keepdim=True)
        return v * (square.rsqrt() * self.gain.to(v.dtype))


def _first_part(head: FAIMHead, mu_CP: Tensor) -> tuple[_Unit, Tensor]:
    """Of a head's own frame, and A mu' as rows [C, P]."""
    if head.whiten is None or head.center is None:
        return _Unit(None, torch.ones_like(mu_CP[0])), mu_CP
    center, whiten = head.center.double(), head.whiten.double()
    if not head.full_sigma:
        return _Unit(center, whiten.square()), mu_CP * whiten
    triangle, largest = _scaled(torch.linalg.qr(whiten.t(), mode="r")[1])
    P = len(triangle)
    blocks = max(1, min(_MOST_BLOCKS, P // _BLOCK))
    edges = [P * i // blocks for i in range(blocks + 1)]
    rows = [triangle[i:j, i:] for i, j in pairwise(edges)]
    return _Unit(center, None, rows, largest.square().expand(P)), mu_CP @ whiten.t()


def _further_part(frame: LowRankFrame, mu_CP: Tensor) -> tuple[_Unit, Tensor]:
    """Of a frame of few directions, and A mu' as rows [C, P]."""
    used = frame.stretch != 0
    U_Pr, k_r = frame.directions[:, used].double(), frame.stretch[used].double()
    unit = _Unit(frame.center.double(), torch.ones_like(mu_CP[0]), [U_Pr.t()], 2.0 * k_r + k_r.square())
    return unit, mu_CP + (mu_CP @ U_Pr * k_r) @ U_Pr.t()


def _scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix with entries up to 1, and the factor to it."""
    largest = matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix / largest, largest
