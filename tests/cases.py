"""Case generators shared by the property tests."""

import itertools

import pytest
import torch

from timm_faim import PRESETS, FAIMHead, FAIMMetric

FORMS = [
    pytest.param(full, symmetric, id=f"{'full' if full else 'diagonal'}-{'symmetric' if symmetric else 'randers'}")
    for full, symmetric in itertools.product((False, True), (True, False))
]
SIGMAS = [pytest.param(False, id="diagonal"), pytest.param(True, id="full")]


def random_metric(D, full_sigma, symmetric=True, dtype=torch.float64, eps=1e-6, device=None, spread=0.3):
    """A metric away from its initialisation: Σ with off-diagonals, |λ β| of the size of the root."""
    metric = FAIMMetric(D, full_sigma, symmetric, eps=eps, dtype=dtype, device=device)
    with torch.no_grad():
        for parameter in metric.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        metric.lmbda.fill_(0.5)
        metric.beta.copy_(torch.randn_like(metric.beta))
    return metric


def flat(*args, **options):
    """A head of the founding form."""
    return FAIMHead(*args, **PRESETS["flat"] | options)
