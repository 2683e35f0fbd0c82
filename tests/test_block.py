"""Log and exp maps, charts and blocks: isometry, inverses, derivatives at the base point, the identity at the start."""

import copy
import math

import pytest
import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import nn

from timm_faim import FAIMBlock, FAIMChart, FAIMMetric, exp_map, log_map

D = 6
FORMS = [(full, symmetric) for full in (False, True) for symmetric in (True, False)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(full=False, symmetric=True, eps=1e-6, seed=0, dtype=torch.float64, lmbda=0.7):
    """A metric away from its start, points [4, 3, D] and a base point [D]."""
    generator = torch.Generator().manual_seed(seed)
    metric = FAIMMetric(D, full, symmetric, lmbda, eps=eps, dtype=torch.float64)
    with torch.no_grad():
        metric.beta.copy_(torch.randn(D, generator=generator, dtype=torch.float64))
        if full:
            lower = torch.randn(D, D, generator=generator, dtype=torch.float64).tril()
            metric.L.copy_(0.4 * lower + 1.5 * torch.eye(D))
        else:
            metric.log_sigma_diag.copy_(torch.randn(D, generator=generator, dtype=torch.float64))
    x, p = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3, D), (D,)))
    return metric.to(dtype), x.to(dtype), p.to(dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("full, symmetric", FORMS)
class TestMaps:
    def test_each_is_the_inverse_of_the_other(self, full, symmetric, eps, dtype, seed):
        metric, x, p = make(full, symmetric, eps, seed, dtype)
        spectrum = torch.linalg.eigvalsh(metric.sigma().double()).sqrt()  # of A
        for scale in (1e-4, 1.0, 1e3):
            near = p + scale * x
            back = exp_map(log_map(near, p, metric), p, metric)
            assert (back - near).abs().max() <= TOLERANCE[dtype] * near.abs().max() * spectrum.max() / spectrum.min()
            w = scale * x
            size = spectrum.max() * (w.abs().max() / spectrum.min() + p.abs().max())
            assert (log_map(exp_map(w, p, metric), p, metric) - w).abs().max() <= TOLERANCE[dtype] * size

    def test_length_is_the_distance(self, full, symmetric, eps, dtype, seed):
        metric, x, p = make(full, symmetric, eps, seed, dtype)
        length = log_map(x, p, metric).norm(dim=-1)
        v = (x - p).double()
        root = (v @ metric.sigma().double() * v).sum(-1).sqrt()
        _, _, beta, lmbda = metric.tensors(torch.float64)
        form = v @ beta
        expected = root + lmbda * (form.abs() if symmetric else form)  # F(x - p) without smoothing
        if eps == 0:
            assert (length - expected).abs().max() <= 10 * TOLERANCE[dtype] * expected.max()
        dual = (beta @ torch.linalg.solve(metric.sigma().double(), beta)).sqrt()
        bound = (1 + 3 * lmbda * dual) * math.sqrt(eps) + 10 * TOLERANCE[dtype] * expected.max()
        assert (length - expected).abs().max() <= bound
        assert (length - metric.norm(x - p)).abs().max() <= bound
        if eps:  # what the smoothing takes away is there
            assert (length - expected).abs().max() > 0

    def test_the_base_point_goes_to_zero(self, full, symmetric, eps, dtype, seed):
        metric, _, p = make(full, symmetric, eps, seed, dtype)
        assert (log_map(p, p, metric) == 0).all()
        assert torch.equal(exp_map(torch.zeros_like(p), p, metric), p)

    def test_homogeneous_of_degree_one(self, full, symmetric, eps, dtype, seed):
        metric, x, p = make(full, symmetric, eps, seed, dtype)
        far = 1.0 if eps == 0 else 1e6  # above the smoothing
        once, twice = (log_map(p + scale * x, p, metric) for scale in (far, 2 * far))
        assert (2 * once - twice).abs().max() <= max(1e-4 * math.sqrt(eps), 20 * TOLERANCE[dtype]) * twice.abs().max()


@pytest.mark.parametrize("full, symmetric", FORMS)
def test_lipschitz_near_the_base_point(full, symmetric):
    metric, x, p = make(full, symmetric)
    factor = metric.sigma().diagonal().sum().sqrt()  # at least |A|
    _, _, beta, lmbda = metric.tensors(torch.float64)
    dual = (beta @ torch.linalg.solve(metric.sigma(), beta)).sqrt()
    u, v = x.reshape(-1, D)[:6], x.reshape(-1, D)[6:]
    for h in (1e-1, 1e-3, 1e-6, 1e-9, 1e-12):
        step = (log_map(p + h * u, p, metric) - log_map(p + h * v, p, metric)).norm(dim=-1)
        assert (step <= (1 + 3 * lmbda * dual) * factor * h * (u - v).norm(dim=-1) + 1e-15).all()


@pytest.mark.parametrize("full, symmetric", FORMS)
@pytest.mark.parametrize("distance", [0.0, 1e-4, 1.0])
def test_gradients_at_and_near_the_base_point(full, symmetric, distance):
    metric, x, p = make(full, symmetric)
    v = (distance * x.reshape(-1, D)[:3]).requires_grad_()
    inputs = [v, p.clone().requires_grad_(), *metric.parameters()]
    for function in (lambda v, p, *_: log_map(p + v, p, metric), lambda v, p, *_: exp_map(v, p, metric)):
        assert torch.autograd.gradcheck(function, inputs, eps=1e-7)  # steps below the smoothing, sqrt(ε) = 1e-3


@pytest.mark.parametrize("full", [False, True])
def test_ill_conditioned_sigma(full):
    generator = torch.Generator().manual_seed(0)
    size = 48
    metric = FAIMMetric(size, full, lambda_init=0.5, eps=0.0)
    spectrum = torch.logspace(-3, 3, size, dtype=torch.float64)  # condition 1e6
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        if full:
            metric.L.copy_(torch.linalg.cholesky(turn @ torch.diag(spectrum) @ turn.T))
        else:
            metric.log_sigma_diag.copy_(spectrum.log())
    x, p = (torch.randn(*shape, generator=generator) for shape in ((64, size), (size,)))
    w = log_map(x, p, metric)
    exact = log_map(x.double(), p.double(), copy.deepcopy(metric).double())
    # no worse by more than a factor than float32 rounding of x itself, seen through A (|A| = sqrt(1e3))
    rounding = torch.finfo(torch.float32).eps * x.abs().max() * 1e3**0.5
    assert (w - exact).abs().max() <= 50 * rounding
    back = exp_map(w, p, metric)
    assert (back - x).abs().max() <= 50 * torch.finfo(torch.float32).eps * 1e3 * x.abs().max()  # times cond(A)


def test_features_first_and_broadcast_base_points():
    metric, _, p = make()
    x = torch.randn(2, D, 5, 7, dtype=torch.float64)
    last = x.permute(0, 2, 3, 1)
    for function in (log_map, exp_map):
        expected = function(last, p, metric).permute(0, 3, 1, 2)
        assert torch.equal(function(x, p, metric, dim=1), expected)
        each = torch.randn(2, D, 1, 1, dtype=torch.float64)
        found = function(x, each, metric, dim=1)
        for i in range(2):
            assert torch.allclose(found[i], function(last[i], each[i].flatten(), metric).permute(2, 0, 1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    metric, x, p = make(dtype=torch.float32)
    x = x.to(dtype)
    exact = log_map(x.float(), p, metric)
    assert log_map(x, p, metric).dtype == dtype
    assert torch.equal(log_map(x, p, metric), exact.to(dtype))
    with torch.autocast("cpu", dtype):
        assert torch.equal(log_map(x, p, metric), exact.to(dtype))


def test_widths_are_checked():
    metric, x, p = make()
    with pytest.raises(ValueError, match=r"expected 6 features at dimension -1, got shape \[4, 3, 5\]"):
        log_map(x[..., :5], p, metric)
    with pytest.raises(ValueError, match="expected base points of 6 features"):
        exp_map(x, p[:5], metric)
    with pytest.raises(ValueError, match="expected 6 features at dimension 1"):
        log_map(x, p, metric, dim=1)


BASES = ["learned", "mean", "mlp"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("full, symmetric", FORMS)
@pytest.mark.parametrize(
    "shape, first", [((3, D), False), ((3, 5, D), False), ((3, 4, 5, D), False), ((3, D, 4, 5), True)]
)
def test_a_chart_starts_as_the_identity(base, full, symmetric, shape, first):
    chart = FAIMChart(D, base=base, full_sigma=full, symmetric=symmetric, channels_first=first)
    x = 10 * torch.randn(shape)
    p = chart.base_point(x)
    assert (p == 0).all()
    assert (chart.log(x, p) - x).abs().max() <= 1e-5 and (chart.exp(x, p) - x).abs().max() <= 1e-5


@pytest.mark.parametrize("base, symmetric", [(base, symmetric) for base in BASES for symmetric in (True, False)])
def test_everything_leaves_its_start(base, symmetric):
    block = FAIMBlock(D, "mlp", base=base, symmetric=symmetric)
    before = copy.deepcopy(block.chart.state_dict())
    optimizer = torch.optim.AdamW(block.parameters(), 0.01, weight_decay=0.0)
    x, target = torch.randn(64, D) + 0.5, torch.randn(64, D)
    losses = []
    for _ in range(30):
        loss = (block(x.unsqueeze(1)).squeeze(1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in block.chart.state_dict().items():
        assert (value - before[name]).abs().max() > 1e-5, name


def test_a_shared_metric_is_no_parameter_of_the_chart():
    metric = FAIMMetric(D, lambda_init=0.0)
    block = FAIMBlock(D, "linear", metric=metric)
    assert {name for name, _ in block.named_parameters()} == {"inner.weight", "inner.bias", "chart.p"}
    block(torch.randn(2, D)).sum().backward()
    assert metric.lmbda.grad.abs() > 0
    with pytest.raises(ValueError, match="the metric has width 6, the chart 7"):
        FAIMChart(7, metric)


@pytest.mark.parametrize(
    "inner", ["linear", "mlp", "attention", Mlp(8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), Block(8, 2)]
)
def test_a_block_starts_equal_to_what_it_wraps(inner):
    block = FAIMBlock(8, inner).eval()
    x = torch.randn(3, 5, 8)
    assert (block(x) - block.inner(x)).abs().max() <= 1e-5
    images = FAIMBlock(8, nn.Conv2d(8, 8, 3, padding=1), channels_first=True)
    x = torch.randn(2, 8, 4, 4)
    assert (images(x) - images.inner(x)).abs().max() <= 1e-5


def moved(block):
    """A block whose chart is away from its start."""
    chart = block.chart
    with torch.no_grad():
        chart.p.normal_()
        chart.metric.lmbda.fill_(0.8)
        chart.metric.beta.normal_()
    return block


@pytest.mark.parametrize("first", [False, True])
def test_residuals(first):
    shape = (3, D, 4, 4) if first else (3, 5, D)
    inner = nn.Conv2d(D, D, 1) if first else nn.Linear(D, D)
    x = torch.randn(shape)
    blocks = {
        kind: moved(FAIMBlock(D, inner, residual=kind, channels_first=first)) for kind in ("none", "tangent", "ambient")
    }
    chart = blocks["none"].chart
    for block in blocks.values():
        block.chart = chart
    w = chart.log(x, chart.p)
    assert torch.equal(blocks["none"](x), chart.exp(inner(w), chart.p))
    assert torch.equal(blocks["tangent"](x), chart.exp(w + inner(w), chart.p))
    p = chart.p.reshape(-1, 1, 1) if first else chart.p
    assert torch.allclose(blocks["ambient"](x), x + blocks["none"](x) - p, atol=1e-6)


def test_with_a_linear_map_inside_the_block_is_not_affine():
    """x - p, W, p + v would be: its second differences vanish."""
    block = moved(FAIMBlock(D, "linear", inner_options={"bias": False})).double()
    x, h = torch.randn(20, D, dtype=torch.float64), torch.randn(20, D, dtype=torch.float64)
    second = block(x + h) - 2 * block(x) + block(x - h)
    assert second.norm(dim=-1).median() > 0.01
    with torch.no_grad():
        block.chart.metric.lmbda.zero_()
    assert (block(x + h) - 2 * block(x) + block(x - h)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(inner="conv"), "inner must be a module or one of"),
        (dict(residual="yes"), "residual must be one of"),
        (dict(base="moving"), "base must be one of"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        FAIMBlock(D, **options)
