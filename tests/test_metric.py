"""The metric: every fast path against the literal formula, and the properties of a Finsler norm."""

from functools import partial

import pytest
import torch
from cases import FORMS, random_metric
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_faim import FAIMMetric, faim_distance
from timm_faim.metric.functional import gemm_distance, reference_distance
from timm_faim.metric.triangular import tri_matmul, tri_matmul_t, tri_outer

B, C, D = 9, 7, 12


def points(n, dtype=torch.float64, device=None, scale=1.0):
    return scale * torch.randn(n, D, dtype=dtype, device=device)


def relative_error(value, oracle):
    return ((value.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_gemm_form_is_the_literal_formula(full, symmetric, device):
    metric = random_metric(D, full, symmetric, device=device)
    x, y = points(B, device=device), points(C, device=device)
    oracle = metric.reference(x, y)
    assert relative_error(faim_distance(x, y, metric), oracle) <= 1e-12
    assert relative_error(metric.norm(x[:, None] - y), oracle) <= 1e-12


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_error_is_at_most_that_of_the_literal_formula_in_float32(full, symmetric, offset, device):
    metric = random_metric(D, full, symmetric, device=device)
    x, y = points(B, device=device) + offset, points(C, device=device) + offset
    oracle = metric.reference(x, y)
    low = FAIMMetric(D, full, symmetric, device=device)
    low.load_state_dict(metric.state_dict())
    naive = relative_error(low.reference(x.float(), y.float()), oracle)
    assert relative_error(low(x.float(), y.float()), oracle) <= 2 * naive + 1e-6


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_first_and_second_derivatives(full, symmetric):
    metric = random_metric(5, full, symmetric)
    names = [name for name, _ in metric.named_parameters()]
    metric.forward = partial(metric.forward, scale=torch.tensor([-2.0], dtype=torch.float64))

    def distance(x, y, *parameters):
        return functional_call(metric, dict(zip(names, parameters, strict=True)), (x, y))

    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, y, *metric.parameters())
    assert torch.autograd.gradcheck(distance, inputs)
    assert torch.autograd.gradgradcheck(distance, inputs)


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_fused_gradients_equal_those_of_the_literal_formula_at_a_blocked_width(full, symmetric):
    """D = 300 takes the blocked triangular products, which the small widths of the other tests do not."""
    metric = random_metric(300, full, symmetric, spread=0.05)
    x = torch.randn(6, 300, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 300, dtype=torch.float64, requires_grad=True)
    inputs = [x, y, *metric.parameters()]
    weights = torch.randn(6, 5, dtype=torch.float64)
    fused = torch.autograd.grad((metric(x, y) * weights).sum(), inputs)
    _, _, beta, lmbda = metric.tensors(torch.float64)
    literal = reference_distance(x, y, metric.sigma(), beta, lmbda, metric.eps, symmetric)
    for got, want in zip(fused, torch.autograd.grad((literal * weights).sum(), inputs), strict=True):
        assert relative_error(got, want) <= 1e-9


def test_gradient_is_the_closed_form():
    """∇_x d_F = Σv / sqrt(v'Σv + ε) + λ β (β'v) / sqrt((β'v)² + ε), the founding document's equation (4)."""
    metric = random_metric(D, full_sigma=True)
    x, y = points(B).requires_grad_(), points(1)
    (grad,) = torch.autograd.grad(metric(x, y).sum(), x)
    v, sigma, beta, eps = (x - y).detach(), metric.sigma().detach(), metric.beta.detach(), metric.eps
    sv, b = v @ sigma, (v @ beta)[:, None]
    root = ((v * sv).sum(-1, keepdim=True) + eps).sqrt()
    expected = sv / root + metric.lmbda.detach() * beta * b / (b * b + eps).sqrt()
    assert relative_error(grad, expected) <= 1e-10


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_norm_properties(full, seed):
    torch.manual_seed(seed)
    symmetric, randers = (random_metric(D, full, s, eps=0.0) for s in (True, False))
    x, y, z = points(50), points(50), points(50)
    for metric in (symmetric, randers):
        F = metric.norm
        assert (F(x) > 0).all()
        assert torch.allclose(F(2.5 * x), 2.5 * F(x), rtol=1e-12)  # positive homogeneity
        assert (F(x + y) <= F(x) + F(y) + 1e-12).all()
        assert (F(x - z) <= F(x - y) + F(y - z) + 1e-12).all()  # triangle inequality of d_F
    assert torch.allclose(symmetric.norm(-x), symmetric.norm(x), rtol=1e-14)
    assert torch.allclose(symmetric(x, y), symmetric(y, x).t(), rtol=1e-9)
    assert not torch.allclose(randers.norm(-x), randers.norm(x), rtol=1e-2)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_randers_stays_positive_whatever_the_parameters(full, size):
    metric = random_metric(D, full, symmetric=False)
    with torch.no_grad():
        metric.beta.mul_(size)
        metric.lmbda.fill_(-size)
    sigma, beta, lmbda = metric.sigma(), metric.tensors(torch.float64)[2], metric.lmbda.abs()
    assert (lmbda**2 * beta @ torch.linalg.solve(sigma, beta)).item() < 1
    worst = -torch.linalg.solve(sigma, beta)  # the direction in which the 1-form is most negative
    assert metric.norm(worst).item() > 0
    assert (metric(points(B), points(C)) > 0).all()


def test_lambda_cannot_act_negatively():
    metric = random_metric(D, False)
    x, y = points(B), points(C)
    positive = metric(x, y)
    with torch.no_grad():
        metric.lmbda.neg_()
    assert torch.equal(metric(x, y), positive)


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_finite_at_a_prototype_and_at_large_norms(full, symmetric, scale, autocast, device):
    if autocast is torch.float16 and device == "cpu" and not torch.amp.is_autocast_available("cpu"):
        pytest.skip("no float16 autocast on this CPU build")
    metric = random_metric(D, full, symmetric, dtype=torch.float32, device=device)
    y = points(C, torch.float32, device, scale).requires_grad_()
    features = y.detach()[:5].to(autocast or torch.float32)
    y.data[:5] = features.float()  # x = μ exactly, also after rounding to half precision
    x = features.requires_grad_()
    with torch.autocast(torch.device(device).type, dtype=autocast, enabled=autocast is not None):
        d = metric(x, y)
    assert d.dtype is torch.float32
    assert torch.isfinite(d).all()
    assert d.diagonal().max() < 1e-2 * scale
    d.sum().backward()
    for tensor in (x, y, *metric.parameters()):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lose_small_distances(dtype, device):
    """Prototypes at 10·N(0, I): a distance of 1 is below the rounding of |x|² in half precision."""
    metric = FAIMMetric(768, lambda_init=0.0, device=device)
    y = 10 * torch.randn(20, 768, device=device)
    x = y + torch.nn.functional.normalize(torch.randn_like(y), dim=-1)
    with torch.autocast(torch.device(device).type, dtype=dtype):
        d = metric(x, y).diagonal()
    assert torch.allclose(d, torch.ones_like(d), atol=0.05)


class LargestAllocation(TorchDispatchMode):
    """The largest tensor that any operation makes, forward and backward."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("form", ["fused", "plain"])
@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_nothing_of_size_bcd_is_allocated(full, symmetric, form):
    B, C, D = 32, 48, 40
    metric = random_metric(D, full, symmetric)
    x = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    y = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    sigma, tril, beta, lmbda = metric.tensors(torch.float64)
    with LargestAllocation() as fast:
        plain = form == "plain"
        d = gemm_distance(x, y, sigma, tril, beta, lmbda, metric.eps, symmetric) if plain else metric(x, y)
        d.sum().backward()
    with LargestAllocation() as literal:
        metric.reference(x, y).sum().backward()
    assert fast.numel <= max(B * C, C * D, 2 * B * D, D * D)
    assert literal.numel >= B * C * D  # the counter does see it


@pytest.mark.parametrize("width", [40, 300])
def test_triangular_products(width):
    tril = torch.randn(width, width, dtype=torch.float64).tril()
    a, b = (torch.randn(6, width, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(tri_matmul(a, tril), a @ tril)
    assert torch.allclose(tri_matmul_t(a, tril), a @ tril.t())
    assert torch.allclose(tri_outer(a, b), torch.tril(a.t() @ b))


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_plain_form_used_by_the_compiler_equals_the_fused_node(full, symmetric):
    metric = random_metric(D, full, symmetric)
    x, y = points(B), points(C)
    sigma, tril, beta, lmbda = metric.tensors(torch.float64)
    plain = gemm_distance(x, y, sigma, tril, beta, lmbda, metric.eps, symmetric)
    assert relative_error(metric(x, y), plain.detach()) <= 1e-13


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_function_transforms_take_the_plain_form(full, symmetric):
    metric = random_metric(D, full, symmetric)
    x, y = points(B), points(C)
    assert relative_error(torch.func.vmap(metric, (0, None))(x, y), metric(x, y).detach()) <= 1e-13
    _, moved = torch.func.jvp(lambda v: metric(v, y), (x,), (torch.ones_like(x),))
    step = (metric(x + 1e-6, y) - metric(x - 1e-6, y)) / 2e-6
    assert relative_error(moved, step.detach()) <= 1e-6


def test_shapes_dtypes_and_bad_input():
    metric = FAIMMetric(D)
    assert metric(torch.randn(2, 3, D), torch.randn(C, D)).shape == (2, 3, C)
    assert metric(torch.randn(D), torch.randn(C, D)).shape == (C,)
    half = FAIMMetric(D, dtype=torch.bfloat16)
    assert half(torch.randn(B, D).bfloat16(), torch.randn(C, D).bfloat16()).dtype is torch.bfloat16
    with pytest.raises(ValueError, match=rf"\[\.\.\., {D}\].*\[2, 5\]"):
        metric(torch.randn(2, 5), torch.randn(C, D))
    with pytest.raises(ValueError, match="points y"):
        metric(torch.randn(2, D), torch.randn(C, D + 1))
    with pytest.raises(ValueError, match="-0.1"):
        FAIMMetric(D, lambda_init=-0.1)
    with pytest.raises(ValueError, match="in_features"):
        FAIMMetric(0)


@pytest.mark.parametrize(("full", "symmetric"), FORMS)
def test_backward_inside_autocast_keeps_the_precision(full, symmetric, device):
    metric = random_metric(D, full, symmetric, dtype=torch.float32, device=device)
    x, y = points(B, torch.float32, device), points(C, torch.float32, device)
    x.requires_grad_(), y.requires_grad_()
    inputs = (x, y, *metric.parameters())
    expected = torch.autograd.grad(metric(x, y).sum(), inputs)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = torch.autograd.grad(metric(x, y).sum(), inputs)
    for value, want in zip(got, expected, strict=True):
        assert relative_error(value, want.double()) <= 1e-5


def test_nan_parameters_give_nan_not_an_exception():
    """A training step that broke must show in the loss, which is where the training loop looks."""
    metric = random_metric(D, full_sigma=True, symmetric=False)
    with torch.no_grad():
        metric.L.fill_(float("nan"))
    assert torch.isnan(metric(points(B), points(C))).all()
