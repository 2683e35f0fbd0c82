"""Recipes chosen by held-out images: cosines are those of heads that have not seen them, and choices that stand."""

import pytest
import torch
from torch.nn.functional import normalize

from timm_faim import FAIMHead, fit_
from timm_faim.head.sharing import share_prototypes, sharing_weights
from timm_faim.models.stages import find_stage, offered_stages
from timm_faim.recipe import HeldOut, Plan, choose, sample


def features(C, n, widths, spread=1.0, seed=0):
    """Parts [C n, D] around class means, the classes one after the other."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(C).repeat_interleave(n)
    return [spread * torch.randn(C, D, generator=generator)[y] + torch.randn(len(y), D, generator=generator)
            for D in widths], y  # fmt: skip


def fitted(plan, parts, y, rank=64):
    x = torch.cat([parts[i] for i in plan.parts], 1)
    widths = [parts[i].shape[1] for i in plan.parts]
    several = {"parts": widths, "part_weights": plan.part_weights, "rank": rank} if len(widths) > 1 else {}
    return fit_(FAIMHead(x.shape[1], int(y.max()) + 1, **several), [(x, y)], plan.shrinkage, share=plan.share).eval()


@pytest.mark.parametrize("plan", [Plan((0,)), Plan((0, 1), 0.6, 0.1, 2.0), Plan((0, 2), 0.85, 0.5, 1.0)])
def test_cosines_are_those_of_a_head_without_the_fold(plan):
    parts, y = features(6, 5, [12, 20, 2100])  # the last has a Σ of few directions
    held = HeldOut(parts, y, 6, rank=64).fold(3, (0, 1))
    cosines, numbers = held.cosines(plan)
    assert numbers.tolist() == list(range(30))
    alike = held.kinds[0]
    for fold in range(3):
        out = alike == fold
        head = fitted(plan, [x[~out] for x in parts], y[~out])
        x = torch.cat([parts[i][out] for i in plan.parts], 1)
        wanted = head.embed(x) @ normalize(head.mu, dim=1).t()
        torch.testing.assert_close(cosines[out], wanted.detach(), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("D", [40, 3000])
def test_held_out_images_have_not_been_seen(D):
    """Labels of chance are not recognised, however many features there are."""
    x = torch.randn(200, D, generator=torch.Generator().manual_seed(0))
    y = torch.arange(200) % 10
    held = HeldOut([x], y, 10, rank=32).fold(5)
    assert held.scores([Plan((0,))])[0] < 0.25


def test_the_part_that_tells_classes_apart_is_chosen():
    (noise, good), y = features(8, 6, [16, 24], spread=0.0)
    good = good + 1.5 * torch.randn(8, 24, generator=torch.Generator().manual_seed(3))[y]
    held = HeldOut([noise, good], y, 8, rank=8).fold()
    chosen = choose(held)
    assert chosen.plan.parts == (0, 1)
    assert chosen.score > chosen.simpler["pooled features alone"] + 0.2
    assert chosen == choose(HeldOut([noise, good], y, 8, rank=8).fold())
    first, *others = chosen.lines(["pooled features", "layer3"])
    assert first.startswith("recipe: pooled features and layer3, ") and "pooled features alone" in "".join(others)


def test_what_the_user_gives_stands():
    parts, y = features(8, 6, [16, 24])
    held = HeldOut(parts, y, 8, rank=8).fold()
    plan = choose(held, [(0, 1)], shrinkage=0.77, share=3.0, weight=0.4).plan
    assert plan == Plan((0, 1), 0.4, 0.77, 3.0)
    assert Plan.from_json(plan.to_json()) == plan and plan.part_weights == [0.6, 0.4]


@pytest.mark.parametrize(("n", "weight"), [(1, 0.85), (3, 0.75)])
def test_too_little_to_choose_by(n, weight):
    parts, y = features(5, n, [16, 24])
    held = HeldOut(parts, y, 5, rank=8).fold()
    assert len(held) == (0 if n == 1 else 15)
    chosen = choose(held)
    assert chosen.plan == Plan((0, 1), weight) and chosen.score is None
    assert "fixed: too few images" in chosen.lines(["pooled features", "layer3"])[0]
    assert len(held.cosines(chosen.plan)[0]) == len(held)


def test_a_sample_has_all_classes_and_is_the_same_again():
    y = torch.cat([torch.zeros(500), torch.ones(3), torch.full((40,), 2)]).long()
    rows = sample(y, 60)
    assert torch.equal(rows, sample(y, 60)) and torch.equal(rows, rows.unique())
    assert torch.bincount(y[rows]).tolist() == [29, 3, 28]
    assert torch.equal(sample(y, 1000), torch.arange(543))


def test_sharing_by_products_is_sharing_by_points():
    m, counts = torch.randn(7, 12, dtype=torch.float64), torch.tensor([1, 4, 0, 2, 9, 1, 3])
    nothing, *others = sharing_weights(m @ m.t(), counts, [0.0, 0.5, 4.0])
    assert nothing is None
    for weights, strength in zip(others, (0.5, 4.0), strict=True):
        torch.testing.assert_close(weights @ m, share_prototypes(m, counts, strength))


@pytest.mark.parametrize("several", [{}, {"parts": (6, 14), "rank": 14}])
def test_one_image_a_class_has_the_covariance_of_all(several):
    x, y = torch.randn(30, 20, dtype=torch.float64) * torch.linspace(0.2, 3.0, 20), torch.arange(30)
    head = fit_(FAIMHead(20, 30, dtype=torch.float64, **several), [(x, y)])
    for part, z in zip(x.split(several.get("parts", (20,)), 1), _framed(head, x), strict=True):
        around = part - part.mean(0)
        T = around.t() @ around / 29
        shrunk = 0.07 * T + 0.93 * T.diagonal().mean() * torch.eye(len(T), dtype=T.dtype)
        wanted = around @ torch.linalg.inv(shrunk) @ around.t()
        got = z @ z.t()
        torch.testing.assert_close(got / got.diagonal().mean(), wanted / wanted.diagonal().mean())


def _framed(head, x):
    if len(head.parts) == 1:
        return [(x - head.center) @ head.whiten]
    first, second = x.split(head.parts, 1)
    return [(first - head.center) @ head.whiten, head.frames[0](second)]


def test_copies_are_held_out_together_and_classes_of_copies_never():
    (x,), y = features(6, 6, [20])
    x = x.clone()
    x[y == 0] = x[0].clone()  # a class of copies
    x[1::6] = x[::6].clone() * (1 + 1e-6)  # and in each class two that are the same but for rounding
    held = HeldOut([x, x.roll(1, 1)], y, 6, rank=8).fold(3, (0, 1))
    for folds in held.kinds:
        assert torch.equal(folds[1::6], folds[::6])
        assert (folds[y == 0] == -1).all() and (folds[y > 0] >= 0).all()
    assert choose(held).score > 0.2


def test_classes_of_copies_alone_and_a_single_class():
    x = 100.0 + torch.randn(4, 12)[torch.arange(4).repeat_interleave(5)]
    y = torch.arange(4).repeat_interleave(5)
    head = fit_(FAIMHead(12, 4), [(x, y)]).eval()
    assert torch.equal(head(x).argmax(1), y)
    held = HeldOut([x], y, 4, rank=8).fold()
    assert len(held) == 0 and choose(held).score is None
    one = HeldOut([torch.randn(30, 12)], torch.zeros(30, dtype=torch.long), 1, rank=8).fold()
    assert choose(one).score == 1.0


@pytest.mark.parametrize(
    ("arch", "others"),
    [
        ("tf_efficientnet_lite0", ["blocks.2.1", "blocks.3.2"]),
        ("resnet50", ["layer1.2", "layer2.3"]),
        ("vit_tiny_patch16_224", ["blocks.3", "blocks.9"]),
        ("test_resnet", ["layer1.0", "layer2.0"]),
    ],
)
def test_stages_that_are_offered(arch, others):
    assert offered_stages(arch, {}) == [find_stage(arch, {}).name, *others]


def test_no_stage_is_offered_where_no_block_gives_a_map():
    assert offered_stages("selecsls42b", {}) == []
