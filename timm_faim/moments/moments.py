"""Second moments of a feature map as one vector, in the chart of positive matrices in which distances are useful.

Shapes: B images, N positions, c channels, d kept components, D = (d + 1)(d + 2) / 2.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from timm_faim.metric import FillsMissing, checked_count, without_autocast

from .root import matrix_root

MOST_COMPONENTS = 128  # D = 8,385


class Moments(FillsMissing, nn.Module):
    """[B, c, H, W] or tokens [B, N, c] to the root of their second moments, a vector [B, D].

        z_n = P'(f_n - m),   z'_n = (z_n, b),   G = mean_n z'_n z'_n',   v = upper triangle of G^½

    with the entries off the diagonal times √2, so that |v|² = tr G. With b > 0 the mean of the z_n is in G too. Fewer
    positions than components give a G of low rank, which is fine; a map of one position has G = z'z'.

    Args:
        channels: c.
        components: d, from 1 to c and at most 128.
        steps: of the root's iteration, see :func:`matrix_root`. Few leave the smallest eigenvalues smaller than their
            root, which costs features nothing (docs/moments.md).
        channels_last: maps come as [B, H, W, c].
        prefix: so many leading tokens are no positions (class token, registers) and are left out.

    Parameters: ``projection`` (P, [c, d]), learned; ``mean`` (m, [c]) and ``offset`` (b, [1]), which :meth:`fit_` sets.

    Raises:
        TypeError, ValueError: numbers out of range; on call, maps of another number of channels.
    """

    def __init__(
        self,
        channels: int,
        components: int = 64,
        *,
        steps: int = 6,
        channels_last: bool = False,
        prefix: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.channels = checked_count("channels", channels)
        self.components = checked_count("components", components)
        self.steps = checked_count("steps", steps)
        if not self.components <= min(self.channels, MOST_COMPONENTS):
            raise ValueError(f"components must be at most the {self.channels} channels and {MOST_COMPONENTS}, got "
                             f"{components}")  # fmt: skip
        self.channels_last = channels_last
        self.prefix = prefix
        self.projection = nn.Parameter(torch.empty(self.channels, self.components, **factory))
        self.mean = nn.Parameter(torch.empty(self.channels, **factory), requires_grad=False)
        self.offset = nn.Parameter(torch.empty(1, **factory), requires_grad=False)
        self.reset_parameters()

    @property
    def out_features(self) -> int:
        """D."""
        return (self.components + 1) * (self.components + 2) // 2

    def reset_parameters(self) -> None:
        """P as random columns of length 1 on average (no QR, which half precision lacks), m = 0, b = 1."""
        nn.init.normal_(self.projection, std=1.0 / math.sqrt(self.channels))
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """v [B, D] of maps [B, c, H, W] or tokens [B, N, c], in at least float32."""
        return without_autocast(self._root_of_moments, (self.positions(x) - self.mean) @ self.projection)

    def _root_of_moments(self, z_BNd: Tensor) -> Tensor:
        z_BNd = z_BNd.to(torch.promote_types(z_BNd.dtype, torch.float32))
        b_BN1 = self.offset.to(z_BNd.dtype).expand(z_BNd.shape[0], z_BNd.shape[1], 1)
        z_BNn = torch.cat([z_BNd, b_BN1], -1)
        root_Bnn = matrix_root(torch.bmm(z_BNn.transpose(1, 2), z_BNn) / z_BNn.shape[1], self.steps)
        n = self.components + 1
        rows, columns = torch.triu_indices(n, n, device=z_BNd.device)
        weights = torch.where(rows == columns, 1.0, math.sqrt(2.0)).to(root_Bnn.dtype)
        return root_Bnn.flatten(1).index_select(1, rows * n + columns) * weights

    def positions(self, x: Tensor) -> Tensor:
        """[B, N, c] of maps or tokens."""
        if x.dim() == 4 and x.shape[-1 if self.channels_last else 1] == self.channels:
            return x.flatten(1, 2) if self.channels_last else x.flatten(2).transpose(1, 2)
        if x.dim() == 3 and x.shape[2] == self.channels and x.shape[1] > self.prefix:
            return x[:, self.prefix :]
        places = f"H, W, {self.channels}" if self.channels_last else f"{self.channels}, H, W"
        raise ValueError(f"expected maps [B, {places}] or tokens [B, N, {self.channels}], got shape {list(x.shape)}")

    @property
    def is_fitted(self) -> bool:
        """Whether m, P and b are those of data, here or in a checkpoint."""
        return bool(self.mean.any())

    @torch.no_grad()
    def fit_(self, maps: "Iterable[Tensor] | MapStatistics") -> "Moments":
        """Set m, P and b from maps or tokens, or their statistics: mean, leading principal directions, and the root
        mean variance of the kept components.

        Raises:
            ValueError: no maps, values that are not finite, or maps that are constant.
        """
        if not isinstance(maps, MapStatistics):
            statistics = MapStatistics(self)
            for x in maps:
                statistics.update(x)
            maps = statistics
        if not maps.count:
            raise ValueError("no maps to fit moments from")
        mean_c = maps.total_c / maps.count
        covariance_cc = maps.second_cc / maps.count - torch.outer(mean_c, mean_c)
        if not covariance_cc.isfinite().all():
            raise ValueError("the maps contain NaN or inf; check the backbone's weights and the input normalisation")
        values_c, vectors_cc = torch.linalg.eigh(covariance_cc)
        kept_d = values_c.flip(0)[: self.components].clamp_min(0.0)
        if not kept_d[0] > 1e-12 * (maps.second_cc.diagonal().sum() / maps.count):
            raise ValueError("the maps are constant; there are no moments to tell images apart by")
        self.mean.copy_(mean_c)
        self.projection.copy_(vectors_cc.flip(1)[:, : self.components])
        self.offset.copy_(kept_d.mean().sqrt())
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.components}, out_features={self.out_features}"


class MapStatistics:
    """Running mean and covariance of the positions of maps; float64 on the module's device, O(c²). Each image counts
    alike, however many positions it has."""

    def __init__(self, moments: Moments) -> None:
        self.moments = moments
        zeros = {"dtype": torch.float64, "device": moments.mean.device}
        c = moments.channels
        self.count, self.total_c, self.second_cc = (torch.zeros(shape, **zeros) for shape in ((), (c,), (c, c)))

    def update(self, x: Tensor) -> None:
        """Add the positions of maps or tokens."""
        f_BNc = self.moments.positions(x).to(self.total_c)
        self.count += len(f_BNc)
        self.total_c += f_BNc.mean(1).sum(0)
        flat = f_BNc.flatten(0, 1)
        self.second_cc += flat.t() @ flat / f_BNc.shape[1]

    def all_reduce(self) -> None:
        """Sum over all ranks of an initialised process group."""
        for sums in (self.count, self.total_c, self.second_cc):
            torch.distributed.all_reduce(sums)
