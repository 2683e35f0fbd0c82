"""Heads of features in parts: one point of a product of spheres, against the literal formula in float64."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from timm_faim import FAIMHead, FAIMInfoNCELoss, FAIMTripletLoss, FoldedHead, TargetMargin, fit_, to_linear
from timm_faim.head.parts import part_cosines

C, PARTS, WEIGHTS = 5, [6, 10, 4], [0.5, 0.3, 0.2]
D, N = sum(PARTS), 60
KINDS = [
    pytest.param({}, id="full"),
    pytest.param({"full_sigma": False}, id="diagonal"),
    pytest.param({"prior": True}, id="prior"),
    pytest.param({"part_weights": [1.0, 0.0, 3.0]}, id="a part without weight"),
    pytest.param({"rank": 3}, id="few directions"),
]
SCRIPTS = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")


def data(count=N):
    targets = torch.arange(count) % C
    x = torch.randn(count, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64) + 3.0
    return x + 2.0 * F.one_hot(targets, D), targets


def product(dtype=torch.float64, **options):
    return FAIMHead(D, C, **{"parts": PARTS, "part_weights": WEIGHTS, "rank": 8, "dtype": dtype} | options)


def fitted(dtype=torch.float64, **options):
    """A fitted head whose prototypes and prior then have moved."""
    head = fit_(product(**options), [data()])
    with torch.no_grad():
        head.mu.add_(0.1 * torch.randn_like(head.mu))
        head.scale.mul_(-0.7)
        if head.prior is not None:
            head.prior.normal_()
    return head.to(dtype)


def literal_points(head, x):
    """Unit points of each part, in the parts' own frames."""
    first, *others = x.split(PARTS, -1)
    z = [(first - head.center) @ (head.whiten if head.full_sigma else torch.diag(head.whiten))]
    for part, frame in zip(others, head.frames, strict=True):
        U = frame.directions
        z.append((part - frame.center) @ (torch.eye(len(U), dtype=U.dtype) + U @ torch.diag(frame.stretch) @ U.t()))
    return [v / v.norm(dim=-1, keepdim=True) for v in z]


def literal_logits(head, x):
    weights = head.part_weights.sqrt()
    point = torch.cat([w * v for w, v in zip(weights, literal_points(head, x), strict=True)], -1)
    mu = head.mu / head.mu.norm(dim=1, keepdim=True)
    squares = (point[:, None] - mu).square().sum(-1)
    logits = -head.scale.abs() * (squares + head.metric.eps).sqrt()
    return logits if head.prior is None else logits + head.prior


@pytest.mark.parametrize("options", KINDS)
def test_logits_are_the_literal_formula(options):
    head, (x, _) = fitted(**options), data()
    torch.testing.assert_close(head(x), literal_logits(head, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", KINDS)
def test_squared_distances_are_the_weighted_sum_of_those_of_the_parts(options):
    head, (x, targets) = product(**options), data()
    fit_(head, [(x, targets)])
    points = literal_points(head, x)
    means = torch.stack([x[targets == k].mean(0) for k in range(C)])
    prototypes = literal_points(head, means)
    squares = sum(w * torch.cdist(a, b).square() for w, a, b in zip(head.part_weights, points, prototypes, strict=True))
    wanted = -head.scale * (squares + head.metric.eps).sqrt()
    torch.testing.assert_close(head(x), wanted, rtol=1e-7, atol=1e-7)
    assert head.part_weights.sum().item() == pytest.approx(1)


def literal_fit(x, targets, shrinkage, full):
    """Centre and frame of each part as numpy would have them: all directions, D × D matrices."""
    within = torch.cat([x[targets == k] - x[targets == k].mean(0) for k in range(C)])
    for i, part in enumerate(x.split(PARTS, 1)):
        residuals = within.split(PARTS, 1)[i]
        S = residuals.t() @ residuals / (len(x) - C)
        if i == 0 and not full:
            S = torch.diag(S.diagonal())
        S = (1 - shrinkage) * S + shrinkage * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)
        yield part.mean(0), S


@pytest.mark.parametrize("full", [True, False], ids=["full", "diagonal"])
@pytest.mark.parametrize("shrinkage", [0.05, 0.3])
def test_the_closed_form_fit_is_the_literal_one(full, shrinkage):
    x, targets = data()
    head = product(full_sigma=full, rank=10)
    fit_(head, [(x[some], targets[some]) for some in torch.randperm(N).split(17)], shrinkage)
    points = torch.zeros(N + C, 0, dtype=x.dtype)
    both = torch.cat([x, torch.stack([x[targets == k].mean(0) for k in range(C)])])
    for part, (center, S), weight in zip(both.split(PARTS, 1), literal_fit(x, targets, shrinkage, full), WEIGHTS,
                                         strict=True):  # fmt: skip
        # distances on the sphere see A A' alone, so any root of the inverse will do
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(S), (part - center).t(), upper=False).t()
        points = torch.cat([points, weight**0.5 * z / z.norm(dim=1, keepdim=True)], 1)
    wanted = -16.0 * (torch.cdist(points[:N], points[N:]).square() + 1e-6).sqrt()
    torch.testing.assert_close(head(x), wanted, rtol=1e-6, atol=1e-6)


