"""FAIMHead: the founding contract, its options, and every way PyTorch carries a module around."""

import copy
import io
import math
import re
import warnings

import pytest
import timm
import torch
from cases import SIGMAS, flat
from children import in_group
from seeds import FoundingHead
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from timm_faim import PRESETS, FAIMHead, FAIMMetric, FoldedHead, TargetMargin, agreement, faim_heads, fit_, to_linear
from timm_faim.metric.cosine import cosine_logits, plain_cosine_logits

B, C, D = 6, 5, 16


def head_away_from_init(**options):
    head = FAIMHead(D, C, **options)
    frozen = (head.metric.log_sigma_diag, head.metric.lmbda) if not head.is_flat else ()
    with torch.no_grad():
        for parameter in head.parameters():
            if not any(parameter is p for p in frozen):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return head


# One head of each path, the default first.
ALL_HEADS = [
    pytest.param({}, id="default"),
    pytest.param({"full_sigma": False}, id="diagonal"),
    pytest.param({"space": "sphere"}, id="sphere"),
    pytest.param({"learn_metric": True, "lambda_init": 0.3}, id="1-form"),
    pytest.param({"learn_metric": True, "lambda_init": 0.3, "symmetric": False}, id="randers"),
    pytest.param({"space": "sphere", "lambda_init": 0.3}, id="sphere with 1-form"),
    *(pytest.param(PRESETS["flat"] | {"full_sigma": full, "symmetric": symmetric},
                   id=f"flat{' full' * full}{' randers' * (not symmetric)}")
      for full in (False, True) for symmetric in (True, False)),
]  # fmt: skip


@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("wide", [8, 96])
def test_founding_state_dict_loads_strictly_and_gives_its_logits(full, wide):
    founding = FoundingHead(wide, 11, full_sigma=full).double()
    with torch.no_grad():
        for name in ("L", "log_sigma_diag"):
            if hasattr(founding, name):
                getattr(founding, name).add_(0.1 * torch.randn_like(getattr(founding, name)))
    head = flat(wide, 11, full_sigma=full, dtype=torch.float64)
    head.load_state_dict(founding.state_dict(), strict=True)
    x = torch.randn(7, wide, dtype=torch.float64)
    expected = founding(x)
    assert ((head(x) - expected).abs() / expected.abs()).max() <= 1e-9


def test_founding_initialisation():
    torch.manual_seed(3)
    head = FAIMHead(768, 300, **PRESETS["founding"])
    assert head.mu.std().item() == pytest.approx(1, abs=0.02)
    assert head.metric.beta.std().item() == pytest.approx(1, abs=0.1)
    assert head.metric.log_sigma_diag.abs().max() == 0
    assert head.scale.item() == 10 and head.metric.lmbda.item() == pytest.approx(0.1)


@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("width", [16, 256, 2048])
def test_initial_distance(width, full, preset):
    head = FAIMHead(width, 100, **PRESETS[preset] | {"full_sigma": full})
    x = torch.randn(64, width) * (1.0 if head.is_flat else 37.0)
    distance = -head(x).mean().item() / head.scale_init
    # E sqrt(q) < sqrt(E q) at small D
    assert distance == pytest.approx(head.initial_distance(), rel=0.8 / width + 0.03 + 0.05 * (preset == "founding"))


@pytest.mark.parametrize("options", ALL_HEADS)
def test_logits_are_minus_gamma_distance_plus_prior(options):
    head = head_away_from_init(prior=True, **options)
    x = torch.randn(B, D)
    z = x if head.whiten is None else (x - head.center) @ (head.whiten if head.full_sigma else torch.diag(head.whiten))
    points, prototypes = (z, head.mu) if head.is_flat else (
        v / head.metric.norm(v).unsqueeze(-1) for v in (z, head.mu))  # fmt: skip
    expected = -head.scale * head.metric.reference(points, prototypes) + head.prior
    assert torch.allclose(head(x), expected, atol=1e-3)


