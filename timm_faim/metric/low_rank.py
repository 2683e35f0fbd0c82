"""A Σ of many dimensions: the identity and few directions, estimated from rows in one pass, never D × D.

With R the rows of within-class residuals over sqrt(n - C), R'R = V diag(e) V' and t = Σe / D, the shrunk within-class
covariance (1 - s) R'R + s t I has the inverse root

    A v = (v + V (k ∘ V'v)) / sqrt(s t),   k = sqrt(s t / (s t + (1 - s) e)) - 1,

with k = 0 beside the directions that are kept. On the sphere the factor is nothing, and is left out.

Shapes: N rows, C classes, D features, r directions.
"""

import torch
from torch import Tensor, nn

from .checks import checked_count


class LowRankFrame(nn.Module):
    """z = A (x - c), A v = v + U (k ∘ U'v); the identity around 0 at first.

    Args:
        in_features: D.
        rank: r, at most D.

    Parameters, none of them trained by gradient: ``center`` [D], ``directions`` (U, [D, r], orthonormal columns or
    zero) and ``stretch`` (k > -1, [r]).

    Raises:
        TypeError, ValueError: numbers below 1; r above D.
    """

    def __init__(
        self, in_features: int, rank: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        D, r = self.in_features, self.rank = checked_count("in_features", in_features), checked_count("rank", rank)
        if r > D:
            raise ValueError(f"rank must be at most the {D} features, got {r}")
        for name, shape in (("center", (D,)), ("directions", (D, r)), ("stretch", (r,))):
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))  # no buffer: see FAIMHead
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """c = 0, A = I."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """A (x - c) [..., D], in at least float32."""
        wide = torch.promote_types(torch.promote_types(x.dtype, self.center.dtype), torch.float32)
        v = x.to(wide) - self.center.to(wide)
        directions = self.directions.to(wide)
        return v + ((v @ directions) * self.stretch.to(wide)) @ directions.t()

    @torch.no_grad()
    def set_(self, center: Tensor, scatter: "RowScatter", shrinkage: float, degrees: Tensor) -> "LowRankFrame":
        """c, and A from the scatter of within-class residuals over its n - C degrees of freedom, as above."""
        e, V_Dr = scatter.leading(self.rank)
        self.center.copy_(center)
        self.directions.zero_()
        self.stretch.zero_()
        if len(e):
            e = e / degrees
            floor = shrinkage * scatter.trace / (degrees * self.in_features)
            k = (floor / (floor + (1.0 - shrinkage) * e)).sqrt() - 1.0
            self.directions[:, : len(e)] = V_Dr.to(self.directions.dtype)
            self.stretch[: len(e)] = k.to(self.stretch.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, rank={self.rank}"


class RowScatter:
    """R'R of rows that come in blocks, as its trace and leading directions; float64, O(D · rows) memory.

    Rows are kept until there are twice ``most``, then replaced by ``most`` rows with the same leading scatter. Up to
    2 · most rows in all the directions are exact, whatever the order; beyond, what is dropped are the smallest.

    Args:
        features: D.
        most: rows kept, several times the rank that is asked for.
        device: of the sums.
    """

    def __init__(self, features: int, most: int, device: torch.device) -> None:
        self.most = most
        self.trace = torch.zeros((), dtype=torch.float64, device=device)
        self.rows = torch.zeros(0, features, dtype=torch.float64, device=device)

    def add(self, rows_ND: Tensor) -> None:
        """Add rows; each counts by its square."""
        rows_ND = rows_ND.to(self.rows)
        self.trace += rows_ND.square().sum()
        self._keep(rows_ND)

    def _keep(self, rows_ND: Tensor) -> None:
        for block in rows_ND.split(self.most):
            self.rows = torch.cat([self.rows, block])
            if len(self.rows) > 2 * self.most:
                e, V_Dr = self.leading(self.most)
                self.rows = (V_Dr * e.sqrt()).t().contiguous()

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues of R'R and their directions [D, r], r <= rank, by the Gram matrix of the rows."""
        if not len(self.rows):
            return self.trace.new_zeros(0), self.rows.t()
        values, vectors = torch.linalg.eigh(self.rows @ self.rows.t())
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        kept = values > 1e-10 * values[0].clamp_min(torch.finfo(values.dtype).tiny)
        e, vectors = values[kept], vectors[:, kept]
        return e, (self.rows.t() @ vectors) / e.sqrt()

    def all_reduce(self) -> None:
        """Join the scatters of all ranks of an initialised process group."""
        found: list[Tensor | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, self.rows.cpu())
        torch.distributed.all_reduce(self.trace)
        self.rows = self.rows[:0]
        for rows in found:
            self._keep(rows.to(self.rows))
