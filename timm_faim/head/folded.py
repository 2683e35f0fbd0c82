"""A head without 1-form for inference: all that it multiplies features with, in one matrix."""

import torch
from torch import Tensor, nn

from .head import FAIMHead


class FoldedHead(nn.Module):
    """The logits of a head on the indicatrix or the sphere, from one linear layer.

    With m̂ = μ/|μ| and z = (x - c) A, the layer gives y = (x - c) A m̂' and z (on the sphere z = x), all that it takes
    for logits = -γ sqrt(2 - 2 y / |z| + ε). For one x the classes stand in the order of y alone, which
    :func:`timm_faim.to_linear` keeps.

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
        with torch.no_grad():
            mu_CD = head.project(head.mu).double()
            weight, center = mu_CD, None
            if head.whiten is not None:
                whiten = head.whiten.double() if head.full_sigma else torch.diag(head.whiten.double())
                weight, center = torch.cat([mu_CD @ whiten.t(), whiten.t()]), head.center
            square = head.gamma().double().square()
            kept = {"weight": weight, "center": center, "two": (2.0 + self.eps) * square, "slope": -2.0 * square,
                    "least": self.eps * square, "prior": head.prior}  # fmt: skip
            like = {"device": head.mu.device, "dtype": torch.promote_types(head.mu.dtype, torch.float32)}
            for name, value in kept.items():
                self.register_buffer(name, None if value is None else value.detach().to(**like, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., C] of features [..., D]."""
        z = x.to(self.weight.dtype)
        if self.center is not None:
            z = z - self.center
        y = nn.functional.linear(z, self.weight)
        if self.center is not None:
            y, z = y.tensor_split([self.num_classes], -1)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1e-4)
        logits = torch.addcmul(self.two, y, self.slope / length).clamp_min(self.least).sqrt().neg()
        return logits if self.prior is None else logits + self.prior
