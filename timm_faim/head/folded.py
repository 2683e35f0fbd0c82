"""A head without 1-form for inference: all that it multiplies features with, in one matrix a part."""

import torch
from torch import Tensor, nn

from .head import FAIMHead


class FoldedHead(nn.Module):
    """The logits of a head on the indicatrix or the sphere, from one linear layer.

    With m̂ = μ/|μ| and z = (x - c) A, the layer gives y = (x - c) A m̂' and z (on the sphere z = x), all that it takes
    for logits = -γ sqrt(2 - 2 y / |z| + ε). For one x the classes stand in the order of y alone, which
    :func:`timm_faim.to_linear` keeps.

    Of features in parts each has such a layer, and the sum of √w_i y_i / |z_i| takes the place of y / |z|. Where Σ has
    few directions U, the layer gives u = U'(x - c) in the place of z, and |z|² = |x - c|² + (2 k + k²)·u².

    Args:
        head: copied; later changes of it have no effect here.

    Raises:
        ValueError: a head with a 1-form, or one that is flat.

    Shapes: B images, C classes, D features.
    """

    def __init__(self, head: FAIMHead) -> None:
        super().__init__()
        if not head.cosine:
            raise ValueError(f"a head of space={head.space!r} with a 1-form or a metric that learns does not fold; use "
                             "it as it is")  # fmt: skip
        self.num_classes, self.in_features, self.eps = head.num_classes, head.in_features, head.metric.eps
        self.parts = head.parts
        with torch.no_grad():
            mu_CD = head.project(head.mu).double()
            weight, center = mu_CD, None
            if head.whiten is not None:
                first_CD = mu_CD[:, : self.parts[0]]
                if head.part_weights is not None:
                    first_CD = first_CD * head.part_weights[0].double().sqrt()
                whiten = head.whiten.double() if head.full_sigma else torch.diag(head.whiten.double())
                weight, center = torch.cat([first_CD @ whiten.t(), whiten.t()]), head.center
            square = head.gamma().double().square()
            kept = {"weight": weight, "center": center, "two": (2.0 + self.eps) * square, "slope": -2.0 * square,
                    "least": self.eps * square, "prior": head.prior}  # fmt: skip
            like = {"device": head.mu.device, "dtype": torch.promote_types(head.mu.dtype, torch.float32)}
            for name, value in kept.items():
                self.register_buffer(name, None if value is None else value.detach().to(**like, copy=True))
            self.further = nn.ModuleList()
            for i, frame in enumerate(head.frames, 1):
                mine_CD = mu_CD.split(self.parts, 1)[i] * head.part_weights[i].double().sqrt()
                self.further.append(_FoldedPart(frame, mine_CD, like))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D]."""
        pieces = x.to(self.weight.dtype).split(self.parts, -1)
        z = pieces[0]
        if self.center is not None:
            z = z - self.center
        y = nn.functional.linear(z, self.weight)
        if self.center is not None:
            y, z = y.tensor_split([self.num_classes], -1)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1e-4)
        if len(self.further) == 0:
            logits = torch.addcmul(self.two, y, self.slope / length)
        else:
            y = y / length
            for i, part in enumerate(self.further):
                y = y + part(pieces[i + 1])
            logits = torch.addcmul(self.two, y, self.slope)
        logits = logits.clamp_min(self.least).sqrt().neg()
        return logits if self.prior is None else logits + self.prior


class _FoldedPart(nn.Module):
    """√w y / |z| [..., C] of a further part's features."""

    def __init__(self, frame: nn.Module, mu_CD: Tensor, like: dict) -> None:
        super().__init__()
        self.num_classes = len(mu_CD)
        used = frame.stretch != 0
        directions_Dr, k_r = frame.directions[:, used].double(), frame.stretch[used].double()
        weight = torch.cat([mu_CD + (mu_CD @ directions_Dr * k_r) @ directions_Dr.t(), directions_Dr.t()])
        for name, value in {"weight": weight, "center": frame.center, "growth": 2.0 * k_r + k_r.square()}.items():
            self.register_buffer(name, value.detach().to(**like, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        v = x - self.center
        y, u = nn.functional.linear(v, self.weight).tensor_split([self.num_classes], -1)
        square = v.square().sum(-1, keepdim=True) + (u.square() * self.growth).sum(-1, keepdim=True)
        return y / square.clamp_min(1e-8).sqrt()