def test_gamma_cannot_act_negatively():
    head = head_away_from_init()
    x = torch.randn(B, D)
    expected = head(x)
    with torch.no_grad():
        head.scale.neg_()
    assert torch.equal(head(x), expected)
    assert (head(x) < 0).all()


def test_input_layouts():
    head = head_away_from_init()
    x = torch.randn(B, D)
    flat = head(x)
    assert flat.shape == (B, C)
    assert torch.allclose(head(x.reshape(2, 3, D)).reshape(B, C), flat, atol=1e-5)
    assert torch.allclose(head(x[:, :, None, None]), flat[:, :, None, None], atol=1e-5)
    image = torch.randn(B, D, 3, 2)
    assert torch.allclose(head(image)[:, :, 2, 1], head(image[:, :, 2, 1]), atol=1e-5)
    with pytest.raises(ValueError, match=rf"{D}\].*7"):
        head(torch.randn(B, 7))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", ALL_HEADS)
@pytest.mark.parametrize("prior", [False, True])
def test_script_export_deepcopy_and_state_dict(options, prior):
    options = options | {"prior": prior}
    head = head_away_from_init(**options)
    x = torch.randn(B, D)
    expected = head(x)
    assert torch.allclose(torch.jit.script(head)(x), expected, atol=1e-5)
    dynamic = {"x": {0: torch.export.Dim("batch", max=4096)}}
    exported = torch.export.export(head, (x,), dynamic_shapes=dynamic).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)
    assert exported(x[:3]).shape == (3, C)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    fresh = FAIMHead(D, C, **options)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize("options", ALL_HEADS)
def test_compile_fullgraph_forward_and_backward(options):
    head = head_away_from_init(**options)
    compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")
    x = torch.randn(B, D)
    target = torch.randint(C, (B,))
    for h in (head, compiled):
        F.cross_entropy(h(x), target).backward()
    assert torch.allclose(compiled(x), head(x), atol=1e-5)
    for (name, want), got in zip(head.named_parameters(), compiled.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None), name
        assert got.grad is None or torch.allclose(got.grad, want.grad, atol=1e-5), name


def test_half_precision_models_and_autocast():
    head = head_away_from_init()
    x = torch.randn(B, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x.bfloat16())
    assert out.dtype is torch.float32
    assert torch.allclose(out, head(x.bfloat16().float()), atol=1e-5)
    assert head.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_meta_device_and_dtype():
    head = FAIMHead(D, C, full_sigma=True, prior=True, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype is torch.float16 for p in head.parameters())
    assert head(torch.empty(B, D, device="meta", dtype=torch.float16)).shape == (B, C)


