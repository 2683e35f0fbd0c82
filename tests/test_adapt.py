"""Prototypes that follow unlabelled images, and the check of whether they help."""

import copy

import pytest
import torch

from timm_faim import FAIMHead, fit_
from timm_faim.adapt import Check, adapt_, evidence
from timm_faim.calibration import known_score

PARTS = {"parts": (6, 10), "part_weights": (0.25, 0.75)}


def blobs(seed, per_class, classes=4, width=16, spread=1.5, centres=None):
    """Features [N, D] around centres [C, D], their classes, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.0 * torch.randn(classes, width, generator=generator) if centres is None else centres
    y = torch.arange(classes).repeat_interleave(per_class)
    return centres[y] + spread * torch.randn(len(y), width, generator=generator), y, centres


@pytest.fixture(params=[{}, PARTS, {"prior": True}, {"full_sigma": False}, {"space": "sphere"}], ids=str)
def case(request):
    """A fitted head, its labelled points and classes, and unlabelled points."""
    x, y, centres = blobs(0, 5)
    head = fit_(FAIMHead(16, 4, **request.param), [(x, y)]).eval()
    if head.prior is not None:
        torch.nn.init.normal_(head.prior, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return head, head.embed(x), y, head.embed(blobs(1, 8, centres=centres)[0])


@pytest.mark.parametrize("told", [False, True])
def test_the_prototypes_are_those_of_the_formula(case, told):
    head, z, y, u = case
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4]) if told else None
    s = torch.stack([(z[y == k].double() @ torch.nn.functional.normalize(head.mu[k].double(), dim=0)).sum()
                     for k in range(4)])  # fmt: skip
    torch.testing.assert_close(evidence(head, z, y).double(), s, rtol=1e-5, atol=1e-6)
    start = torch.nn.functional.normalize(head.mu.double(), dim=1)
    other, mu = copy.deepcopy(head).double(), start
    for _ in range(3):
        other.mu.data.copy_(mu)
        cosines = u.double() @ torch.nn.functional.normalize(mu, dim=1).t()
        logits = -16.0 / 0.7 * (2 - 2 * cosines + other.metric.eps).clamp_min(other.metric.eps).sqrt()
        logits = logits if head.prior is None else logits + head.prior.double() / 0.7
        b = torch.zeros(4, dtype=torch.double)
        for _ in range(10 if told else 0):
            b += (shares.double() * len(u) / (logits + b).softmax(1).sum(0)).log()
        p = (logits + b).softmax(1)
        total = s[:, None] * start + torch.stack([(p[:, k, None] * u.double()).sum(0) for k in range(4)])
        pieces = zip(total.split(head.parts, 1), head.mu.double().split(head.parts, 1), strict=True)
        mu = torch.cat([torch.nn.functional.normalize(a, dim=1) * m.norm(dim=1, keepdim=True) for a, m in pieces], 1)
    frame = {name: tensor.clone() for name, tensor in head.state_dict().items() if name != "mu"}
    used = adapt_(head, evidence(head, z, y), u, temperature=0.7, proportions=shares, steps=3)
    assert used == len(u)
    torch.testing.assert_close(head.mu.double(), mu, rtol=1e-4, atol=1e-5)
    for name, tensor in frame.items():
        assert torch.equal(head.state_dict()[name], tensor), name


@pytest.mark.parametrize("seed", range(6))
def test_prototypes_come_nearer_to_what_all_labels_would_give(seed):
    x, y, centres = blobs(seed, 2, classes=6, width=24)
    more, of_more, _ = blobs(100 + seed, 60, 6, 24, centres=centres)
    head = fit_(FAIMHead(24, 6), [(x, y)]).eval()
    with torch.no_grad():
        z, u = head.embed(x), head.embed(more)
        wanted = head.project(torch.stack([u[of_more == k].mean(0) for k in range(6)]))
        before = (head.mu * wanted).sum(1).mean()
        adapt_(head, evidence(head, z, y), u)
        assert (head.mu * wanted).sum(1).mean() > before + 0.1


def test_images_of_no_class_pull_nothing(case):
    head, z, y, u = case
    with torch.no_grad():
        far = -head.embed(head.mu.mean(0, keepdim=True)).expand(30, -1) if head.center is None else -u
        logits = (
            -head.gamma() * (2 - 2 * torch.cat([u, far]) @ torch.nn.functional.normalize(head.mu, dim=1).t()).sqrt()
        )
    logits = logits if head.prior is None else logits + head.prior.detach()
    scores = known_score(logits)
    least = scores[: len(u)].median().item()
    known = torch.cat([u, far])[scores >= least + 1e-4]
    one, two = copy.deepcopy(head), copy.deepcopy(head)
    s = evidence(head, z, y)
    assert adapt_(one, s, torch.cat([u, far]), least=least + 1e-4) == len(known)
    adapt_(two, s, known)
    torch.testing.assert_close(one.mu, two.mu, rtol=1e-5, atol=1e-6)
    before = one.mu.clone()
    assert adapt_(one, s, u, least=1e9) == 0 and torch.equal(one.mu, before)


def test_blocks_and_half_precision_change_nothing_but_rounding(case, monkeypatch):
    head, z, y, u = case
    one, two, s = copy.deepcopy(head), copy.deepcopy(head), evidence(head, z, y)
    adapt_(one, s, u)
    monkeypatch.setattr("timm_faim.adapt.prototypes._AT_ONCE", 5)
    torch.testing.assert_close(evidence(head, z, y), s)
    adapt_(two, s, u)
    torch.testing.assert_close(one.mu, two.mu, rtol=1e-5, atol=1e-6)
    adapt_(head, s, u.half())
    torch.testing.assert_close(one.mu, head.mu, rtol=1e-2, atol=1e-2)


def test_one_image_and_a_class_without_any(case):
    head, _, _, u = case
    s = torch.tensor([0.0, 3.0, 3.0, 3.0])
    assert adapt_(head, s, u[:1]) == 1 and head.mu.isfinite().all()


def test_what_cannot_be_is_refused(case):
    head, z, y, u = case
    s, before = evidence(head, z, y), head.mu.clone()
    nan = u.clone()
    nan[3, 2] = torch.nan
    for change, word in [
        ({"points": u[:0]}, "one unlabelled image or more"),
        ({"points": u[:, 1:]}, "points"),
        ({"points": nan}, "NaN"),
        ({"labelled": s[:2]}, "labelled"),
        ({"labelled": -s}, "labelled"),
        ({"proportions": torch.zeros(4)}, "proportions"),
        ({"temperature": 0.0}, "temperature"),
        ({"steps": 0}, "steps"),
    ]:
        with pytest.raises(ValueError, match=word):
            adapt_(head, **({"labelled": s, "points": u} | change))
    assert torch.equal(head.mu, before)
    with pytest.raises(ValueError, match="lambda_init"):
        adapt_(FAIMHead(16, 4, space="flat"), s, u)


def test_the_check_says_what_it_measured():
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 0])
    right = torch.nn.functional.one_hot(y, 2).float()
    worse, better = right.clone(), right.clone()
    worse[:6] = worse[:6].flip(1)
    better[:1] = better[:1].flip(1)
    assert Check.of(better, right, y) == Check(87.5, 100.0, pytest.approx(12.5), 8)
    assert Check.of(better, right, y).kept and Check.of(right, right, y).kept
    down = Check.of(right, worse, y)
    assert down.error == pytest.approx(100 * (6 / 8 * 2 / 8 * 8 / 7 / 8) ** 0.5) and not down.kept
    assert down.line().endswith("100.0 -> 25.0 % (± 16.4), not kept") and down.to_json()["images"] == 8
    with pytest.raises(ValueError, match="N >= 1"):
        Check.of(right[:0], right[:0], y[:0])
