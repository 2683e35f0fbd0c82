"""Second moments of feature maps and their root, against eigendecompositions in float64."""

import math

import pytest
import torch

from timm_faim.moments import Moments, matrix_root


def positive(n, count=3, dtype=torch.float64, least=1e-2):
    """Matrices whose eigenvalues spread from `least` to 1 of the largest."""
    vectors = torch.linalg.qr(torch.randn(count, n, n, dtype=torch.float64)).Q
    values = torch.logspace(math.log10(least), 0, n, dtype=torch.float64)
    return (5.0 * vectors * values @ vectors.transpose(1, 2)).to(dtype)


def exact_root(G, ridge):
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(G + ridge * trace / G.shape[-1] * torch.eye(G.shape[-1], dtype=G.dtype))
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(1) @ vectors.transpose(1, 2)


@pytest.mark.parametrize("n", [3, 33])
def test_the_root_and_its_gradient_are_those_of_eigenvalues(n):
    G = positive(n).requires_grad_()
    weights = torch.randn(n, n, dtype=torch.float64)
    weights = weights + weights.t()
    roots = matrix_root(G, steps=25, ridge=1e-4), exact_root(G, 1e-4)
    torch.testing.assert_close(*roots, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad((root * weights).sum(), G)[0] for root in roots]
    torch.testing.assert_close(*(g + g.transpose(1, 2) for g in gradients), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [8, 10, 12])
def test_what_has_not_arrived_is_what_theory_says(steps):
    """An eigenvalue a of a matrix of trace 1 is at its root once (3/2)^steps sqrt(a) is large; none is above it."""
    a = torch.logspace(-8, 0, 9, dtype=torch.float64)
    a = a / a.sum()
    found = matrix_root(torch.diag(a)[None], steps, ridge=0.0)[0].diagonal()
    arrived = a.sqrt() * 1.5**steps > 6.0
    assert 2 <= arrived.sum() < 9 and (found <= a.sqrt() * (1 + 1e-12)).all()
    torch.testing.assert_close(found[arrived], a[arrived].sqrt(), rtol=1e-3, atol=0.0)


def test_float32_is_as_near_as_its_rounding():
    G = positive(65, least=1e-3)
    wanted = matrix_root(G)
    error = (matrix_root(G.float()).double() - wanted).norm() / wanted.norm()
    assert error < 65 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [torch.zeros, torch.ones], ids=["black", "constant"])
@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (2, 8, 1, 1), (2, 4, 8)])
def test_maps_without_variation_give_finite_vectors_and_gradients(shape, make, dtype):
    moments = Moments(8, 6).to(dtype)
    x = make(shape, dtype=dtype).requires_grad_()
    v = moments(x)
    v.square().sum().backward()
    assert v.dtype is torch.float32 and v.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("tokens", [False, True])
def test_the_vector_is_the_literal_formula(tokens):
    torch.manual_seed(0)
    moments = Moments(8, 5, steps=30).double()
    x = torch.randn(3, 8, 4, 6, dtype=torch.float64)
    moments.fit_([x])
    v = moments(x.flatten(2).transpose(1, 2) if tokens else x)
    f = x.flatten(2).transpose(1, 2)
    z = torch.cat([(f - moments.mean) @ moments.projection, moments.offset.expand(3, 24, 1)], -1)
    G = torch.einsum("bni,bnj->bij", z, z) / 24
    root = exact_root(G, 1e-4)
    expected = torch.stack([root[:, i, j] * (1.0 if i == j else 2**0.5) for i in range(6) for j in range(i, 6)], 1)
    assert v.shape == (3, moments.out_features) == (3, 21)
    torch.testing.assert_close(v, expected, rtol=1e-8, atol=1e-8)
    trace = G.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(v.square().sum(1), trace * (1 + 1e-4), rtol=1e-6, atol=0.0)


def test_the_fit_is_principal_components():
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    x = torch.randn(200, 9, 8) * torch.tensor([9.0, 5.0, 3.0, 0.1, 0.1, 0.1, 0.1, 0.1]) @ basis.t() + 7.0
    moments = Moments(8, 3).fit_(x.split(30))
    assert torch.allclose(moments.mean, x.mean((0, 1)), atol=1e-4)
    overlap = (moments.projection.t() @ basis[:, :3]).abs()
    assert torch.allclose(overlap, torch.eye(3), atol=0.05)
    kept = ((x - moments.mean) @ moments.projection).var((0, 1))
    assert moments.offset.item() == pytest.approx(kept.mean().sqrt().item(), rel=1e-2)


def test_compiles_exports_and_learns():
    moments, x = Moments(8, 4), torch.randn(2, 8, 3, 3)
    expected = moments(x)
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(moments, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    expected.sum().backward()
    assert moments.projection.grad.any() and moments.mean.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert moments(x).dtype is torch.float32


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Moments(8, 9), "at most the 8 channels and 128, got 9"),
    (lambda: Moments(300, 200), "at most the 300 channels and 128, got 200"),
    (lambda: Moments(8, 0), "components must be >= 1"),
    (lambda: Moments(8, 4)(torch.zeros(2, 9, 3, 3)), r"expected maps \[B, 8, H, W\].*\[2, 9, 3, 3\]"),
    (lambda: Moments(8, 4).fit_([]), "no maps"),
    (lambda: Moments(8, 4).fit_([torch.ones(2, 8, 3, 3)]), "the maps are constant"),
    (lambda: Moments(8, 4).fit_([torch.full((2, 8, 3, 3), float("nan"))]), "NaN or inf"),
])  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