def test_fixed_scale_and_zero_lambda():
    head = FAIMHead(D, C, learn_scale=False, learn_metric=True)
    F.cross_entropy(head(torch.randn(B, D)), torch.randint(C, (B,))).backward()
    assert head.scale.grad is None and not head.scale.requires_grad
    assert head.metric.lmbda.grad.abs().item() > 0  # λ can leave 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_classes=-1), "num_classes.*-1"),
        (dict(num_classes=0), "num_classes.*0"),
        (dict(lambda_init=-0.5), "lambda_init.*-0.5"),
        (dict(lambda_init=math.nan), "lambda_init.*nan"),
        (dict(scale_init=0.0), "scale_init.*0.0"),
        (dict(scale_init=-3.0), "scale_init.*-3.0"),
        (dict(margin=-0.1), "margin.*-0.1"),
        (dict(init="data"), "init.*fit_"),
        (dict(space="cube"), "space must be one of.*'cube'"),
        (dict(init="seed"), "init='seed' is the founding start of a flat head"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FAIMHead(**{"in_features": D, "num_classes": C, **arguments})


@pytest.mark.parametrize("name", ["in_features", "num_classes", "lambda_init", "scale_init", "margin", "eps"])
@pytest.mark.parametrize("value", ["3", None, True, [4]])
def test_what_is_no_number_is_named(name, value):
    with pytest.raises(TypeError, match=rf"{name}.*got {re.escape(repr(value))}"):
        FAIMHead(**{"in_features": D, "num_classes": C, name: value})


def learning(model):
    return [p for p in model.parameters() if p.requires_grad]


class TwoHeads(nn.Module):
    """Two heads averaged in eval mode and returned as a pair in distilled training, as in DeiT."""

    def __init__(self, **options):
        super().__init__()
        self.a, self.b = FAIMHead(D, C, **options), FAIMHead(D, C, scale_init=4.0, **options)
        self.distilled = False

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return (a, b) if self.distilled else (a + b) / 2


@pytest.mark.parametrize("soft", [False, True])
def test_margin_at_the_criterion_is_a_distance_at_the_target(soft):
    model = TwoHeads(margin=0.3)
    x, hard = torch.randn(B, D), torch.randint(C, (B,))
    target = F.one_hot(hard, C).float().mul(0.9).add(0.1 / C) if soft else hard
    criterion = TargetMargin(nn.CrossEntropyLoss(), model)
    weights = target if soft else F.one_hot(hard, C)
    inside = nn.CrossEntropyLoss()(
        sum(head(x) - head.gamma() * 0.3 * weights for head in (model.a, model.b)) / 2, target)  # fmt: skip
    at_criterion = criterion(model(x), target)
    assert torch.allclose(inside, at_criterion, atol=1e-5)
    wanted, got = (torch.autograd.grad(loss, learning(model)) for loss in (inside, at_criterion))
    assert all(torch.allclose(w, g, atol=1e-5) for w, g in zip(wanted, got, strict=True))


def test_margin_widens_the_target_distance_only_in_training():
    model = TwoHeads(margin=0.3)
    model.distilled = True
    x, target = torch.randn(B, D), torch.randint(C, (B,))
    seen = []
    criterion = TargetMargin(lambda output, _: seen.append(output), model)
    criterion(model(x), target)
    plain = model(x)
    for got, want, gamma in zip(seen[0], plain, (16.0, 4.0), strict=True):
        expected = want - gamma * 0.3 * F.one_hot(target, C)
        assert torch.allclose(got, expected, atol=1e-5)
    model.eval()
    criterion(model(x), target)
    assert torch.equal(seen[1][0], plain[0])


def test_margin_in_timms_training_task():
    timm_task = pytest.importorskip("timm.task")
    model = nn.Sequential(FAIMHead(D, C, margin=0.5))
    x, target = torch.randn(B, D), torch.randint(C, (B,))
    criterion = TargetMargin(nn.CrossEntropyLoss(), model)
    task = timm_task.ClassificationTask(model, criterion=criterion, verbose=False)
    loss = task(x, target)["loss"]
    assert torch.allclose(loss, criterion(model(x), target), atol=1e-5)
    assert loss > nn.functional.cross_entropy(model(x), target)


def test_faim_heads_finds_them_through_wrappers():
    model = nn.Sequential(nn.Linear(3, D), FAIMHead(D, C))
    assert list(faim_heads(model)) == ["1"]
    assert faim_heads(nn.Linear(2, 2)) == {}


def test_margin_where_outputs_are_not_one_a_head():
    """Distilled training of a model with several heads a branch: each output gets the mean margin."""
    model = TwoHeads(margin=0.3)
    seen = []
    criterion = TargetMargin(lambda output, _: seen.append(output), model)
    logits = tuple(torch.randn(B, C) for _ in range(3))
    target = torch.randint(C, (B,))
    criterion(logits, target)
    for got, want in zip(seen[0], logits, strict=True):
        assert torch.allclose(got, want - 10.0 * 0.3 * F.one_hot(target, C), atol=1e-5)


def test_margin_leaves_ignored_targets_alone():
    head = FAIMHead(D, C, margin=0.3)
    x, target = torch.randn(B, D), torch.randint(C, (B,))
    target[0] = -100
    loss = TargetMargin(nn.CrossEntropyLoss(ignore_index=-100), head)(head(x), target)
    expected = head(x[1:]) - head.gamma() * 0.3 * F.one_hot(target[1:], C)
    assert torch.allclose(loss, nn.CrossEntropyLoss()(expected, target[1:]), atol=1e-5)


def test_an_all_zero_feature_has_a_bounded_gradient():
    head = FAIMHead(D, C)
    x = torch.zeros(1, D, requires_grad=True)
    head(x).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.norm() < 1e6


def _ddp_step(state, x, target, path):
    model = TwoHeads(margin=0.3)
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model)
    share = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
    TargetMargin(nn.CrossEntropyLoss(), parallel)(parallel(x[share]), target[share]).backward()
    if torch.distributed.get_rank() == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, path)


