"""Closed-form start from data: class means, shrunk within-class precision, between-class 1-form."""

import re

import pytest
import torch
from cases import SIGMAS, flat
from children import in_group
from torch import distributed, nn

from timm_faim import PRESETS, FAIMHead, fit_

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
    head = fit_(flat(D, C, full_sigma=full), [(x, targets)], shrinkage=0.01)
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
    head = fit_(flat(D, C, full_sigma=full, lambda_init=0.0), [(x, targets)], shrinkage=0.01)
    fitted = (head(test_x).argmax(-1) == test_targets).float().mean()
    euclidean = (torch.cdist(test_x, head.mu).argmin(-1) == test_targets).float().mean()
    assert fitted > 0.85 > euclidean


def test_model_fit_reads_the_heads_inputs_and_restores_the_mode():
    x, targets = clusters(torch.ones(D))
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), FAIMHead(D, C, space="sphere"))
    model.train()
    fit_(model, [(x[:150], targets[:150]), (x[150:], targets[150:])])
    assert model.training and model[1].training
    features = nn.functional.normalize(model[0](x), dim=-1)
    assert torch.allclose(model[2].mu[2], nn.functional.normalize(features[targets == 2].mean(0), dim=0), atol=1e-5)


def test_fewer_samples_than_features_and_an_empty_class(caplog):
    head = flat(D, C, full_sigma=True)
    before = head.mu[4].clone()
    fit_(head, [(torch.randn(4, D), torch.arange(4))])
    assert torch.equal(head.mu[4], before)
    assert "1 classes have no samples" in caplog.text
    assert torch.isfinite(head(torch.randn(3, D))).all()


def test_bad_input():
    head = FAIMHead(D, C)
    x, targets = clusters(torch.ones(D))
    with pytest.raises(ValueError, match=r"\[0, 5\).*5"):
        fit_(head, [(x, targets + 1)])
    with pytest.raises(ValueError, match="NaN"):
        fit_(head, [(x * float("nan"), targets)])
    with pytest.raises(ValueError, match="features are equal"):
        fit_(head, [(torch.ones_like(x), targets)])
    with pytest.raises(ValueError, match="shrinkage.*0"):
        fit_(head, [(x, targets)], shrinkage=0.0)
    with pytest.raises(ValueError, match="no FAIM head"):
        fit_(nn.Linear(D, C), [(x, targets)])
    with pytest.raises(ValueError, match="no samples"):
        fit_(nn.Sequential(head), [])
    with pytest.raises(ValueError, match="class indices"):
        fit_(nn.Sequential(head), [(x, torch.rand(N, C))])


def options_of(space, full):
    return PRESETS[space] | {"full_sigma": full}


SPACES = pytest.mark.parametrize("space", ["flat", "indicatrix"])


@SPACES
@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 30.0])
def test_a_fit_does_not_depend_on_the_scale_of_the_features(space, full, scale):
    x, targets = clusters(torch.linspace(0.5, 2.0, D))
    logits = fit_(FAIMHead(D, C, **options_of(space, full)), [(x, targets)])(x)
    scaled = fit_(FAIMHead(D, C, **options_of(space, full)), [(scale * x, targets)])(scale * x)
    # the smoothing of both roots, ε beside squared distances near 1, at γ = 10
    assert torch.allclose(scaled, logits, atol=0.05)
    assert torch.equal(scaled.argmax(1), logits.argmax(1))


@SPACES
@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_a_fit_at_an_extreme_scale_is_right_or_an_error_that_leaves_the_head(space, full, scale):
    x, targets = clusters(torch.linspace(0.5, 2.0, D))
    wanted = fit_(FAIMHead(D, C, **options_of(space, full)), [(x, targets)])(x)
    head = FAIMHead(D, C, **options_of(space, full))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        fit_(head, [(x.double() * scale, targets)])
    except ValueError as e:
        assert re.search(r"features of size .*e[+-]\d\d are beyond .*; scale them towards 1", str(e))
        assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())
    else:
        assert (head(scale * x).argmax(1) == wanted.argmax(1)).all()


def test_a_precision_that_drowns_in_eps_is_an_error_with_a_mend_that_works():
    x, targets = clusters(torch.linspace(0.5, 2.0, D))
    with pytest.raises(ValueError, match="smaller eps"):
        fit_(flat(D, C, full_sigma=True), [(3000 * x, targets)])
    wanted = fit_(flat(D, C, full_sigma=True), [(x, targets)])(x)
    got = fit_(flat(D, C, full_sigma=True, eps=1e-12), [(3000 * x, targets)])(3000 * x)
    assert torch.allclose(got, wanted, atol=0.05)


class TwoHeads(nn.Module):
    """The second head sees the images of some batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = FAIMHead(D, C), FAIMHead(D, C)

    def forward(self, x):
        return self.first(x) + (self.second(x) if x.shape[0] > 100 else 0)


def test_a_head_counts_the_batches_that_reach_it():
    x, targets = clusters(torch.ones(D))
    model = fit_(TwoHeads(), [(x[:200], targets[:200]), (x[200:300], targets[200:300])])
    alone = fit_(FAIMHead(D, C), [(x[:200], targets[:200])])
    assert torch.allclose(model.second.mu, alone.mu)
    assert torch.allclose(model.first.mu, fit_(FAIMHead(D, C), [(x[:300], targets[:300])]).mu)


def _fit_with_a_bad_rank(folder):
    assert distributed.get_world_size() == 2
    rank = distributed.get_rank()
    x, targets = clusters(torch.ones(D))
    if rank == 1:
        x[7, 2] = float("nan")
    model = nn.Sequential(FAIMHead(D, C))
    try:
        fit_(model, [(x[:200], targets[:200]), (x[200:], targets[200:])])
        message = "no error"
    except ValueError as e:
        message = str(e)
    torch.save((message, torch.isfinite(model[0].mu).all()), folder / f"{rank}.pt")


def test_what_is_wrong_on_one_process_raises_on_all(tmp_path):
    in_group(_fit_with_a_bad_rank, tmp_path)
    for rank in range(2):
        message, is_finite = torch.load(tmp_path / f"{rank}.pt")
        assert "NaN" in message and message.endswith("(process 1)") and is_finite
