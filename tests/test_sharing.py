"""Prototypes shared with look-alikes: the literal posterior, and every kind of head fitted with it."""

import pytest
import torch
from torch.nn.functional import normalize

from timm_faim import FAIMHead, fit_
from timm_faim.head.sharing import share_prototypes

HEADS = {
    "indicatrix": {},
    "diagonal": {"full_sigma": False},
    "flat": {"space": "flat"},
    "flat diagonal": {"space": "flat", "full_sigma": False},
    "sphere": {"space": "sphere"},
    "parts": {"parts": (6, 14), "rank": 8},
}


def posterior(m_CD, counts_C, strength):
    """n_k B (n_k B + s I)⁻¹ m_k, class by class."""
    counts = counts_C.double()
    B = (m_CD * counts[:, None]).t() @ m_CD / counts.sum()
    s = strength * 0.01 * m_CD[counts > 0].square().sum(1).mean()
    eye = torch.eye(m_CD.shape[1], dtype=m_CD.dtype)
    return torch.stack([n * B @ torch.linalg.solve(n * B + s * eye, m) for n, m in zip(counts, m_CD, strict=True)])


@pytest.mark.parametrize(("C", "D"), [(7, 12), (30, 12)])
@pytest.mark.parametrize("strength", [0.5, 20.0])
def test_the_literal_posterior(C, D, strength):
    m, counts = torch.randn(C, D, dtype=torch.float64), torch.randint(1, 9, (C,))
    wanted = posterior(m, counts, strength)
    assert torch.allclose(share_prototypes(m, counts, strength), wanted, atol=1e-10)
    A = torch.randn(D, 3, dtype=torch.float64)
    assert torch.allclose(share_prototypes(m, counts, strength, m @ A), wanted @ A, atol=1e-10)


def test_nothing_shared_classes_without_images_and_bad_strengths():
    m, counts = torch.randn(6, 4), torch.tensor([5, 0, 1, 1, 3, 2])
    assert share_prototypes(m, counts, 0.0) is m
    shared = share_prototypes(m, counts, 1.0)
    assert torch.equal(shared[1], m[1]) and not torch.allclose(shared[2], m[2])
    seen = counts > 0
    assert torch.allclose(shared[seen], share_prototypes(m[seen], counts[seen], 1.0), atol=1e-6)
    for bad in (-0.1, 101.0, float("nan")):
        with pytest.raises(ValueError, match=r"share must lie in \[0, 100\], got"):
            share_prototypes(m, counts, bad)
        with pytest.raises(ValueError, match=r"share must lie in \[0, 100\], got"):
            fit_(FAIMHead(4, 6), [(torch.randn(8, 4), torch.arange(8) % 6)], share=bad)


def test_rare_classes_come_nearer_to_their_means():
    """Means in 4 of 40 directions: what one image has beside them is noise, and is taken for that."""
    m = torch.randn(60, 4, dtype=torch.float64) @ torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64)).Q.t()
    counts = torch.where(torch.arange(60) % 2 == 0, 1, 30)
    seen = m + 0.5 * torch.randn(60, 40, dtype=torch.float64) / counts.sqrt()[:, None]
    shared = share_prototypes(seen, counts, 1.0)
    true = normalize(m, dim=1)
    gain = (normalize(shared, dim=1) * true).sum(1) - (normalize(seen, dim=1) * true).sum(1)
    assert gain[counts == 1].mean() > 0.02
    assert gain[counts == 30].min() > -0.01


def tail(seed=0):
    """Features [N, 20] of 9 classes of 12 to 1 images."""
    counts = torch.tensor([12, 10, 8, 6, 4, 3, 2, 1, 1])
    y = torch.arange(9).repeat_interleave(counts)
    return (torch.randn(9, 20)[y] + 0.5 * torch.randn(len(y), 20)).double(), y, counts


@pytest.mark.parametrize("kind", HEADS)
def test_every_head_shares_in_the_frame_of_its_sigma(kind):
    x, y, counts = tail()
    heads = [FAIMHead(20, 9, lambda_init=0.0, dtype=torch.float64, **HEADS[kind]) for _ in range(3)]
    for head, share in zip(heads, (0.0, 1.0, 1e-9), strict=True):
        head.load_state_dict(heads[-1].state_dict())
        fit_(head, [(x, y)], share=share)
    plain, shared, hardly = heads
    for (name, a), (_, b) in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert torch.equal(a, b) != (name == "mu")
    assert torch.allclose(plain.mu, hardly.mu, atol=1e-6)
    if kind == "indicatrix":
        means = torch.stack([x[y == k].mean(0) for k in range(9)])
        framed = (means - x.mean(0)) @ plain.whiten
        assert torch.allclose(shared.mu, normalize(posterior(framed, counts, 1.0), dim=1), atol=1e-6)
    moved = (normalize(plain.mu, dim=1) * normalize(shared.mu, dim=1)).sum(1)
    assert moved[-1] < moved[0]  # one image against twelve


def test_one_image_in_every_class_shares_nothing():
    x = torch.randn(9, 20)
    plain, shared = FAIMHead(20, 9), FAIMHead(20, 9)
    fit_(plain, [(x, torch.arange(9))])
    fit_(shared, [(x, torch.arange(9))], share=1.0)
    assert torch.equal(plain.mu, shared.mu)