def test_margin_under_ddp_equals_one_process(tmp_path):
    """γ is used inside DDP's forward and again at the criterion: its gradient must still be the average of both."""
    model = TwoHeads(margin=0.3)
    x, target = torch.randn(B, D), torch.randint(C, (B,))
    TargetMargin(nn.CrossEntropyLoss(), model)(model(x), target).backward()
    in_group(_ddp_step, model.state_dict(), x, target, tmp_path / "grads.pt")
    grads = torch.load(tmp_path / "grads.pt")
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.allclose(grads[name], parameter.grad, atol=1e-5), name


def test_margin_under_compile():
    model = TwoHeads(margin=0.3)
    x, target = torch.randn(B, D), torch.randint(C, (B,))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [TargetMargin(nn.CrossEntropyLoss(), m)(m(x), target) for m in (model, compiled)]
    wanted, got = (torch.autograd.grad(loss, learning(model)) for loss in losses)
    assert losses[0] > nn.CrossEntropyLoss()(model(x), target)
    assert all(torch.allclose(w, g, atol=1e-4) for w, g in zip(wanted, got, strict=True))


def _indicatrix(D=6, C=4, **options):
    torch.manual_seed(0)
    head = FAIMHead(D, C, **{"lambda_init": 0.3, "learn_metric": True} | options).double()
    x = torch.randn(40, D, dtype=torch.float64) @ torch.randn(D, D, dtype=torch.float64) + 2.0
    return fit_(head, [(x, torch.arange(40) % C)]), x


def test_indicatrix_is_the_distance_between_points_of_norm_one():
    head, x = _indicatrix()
    assert torch.allclose(head.center, x.mean(0))
    embedded, prototypes = head.embed(x), head.project(head.mu)
    assert torch.allclose(head.metric.norm(embedded), torch.ones(40, dtype=x.dtype), atol=2e-3)  # ε smooths
    expected = -head.gamma() * head.metric.reference(embedded, prototypes)
    torch.testing.assert_close(head(x), expected, rtol=1e-9, atol=1e-9)
    # points along one ray from the centre are the same point
    torch.testing.assert_close(head(head.center + 5.0 * (x - head.center)), head(x), rtol=1e-4, atol=1e-4)


def test_indicatrix_gradients():
    head, x = _indicatrix()
    parameters = dict(head.named_parameters())

    def logits(*values):
        return torch.func.functional_call(head, dict(zip(parameters, values, strict=True)), (x[:3],))

    assert torch.autograd.gradcheck(logits, tuple(parameters.values()))


def test_indicatrix_saves_its_centre():
    head, x = _indicatrix()
    other = FAIMHead(6, 4, learn_metric=True).double()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x), head(x))


def test_metric_that_does_not_learn_keeps_its_values():
    head, x = _indicatrix(learn_metric=False)
    before = {name: p.clone() for name, p in head.metric.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.5)
    nn.functional.cross_entropy(head(x), torch.arange(40) % 4).backward()
    mu = head.mu.clone()
    optimizer.step()
    assert not torch.equal(head.mu, mu)
    assert all(torch.equal(p, before[name]) for name, p in head.metric.named_parameters())