def test_a_fit_tells_classes_apart_that_only_a_later_part_does():
    targets = torch.arange(200) % C
    x = torch.randn(200, D)
    x[:, 6:11] += 3.0 * F.one_hot(targets, C)
    x[:, 11:16] *= 30.0
    options = {"dtype": torch.float32, "part_weights": [1, 8, 1]}
    head = fit_(product(**options), [(x[:100], targets[:100])], shrinkage=1e-3)
    assert (head(x[100:]).argmax(1) == targets[100:]).float().mean() > 0.8
    plain = product(**options)  # the same without Σ
    with torch.no_grad():
        plain.mu.copy_(torch.stack([plain.embed(x[:100][targets[:100] == k]).mean(0) for k in range(C)]))
    assert (plain(x[100:]).argmax(1) == targets[100:]).float().mean() < 0.5


def test_one_part_is_the_head_without_parts():
    x, targets = data()
    plain, one = (fit_(FAIMHead(D, C, dtype=torch.float64, **parts), [(x, targets)]) for parts in ({}, {"parts": [D]}))
    assert plain.state_dict().keys() == one.state_dict().keys()
    assert torch.equal(plain(x), one(x))


@pytest.mark.parametrize("options", KINDS)
def test_gradients_are_right(options):
    head, (x, _) = fitted(**options), data(2)
    names = ["mu", "scale", *["prior"] * (head.prior is not None)]

    def call(x, *values):
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (x,))

    values = [head.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *values))


def test_frames_and_weights_are_not_trained():
    head, (x, targets) = fitted(torch.float32), data()
    F.cross_entropy(head(x.float()), targets).backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {"mu", "scale"}
    assert {n for n, p in head.named_parameters() if p.requires_grad} - {"mu", "scale"} == set()
    assert {"part_weights", "frames.0.directions", "frames.1.stretch"} <= head.no_weight_decay()


@SCRIPTS
@pytest.mark.parametrize("options", KINDS)
def test_compiled_scripted_and_exported_heads_are_the_head(options):
    head, (x, targets) = fitted(torch.float32, **options), data(8)
    x, close = x.float(), dict(rtol=1e-4, atol=1e-4)
    expected = head(x)
    torch.testing.assert_close(torch.jit.script(head)(x), expected, **close)
    dynamic = {"x": {0: torch.export.Dim("batch", max=4096)}}
    exported = torch.export.export(head, (x,), dynamic_shapes=dynamic).module()
    torch.testing.assert_close(exported(x[:3]), expected[:3], **close)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **close)
    for each in (head, compiled):
        F.cross_entropy(each(x), targets).backward()
    torch.testing.assert_close(compiled.mu.grad, head.mu.grad, **close)
    torch.testing.assert_close(torch.func.vmap(head)(x), expected, **close)


