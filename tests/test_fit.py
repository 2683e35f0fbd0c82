"""Closed-form start from data: class means, shrunk within-class precision, between-class 1-form."""

import pytest
import torch
from cases import SIGMAS
from torch import nn

from timm_faim import FAIMHead, fit_, fit_heads

N, C, D = 400, 5, 8


def clusters(spread):
    """Classes that differ along the first axis only, with within-class standard deviations ``spread`` [D]."""
    targets = torch.arange(N) % C
    x = torch.randn(N, D) * spread
    x[:, 0] += 3.0 * targets
    return x, targets


@pytest.mark.parametrize("full", SIGMAS)
def test_means_precision_and_direction(full):
    spread = torch.linspace(0.5, 2.0, D)
    x, targets = clusters(spread)
    head = fit_(FAIMHead(D, C, full_sigma=full), x, targets, shrinkage=0.01)
    for k in range(C):
        assert torch.allclose(head.mu[k], x[targets == k].mean(0), atol=1e-5)
    diagonal = head.metric.sigma().diagonal()
    expected = spread.pow(-2)
    assert torch.allclose(diagonal / diagonal.mean(), expected / expected.mean(), rtol=0.3)
    beta, sigma = head.metric.beta, head.metric.sigma()
    assert (beta @ torch.linalg.solve(sigma, beta)).item() == pytest.approx(1, rel=1e-3)
    assert beta.abs().argmax() == 0 and beta[0].abs() > 0.95 * beta.norm()
    mean_squared = head.metric.norm(x[:, None] - head.mu).square().mean().item()
    assert mean_squared == pytest.approx(1, abs=0.35)


@pytest.mark.parametrize("full", SIGMAS)
def test_whitening_beats_euclidean_prototypes_where_scales_differ(full):
    spread = torch.ones(D)
    spread[1:4] = 30.0
    x, targets = clusters(spread)
    test_x, test_targets = clusters(spread)
    head = fit_(FAIMHead(D, C, full_sigma=full, lambda_init=0.0), x, targets, shrinkage=0.01)
    fitted = (head(test_x).argmax(-1) == test_targets).float().mean()
    euclidean = (torch.cdist(test_x, head.mu).argmin(-1) == test_targets).float().mean()
    assert fitted > 0.85 > euclidean


def test_model_fit_reads_the_heads_inputs_and_restores_the_mode():
    x, targets = clusters(torch.ones(D))
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), FAIMHead(D, C, normalize=True))
    model.train()
    fit_heads(model, [(x[:150], targets[:150]), (x[150:], targets[150:])])
    assert model.training and model[1].training
    features = nn.functional.normalize(model[0](x), dim=-1)
    assert torch.allclose(model[2].mu[2], features[targets == 2].mean(0), atol=1e-5)


def test_fewer_samples_than_features_and_an_empty_class(caplog):
    head = FAIMHead(D, C, full_sigma=True)
    before = head.mu[4].clone()
    fit_(head, torch.randn(4, D), torch.arange(4))
    assert torch.equal(head.mu[4], before)
    assert "1 classes have no samples" in caplog.text
    assert torch.isfinite(head(torch.randn(3, D))).all()


def test_bad_input():
    head = FAIMHead(D, C)
    x, targets = clusters(torch.ones(D))
    with pytest.raises(ValueError, match=r"\[0, 5\).*5"):
        fit_(head, x, targets + 1)
    with pytest.raises(ValueError, match="NaN"):
        fit_(head, x * float("nan"), targets)
    with pytest.raises(ValueError, match="features are equal"):
        fit_(head, torch.ones_like(x), targets)
    with pytest.raises(ValueError, match="shrinkage.*0"):
        fit_(head, x, targets, shrinkage=0.0)
    with pytest.raises(ValueError, match="no FAIM head"):
        fit_heads(nn.Linear(D, C), [(x, targets)])
    with pytest.raises(ValueError, match="no samples"):
        fit_heads(nn.Sequential(head), [])
    with pytest.raises(ValueError, match="class indices"):
        fit_heads(nn.Sequential(head), [(x, torch.rand(N, C))])