def test_indicatrix_under_autocast_is_float32():
    head, x = _indicatrix()
    head, x = head.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x), head(x.float()))
        got = head(x)
    torch.testing.assert_close(got, head(x), rtol=1e-5, atol=1e-4)


def in_feature_space(head):
    """Prototypes [C, D] as differences from the centre."""
    return torch.linalg.solve(head.whiten, head.mu, left=False).detach()


def test_indicatrix_keeps_prototypes_of_classes_without_samples_and_its_accuracy_in_half_precision():
    head, x = _indicatrix()
    before = in_feature_space(head)
    fit_(head, [(x[:30] + 3.0, torch.arange(30) % 3)])
    after = in_feature_space(head)
    assert torch.allclose(after[3], before[3]) and not torch.allclose(after[0], before[0])
    far = fit_(head.float(), [(x.float() + 300.0, torch.arange(40) % 4)])
    points = far.project(far.mu)
    rounded = far.bfloat16()
    assert (rounded.project(rounded.mu).float() - points).abs().max() < 0.02


def test_project_of_a_point_is_the_point():
    head, x = _indicatrix()
    points = head.embed(x)
    assert torch.allclose(head.project(points), points, atol=2e-3)
    assert not torch.allclose(head.embed(points), points, atol=0.1)


@pytest.mark.parametrize("options", [dict(), dict(full_sigma=False), dict(space="sphere")])
@pytest.mark.parametrize("prior", [False, True])
def test_what_folds_gives_the_same_logits_and_the_same_order_of_classes(options, prior):
    torch.manual_seed(0)
    head = FAIMHead(6, 4, prior=prior, **options)
    x = torch.randn(400, 6) @ torch.randn(6, 6) + 2.0
    fit_(head, [(x, torch.arange(400) % 4)]).eval()
    if prior:
        nn.init.normal_(head.prior)
    torch.testing.assert_close(FoldedHead(head)(x), head(x), rtol=1e-4, atol=1e-4)
    linear = to_linear(head, x)
    if not prior:
        assert torch.equal(linear(x).argsort(-1), head(x).argsort(-1))
    assert agreement(head, linear, x)["kl"] < 0.3


@pytest.mark.parametrize("width", [6, 600])  # of one block, and of two
def test_the_folded_head_takes_maps_scripts_and_may_be_stored_in_half(width):
    torch.manual_seed(0)
    head = FAIMHead(width, 4).eval()
    with torch.no_grad():
        head.whiten.copy_(torch.randn(width, width))
        head.center.normal_()
        head.scale.fill_(40.0)
    folded, maps = FoldedHead(head), torch.randn(2, width, 3, 5) + 1.0
    torch.testing.assert_close(folded(maps), head(maps), rtol=1e-5, atol=1e-5)
    numbers = sum(tensor.numel() for tensor in [*folded.parameters(), *folded.buffers()] if tensor.dim() == 2)
    assert numbers <= (0.75 if width > 512 else 1.0) * width**2 + 4 * width
    half = FoldedHead(head).store_matrices(torch.float16)
    assert half(maps).dtype is torch.float32
    assert (half(maps) - head(maps)).abs().max() <= torch.finfo(torch.float16).eps * 40.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.script(folded)(maps), folded(maps))


def test_heads_with_a_1_form_do_not_fold():
    for head in (FAIMHead(D, C, lambda_init=0.1), flat(D, C)):
        with pytest.raises(ValueError, match="does not fold"):
            FoldedHead(head)


