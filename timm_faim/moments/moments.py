"""Second moments of a feature map as one vector, in the chart of positive matrices in which distances are useful.

Shapes: B images, N positions, c channels, d kept components, D = (d + 1)(d + 2) / 2.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from timm_faim.metric import checked_count

from .root import matrix_root

MOST_COMPONENTS = 128  # D = 8,385


class Moments(nn.Module):
    """[B, c, H, W] or tokens [B, N, c] to the root of their second moments, a vector [B, D].

        z_n = P'(f_n - m),   z'_n = (z_n, b),   G = mean_n z'_n z'_n',   v = upper triangle of G^½

    with the entries off the diagonal times √2, so that |v|² = tr G. With b > 0 the mean of the z_n is in G too. Fewer
    positions than components give a G of low rank, which is fine; a map of one position has G = z'z'.

    Args:
        channels: c.
        components: d, from 1 to c and at most 128.
        steps: of the root's iteration, see :func:`matrix_root`.

    Parameters: ``projection`` (P, [c, d]), learned; ``mean`` (m, [c]) and ``offset`` (b, [1]), which :meth:`fit_` sets.

    Raises:
        TypeError, ValueError: numbers out of range; on call, maps of another number of channels.
    """

    def __init__(self, channels: int, components: int = 64, *, steps: int = 10) -> None:
        super().__init__()
        self.channels = checked_count("channels", channels)
        self.components = checked_count("components", components)
        self.steps = checked_count("steps", steps)
        if not self.components <= min(self.channels, MOST_COMPONENTS):
            raise ValueError(f"components must be at most the {self.channels} channels and {MOST_COMPONENTS}, got "
                             f"{components}")  # fmt: skip
        self.projection = nn.Parameter(torch.empty(self.channels, self.components))
        self.mean = nn.Parameter(torch.zeros(self.channels), requires_grad=False)
        self.offset = nn.Parameter(torch.ones(1), requires_grad=False)
        n = self.components + 1
        rows, columns = torch.triu_indices(n, n)
        self.register_buffer("entries", rows * n + columns, persistent=False)
        self.register_buffer("weights", torch.where(rows == columns, 1.0, math.sqrt(2.0)), persistent=False)
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """D."""
        return (self.components + 1) * (self.components + 2) // 2

    def reset_parameters(self) -> None:
        """P as orthonormal columns, m = 0, b = 1."""
        nn.init.orthogonal_(self.projection)
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """v [B, D] of maps [B, c, H, W] or tokens [B, N, c], in at least float32."""
        f_BNc = self._positions(x)
        dtype = torch.promote_types(f_BNc.dtype, torch.float32)
        z_BNd = ((f_BNc - self.mean) @ self.projection).to(dtype)
        z_BNn = torch.cat([z_BNd, self.offset.to(dtype).expand(z_BNd.shape[0], z_BNd.shape[1], 1)], -1)
        G_Bnn = torch.bmm(z_BNn.transpose(1, 2), z_BNn) / z_BNn.shape[1]
        root_Bnn = matrix_root(G_Bnn, self.steps)
        return root_Bnn.flatten(1)[:, self.entries] * self.weights.to(root_Bnn.dtype)

    def _positions(self, x: Tensor) -> Tensor:
        if x.dim() == 4 and x.shape[1] == self.channels:
            return x.flatten(2).transpose(1, 2)
        if x.dim() == 3 and x.shape[2] == self.channels:
            return x
        raise ValueError(f"expected maps [B, {self.channels}, H, W] or tokens [B, N, {self.channels}], got shape "
                         f"{list(x.shape)}")  # fmt: skip

    @torch.no_grad()
    def fit_(self, maps: Iterable[Tensor]) -> "Moments":
        """Set m, P and b from one pass over maps or tokens: mean, leading principal directions, and the root mean
        variance of the kept components. Sums are float64; each image counts alike, however many positions it has.

        Raises:
            ValueError: no maps, values that are not finite, or maps that are constant.
        """
        count, total_c, second_cc = 0, 0.0, 0.0
        for x in maps:
            f_BNc = self._positions(x).to(self.mean.device, torch.float64)
            count += len(f_BNc)
            total_c = total_c + f_BNc.mean(1).sum(0)
            second_cc = second_cc + torch.einsum("bnc,bnd->cd", f_BNc, f_BNc) / f_BNc.shape[1]
        if not count:
            raise ValueError("no maps to fit moments from")
        mean_c = total_c / count
        covariance_cc = second_cc / count - torch.outer(mean_c, mean_c)
        if not covariance_cc.isfinite().all():
            raise ValueError("the maps contain NaN or inf; check the backbone's weights and the input normalisation")
        values_c, vectors_cc = torch.linalg.eigh(covariance_cc)
        kept_d = values_c.flip(0)[: self.components].clamp_min(0.0)
        if not kept_d[0] > 1e-12 * (second_cc.diagonal().sum() / count):
            raise ValueError("the maps are constant; there are no moments to tell images apart by")
        self.mean.copy_(mean_c)
        self.projection.copy_(vectors_cc.flip(1)[:, : self.components])
        self.offset.copy_(kept_d.mean().sqrt())
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.components}, out_features={self.out_features}"