def test_layouts():
    head, (x, _) = fitted(), data(6)
    expected = head(x)
    torch.testing.assert_close(head(x.reshape(2, 3, D)), expected.reshape(2, 3, C))
    torch.testing.assert_close(head(x[:, :, None, None]), expected[:, :, None, None])
    image = torch.stack([x, x.flip(0)], 2)[..., None]
    torch.testing.assert_close(head(image)[:, :, 1, 0], expected.flip(0))
    with pytest.raises(ValueError, match=rf"expected features \[..., {D}\].*\[6, {D - 1}\]"):
        head(x[:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_input(dtype):
    """Distances are float32: what differs from float64 is the rounding of parameters and features alone."""
    head, (x, _) = fitted(torch.float32), data()
    x = x.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out.double(), copy.deepcopy(head).double()(x.double()), rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(head).to(dtype)
    wanted = copy.deepcopy(half).double()(x.double())
    assert half(x).dtype is dtype
    assert (half(x).double() - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max()
    out = half(x.float())  # of float32 features they are float32
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("images", [N, 12], ids=["all directions", "more rank than directions"])
def test_the_folded_head_is_the_head(options, images):
    head, (x, targets) = product(**options), data(images)
    head.load_state_dict(fit_(head, [(x, targets)]).state_dict())
    if head.prior is not None:
        nn.init.normal_(head.prior)
    folded = FoldedHead(head.float())
    exact, x = copy.deepcopy(head).double(), torch.randn(20, D, dtype=torch.float64) * 4 + 3
    wanted = exact(x)
    # rounding of a cosine near 1 shows in the distance as its root
    torch.testing.assert_close(folded(x.float()).double(), wanted, rtol=1e-4, atol=1e-3)
    # the head's smoothing of lengths, 1e-9 beside 1
    torch.testing.assert_close(FoldedHead(exact)(x), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(FoldedHead(head).double()(x), wanted, rtol=1e-4, atol=1e-3)
    assert folded(x.float().reshape(4, 5, D)).shape == (4, 5, C)
    half = folded.bfloat16()(x)
    assert half.dtype is torch.bfloat16
    assert (half - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


def test_a_feature_at_the_centre_is_finite_and_at_right_angles():
    head = fitted()
    center = torch.cat([head.center, *(frame.center for frame in head.frames)])[None].clone().requires_grad_()
    out = head(center)
    torch.testing.assert_close(out, -head.gamma() * torch.full((1, C), 2 + head.metric.eps, dtype=out.dtype).sqrt())
    torch.testing.assert_close(FoldedHead(head)(center), out)
    out.sum().backward()
    assert center.grad.isfinite().all()


def test_the_parts_cosines_sum_to_the_whole_after_a_fit():
    head, (x, _) = fit_(product(), [data()]), data()
    cosines = part_cosines(head, x)
    assert cosines.shape == (3, N, C) and cosines.abs().max() <= 1 + 1e-9
    whole = F.cosine_similarity(head.embed(x)[:, None], head.mu, dim=-1)
    torch.testing.assert_close(torch.einsum("p,pnc->nc", head.part_weights, cosines), whole, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        head.mu[:, :6] *= 5.0  # lengths that the weights do not say
    assert torch.equal(part_cosines(head, x)[1:], cosines[1:])
    torch.testing.assert_close(part_cosines(head, x), cosines)


def test_the_margin_is_of_the_whole_distance():
    head, (x, targets) = fitted(margin=0.3), data()
    criterion = TargetMargin(nn.CrossEntropyLoss(), head)
    logits = literal_logits(head, x) - head.scale.abs() * 0.3 * F.one_hot(targets, C)
    torch.testing.assert_close(criterion(head(x), targets), F.cross_entropy(logits, targets), rtol=1e-6, atol=1e-6)
    head.eval()
    torch.testing.assert_close(criterion(head(x), targets), F.cross_entropy(literal_logits(head, x), targets))


def test_frames_go_from_head_to_head_of_the_same_parts():
    source, (x, _) = fitted(), data()
    other = FAIMHead(D, 3, parts=PARTS, part_weights=[1, 1, 1], rank=8, prior=True, dtype=torch.float64)
    mu = other.mu.clone()
    assert other.take_frame(source.state_dict())
    assert torch.equal(other.embed(x), source.embed(x)) and torch.equal(other.mu, mu) and other.scale == 16.0


@pytest.mark.parametrize("other", [
    lambda: product(parts=[6, 4, 10]), lambda: product(parts=[6, 14], part_weights=[]), lambda: product(rank=3),
    lambda: FAIMHead(D, C, dtype=torch.float64), lambda: FAIMHead(6, C, dtype=torch.float64),
    lambda: FAIMHead(D, C, space="sphere", dtype=torch.float64),
], ids=["other widths", "fewer parts", "other rank", "one part", "the first part alone", "sphere"])  # fmt: skip
def test_frames_of_other_parts_are_not_taken(other):
    head, source = other(), fitted()
    for a, b in ((head, source), (source, head)):
        before = {name: value.clone() for name, value in a.state_dict().items()}
        assert not a.take_frame(b.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in a.state_dict().items())


def test_state_dict_and_copies_carry_everything():
    head, (x, _) = fitted(torch.float32, prior=True), data()
    x, buffer = x.float(), io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    fresh = product(torch.float32, prior=True, part_weights=[1, 1, 1])
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(fresh(x), head(x)) and torch.equal(copy.deepcopy(head)(x), head(x))
    with pytest.raises(RuntimeError, match=r"frames\.0\.directions"):
        FAIMHead(D, C).load_state_dict(head.state_dict())
    with pytest.raises(RuntimeError, match=r"frames\.0\.directions"):
        head.load_state_dict(FAIMHead(D, C).state_dict())


def test_a_head_made_on_meta_starts_as_one_made_here():
    with torch.device("meta"):
        head = product(torch.float32, prior=True)
    assert all(p.is_meta for p in head.parameters())
    assert head(torch.empty(3, D, device="meta")).shape == (3, C)
    head.to_empty(device="cpu")
    for parameter in head.parameters():
        nn.init.constant_(parameter, float("nan"))
    head.reset_parameters()
    here = product(torch.float32, prior=True)
    for (name, value), wanted in zip(head.state_dict().items(), here.state_dict().values(), strict=True):
        assert value.isfinite().all() and (name in ("mu", "metric.beta") or torch.equal(value, wanted)), name
    torch.testing.assert_close(head.part_weights.detach(), torch.tensor(WEIGHTS))
    assert repr(head) == repr(here) and "parts=[6, 10, 4]" in repr(head) and "3 parts" in head.kind


def test_no_linear_layer_is_a_head_of_parts():
    with pytest.raises(ValueError, match=r"3 parts.*FoldedHead"):
        to_linear(fitted())


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"parts": [6, 10]}, ValueError, "parts=[6, 10] have 16 features together, and in_features is 20"),
    ({"parts": [6, 14, 0]}, ValueError, "a width in parts must be >= 1, got 0"),
    ({"parts": [6.0, 14]}, TypeError, "a width in parts must be a whole number >= 1, got 6.0"),
    ({"part_weights": [1.0, 1.0]}, ValueError, "one number >= 0 for each of the 3 parts and not all 0, got [1.0, 1.0]"),
    ({"part_weights": [0, 0, 0]}, ValueError, "not all 0, got [0.0, 0.0, 0.0]"),
    ({"part_weights": [1, -1, 1]}, ValueError, "a weight in part_weights must be a finite number >= 0, got -1"),
    ({"part_weights": [1, float("nan"), 1]}, ValueError, "finite number >= 0, got nan"),
    ({"part_weights": ["1", 1, 1]}, TypeError, "a weight in part_weights must be a finite number >= 0, got '1'"),
    ({"parts": [], "part_weights": [1, 1]}, ValueError, "for each of the 1 parts"),
    ({"rank": 0}, ValueError, "rank must be >= 1, got 0"),
    ({"rank": 2.5}, TypeError, "rank must be a whole number >= 1, got 2.5"),
    ({"space": "sphere"}, ValueError, "need space='indicatrix', lambda_init=0 and learn_metric=False, got "
                                      "space='sphere'"),
    ({"space": "flat"}, ValueError, "got space='flat'"),
    ({"lambda_init": 0.2}, ValueError, "lambda_init=0.2, learn_metric=False"),
    ({"learn_metric": True}, ValueError, "lambda_init=0, learn_metric=True"),
])  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        product(**options)


def test_the_losses_measure_between_points_of_the_product():
    head, (x, labels) = fitted(), data(20)
    distance = torch.cdist(head.embed(x), head.embed(x))
    eps = head.metric.eps
    mat = (distance.square() + eps).sqrt()
    distance = pytest.importorskip("timm_faim.losses.distance", exc_type=ImportError)
    torch.testing.assert_close(distance.FAIMDistance(head)(x), mat, rtol=1e-6, atol=1e-6)
    same = labels[:, None] == labels
    other = ~torch.eye(20, dtype=torch.bool)
    hardest = mat.where(same & other, -1.0).amax(1) - mat.where(~same, 9.0).amin(1)
    wanted = (hardest + 0.2).clamp_min(0).mean()
    torch.testing.assert_close(FAIMTripletLoss(head, margin=0.2)(x, labels), wanted, rtol=1e-6, atol=1e-6)
    x = x.requires_grad_()
    FAIMInfoNCELoss(head)(x, labels).backward()
    assert x.grad.isfinite().all() and all(part.any() for part in x.grad.split(PARTS, 1))