@pytest.mark.parametrize("length", [0.0, 1e-6, 5e-5, 1e-3])
def test_short_prototypes_have_the_same_gradients_eager_and_as_written(length):
    torch.manual_seed(3)
    head = FAIMHead(D, C, dtype=torch.float64)
    with torch.no_grad():
        head.mu.copy_(length * F.normalize(torch.randn(C, D, dtype=torch.float64), dim=1))
    x, target = torch.randn(B, D, dtype=torch.float64), torch.arange(B) % C
    plain = torch.compile(copy.deepcopy(head), fullgraph=True, backend="eager")
    for h in (head, plain):
        F.cross_entropy(h(x), target).backward()
    for name in ("mu", "scale"):
        want, got = (getattr(h, name).grad for h in (head, plain))
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("gamma", [16.0, 1e-3, 0.0])
def test_the_node_of_the_default_head_has_the_gradients_of_its_formula(gamma):
    z = F.normalize(torch.randn(B, D, dtype=torch.float64), dim=1)
    values = [z, torch.randn(C, D, dtype=torch.float64), torch.full((1,), gamma, dtype=torch.float64)]
    values[1][0] = z[0]  # a feature at its prototype
    G = torch.randn(B, C, dtype=torch.float64)
    found = []
    for function in (cosine_logits, plain_cosine_logits):
        inputs = [v.clone().requires_grad_() for v in values]
        out = function(*inputs, 1e-6)
        found.append((out, *torch.autograd.grad(out, inputs, G)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_of_the_default_head():
    head = FAIMHead(5, 3, dtype=torch.float64)

    def logits(x, mu, scale):
        return torch.func.functional_call(head, {"mu": mu, "scale": scale}, (x,))

    inputs = (torch.randn(2, 5, dtype=torch.float64, requires_grad=True), head.mu, head.scale)
    assert torch.autograd.gradgradcheck(logits, inputs)


def test_a_copied_criterion_keeps_to_the_heads_in_training():
    model = nn.Sequential(FAIMHead(D, C, margin=0.5))
    criterion = TargetMargin(nn.CrossEntropyLoss(), model)
    logits, target = torch.zeros(4, C), torch.arange(4) % C
    alone = copy.deepcopy(criterion)
    copied_model, together = copy.deepcopy((model, criterion))
    with torch.no_grad():
        model[0].scale.mul_(3.0)
    assert alone(logits, target) == criterion(logits, target) != together(logits, target)
    model.eval()
    assert alone(logits, target) == nn.functional.cross_entropy(logits, target) != together(logits, target)
    copied_model.eval()
    assert together(logits, target) == nn.functional.cross_entropy(logits, target)


@pytest.mark.parametrize("options", [PRESETS["flat"], dict(space="sphere"), dict()])
def test_another_width_is_named(options):
    head = FAIMHead(D, C, **options)
    for shape in ((B, D + 1), (B, 1), (B, D + 1, 3, 3), (2, 3, D + 1)):
        with pytest.raises(ValueError, match=rf"\[\.\.\., {D}\].*{D + 1 if D + 1 in shape else 1}"):
            head(torch.randn(shape))


@pytest.mark.parametrize("in_model", [True, False])
def test_an_optimiser_decays_no_part_of_a_head_in_a_model_or_alone(in_model):
    model = timm.create_model("faim_test_resnet", num_classes=C)
    head = model.get_classifier()
    optimizer = create_optimizer_v2(model if in_model else head, "sgd", lr=0.1, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    assert not decayed & {id(p) for p in head.parameters()}
    assert decayed or not in_model


def _before_the_frame(state, x, D, C, full, eps=1e-6):
    """Logits of a head on the indicatrix of which prototypes and Σ were in feature space, by its formula of then."""
    metric = FAIMMetric(D, full, eps=eps, dtype=torch.float64)
    metric.load_state_dict({name.removeprefix("metric."): t for name, t in state.items() if name.startswith("metric.")})
    points, prototypes = (v / metric.norm(v).unsqueeze(-1) for v in (x - state["center"], state["mu"]))
    return -state["scale"].abs() * metric.reference(points, prototypes)


@pytest.mark.parametrize("full", SIGMAS)
@pytest.mark.parametrize("lmbda", [0.0, 0.4])
def test_a_checkpoint_from_before_the_frame_keeps_its_logits_and_gradients(full, lmbda):
    torch.manual_seed(1)
    D, C, kwargs = 6, 4, dict(dtype=torch.float64)
    state = {"mu": torch.randn(C, D, **kwargs), "scale": torch.full((1,), 7.0, **kwargs),
             "center": torch.randn(D, **kwargs), "metric.beta": torch.randn(D, **kwargs),
             "metric.lmbda": torch.full((1,), lmbda, **kwargs)}  # fmt: skip
    if full:
        state["metric.L"] = torch.randn(D, D, **kwargs) + 2.0 * torch.eye(D, **kwargs)
    else:
        state["metric.log_sigma_diag"] = torch.randn(D, **kwargs)
    x, target = torch.randn(8, D, requires_grad=True, **kwargs), torch.arange(8) % C
    wanted = _before_the_frame(state, x, D, C, full)
    (wanted_grad,) = torch.autograd.grad(F.cross_entropy(wanted, target), x)
    for learn in (True, False):
        head = FAIMHead(D, C, lambda_init=lmbda, full_sigma=full, learn_metric=learn, **kwargs)
        head.load_state_dict(state)
        assert head.cosine == (not learn and lmbda == 0)
        # F(v) is smoothed, a length is not: ε / |v|² apart
        bound = dict(rtol=1e-5, atol=1e-5) if head.cosine else dict(rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(head(x), wanted, **bound)
        (grad,) = torch.autograd.grad(F.cross_entropy(head(x), target), x)
        torch.testing.assert_close(grad, wanted_grad, **bound)


def test_the_default_head_under_every_transform():
    """Scripted, exported, compiled, traced under vmap, jvp and per-sample gradients: all the same numbers."""
    head = fit_(FAIMHead(D, C), [(torch.randn(60, D) @ torch.randn(D, D) + 3.0, torch.arange(60) % C)])
    x, target = 3.0 + torch.randn(B, D), torch.arange(B) % C
    expected = head(x)
    close = dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(head)(x), expected, **close)
    for strict in (False, True):
        torch.testing.assert_close(torch.export.export(head, (x,), strict=strict).module()(x), expected, **close)
    torch.testing.assert_close(torch.compile(copy.deepcopy(head), fullgraph=True, backend="aot_eager")(x), expected,
                               **close)  # fmt: skip
    torch.testing.assert_close(torch.func.vmap(head)(x), expected, **close)
    _, moved = torch.func.jvp(head, (x,), (torch.ones_like(x),))
    step = (head.double()(x.double() + 1e-6) - head(x.double() - 1e-6)) / 2e-6
    torch.testing.assert_close(moved.double(), step, rtol=1e-3, atol=1e-3)
    head.float()
    parameters = {"mu": head.mu.detach(), "scale": head.scale.detach()}

    def loss(values, x_D, label):
        return F.cross_entropy(torch.func.functional_call(head, values, (x_D[None],)), label[None])

    single = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    F.cross_entropy(head(x), target, reduction="sum").backward()
    torch.testing.assert_close(single["mu"].sum(0), head.mu.grad, **close)


def test_the_default_head_moves_no_frame_and_computes_no_gradient_for_it():
    head = fit_(FAIMHead(D, C), [(torch.randn(60, D) + 3.0, torch.arange(60) % C)])
    F.cross_entropy(head(torch.randn(B, D)), torch.arange(B) % C).backward()
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {"mu", "scale"}


def test_a_head_without_a_one_form_refuses_the_state_of_one_that_has_it():
    state = FAIMHead(D, C, lambda_init=0.3).state_dict()
    with pytest.raises(RuntimeError, match=r"lmbda is 0\.3.*lambda_init"):
        FAIMHead(D, C).load_state_dict(state)


def test_sigma_is_that_of_the_features():
    x, targets = torch.randn(200, D) @ torch.randn(D, D), torch.arange(200) % C
    sigmas = [fit_(make(D, C, full_sigma=True), [(x, targets)]).sigma().detach() for make in (flat, FAIMHead)]
    one, other = (sigma / sigma.diagonal().mean() for sigma in sigmas)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
