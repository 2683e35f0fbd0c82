"""The founding FAIM head, written here from its formula: the contract that FAIMHead keeps.

logits_k = -γ ( sqrt((x-μ_k)'Σ(x-μ_k) + ε) + λ sqrt((β'(x-μ_k))² + ε) ),  ε = 1e-6,
Σ = diag(exp(log_sigma_diag)) + ε I or tril(L) tril(L)' + ε I; μ and β start at N(0, 1), λ and γ are 0-d.
"""

import torch
from torch import nn


class FoundingHead(nn.Module):
    def __init__(self, D, C, lambda_init=0.1, scale_init=10.0, full_sigma=False):
        super().__init__()
        self.mu = nn.Parameter(torch.randn(C, D))
        self.beta = nn.Parameter(torch.randn(D))
        self.lmbda = nn.Parameter(torch.tensor(lambda_init))
        self.scale = nn.Parameter(torch.tensor(scale_init))
        if full_sigma:
            self.L = nn.Parameter(torch.eye(D))
        else:
            self.log_sigma_diag = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        if hasattr(self, "L"):
            sigma = torch.tril(self.L) @ torch.tril(self.L).T + 1e-6 * eye
        else:
            sigma = torch.diag(self.log_sigma_diag.exp()) + 1e-6 * eye
        v = x[:, None] - self.mu
        riemann = ((v @ sigma) * v).sum(-1)
        return -self.scale * ((riemann + 1e-6).sqrt() + self.lmbda * ((v @ self.beta).square() + 1e-6).sqrt())
