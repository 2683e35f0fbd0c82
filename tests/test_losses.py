"""The losses: each against its formula in plain loops, block by block, in degenerate batches, with bad input."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from cases import FORMS, flat, random_metric
from loss_formulas import LOSSES, MATRIX_LOSSES, TEMPERATURE, build, mined, oracle, relative_error
from test_metric import LargestAllocation
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from timm_faim import (
    PRESETS,
    FAIMHead,
    FAIMInfoNCELoss,
    FAIMMarginLoss,
    FAIMMetric,
    FAIMNPairLoss,
    FAIMTripletLoss,
    fit_,
)
from timm_faim.head import SPACES
from timm_faim.losses import base, pairs

D = 5
LABELS = torch.tensor([0, 2, 0, 1, 0, 1, 2, 3, 2, 2])  # 3 has no partner
REF_LABELS = torch.tensor([1, 4, 0, 0, 2, 1, 2])  # nothing of class 3, and a 4 that no query has

each_loss = pytest.mark.parametrize("name", LOSSES)
each_form = pytest.mark.parametrize(("full", "symmetric"), FORMS)


def make_blocks(monkeypatch, entries):
    """Blocks of so many entries."""
    monkeypatch.setattr(pairs, "BLOCK", entries)


def arguments(setup, seed, dtype=torch.float64):
    """(embeddings, keywords) of a call: own or other references, and those of a miner."""
    torch.manual_seed(seed)
    labels = LABELS[torch.randperm(len(LABELS))]
    x = torch.randn(len(labels), D, dtype=dtype, requires_grad=True)
    is_own = "ref" not in setup
    given = {"labels": labels}
    if not is_own:
        given |= {"ref_emb": torch.randn(len(REF_LABELS), D, dtype=dtype, requires_grad=True), "ref_labels": REF_LABELS}
    if "pairs" in setup or "triplets" in setup:
        given["indices_tuple"] = mined(labels, labels if is_own else REF_LABELS, is_own, "triplets" in setup, seed)
    return x, given


SETUPS = ["own", "ref", "own pairs", "ref triplets", "own triplets"]
CALLS = [
    pytest.param(name, setup, id=f"{name}-{setup}")
    for name in LOSSES
    for setup in SETUPS
    if name != "npair" or " " not in setup
]  # that one takes no indices_tuple
PATHS = [
    pytest.param(name, blocks, id=f"{name}-{'blocks' if blocks else 'whole'}")
    for name in LOSSES
    for blocks in (False, True)
    if name != "npair" or not blocks
]


def all_gradients(loss, value, x, given):
    inputs = [x, *([given["ref_emb"]] if "ref_emb" in given else []), *loss.metric.parameters()]
    return torch.autograd.grad(value, inputs, materialize_grads=True)


@pytest.mark.parametrize(("name", "setup"), CALLS)
@each_form
def test_value_and_gradients_are_those_of_the_formula(name, full, symmetric, setup):
    for seed, normalize in ((0, False), (1, True), (2, False)):
        x, given = arguments(setup, seed)
        metric = random_metric(D, full, symmetric)
        loss = build(name, metric, normalize=normalize)
        value = loss(x, **given)
        renamed = {"ref_emb": "ref", "indices_tuple": "indices"}
        expected = oracle(name, metric, x, normalize=normalize, **{renamed.get(k, k): v for k, v in given.items()})
        assert expected > 0  # the case says something
        assert relative_error(value, expected) <= 1e-9
        for got, want in zip(*(all_gradients(loss, v, x, given) for v in (value, expected)), strict=True):
            assert relative_error(got, want) <= 1e-8


@pytest.mark.parametrize("name", MATRIX_LOSSES)
@each_form
@pytest.mark.parametrize("setup", ["own", "ref", "ref pairs"])
def test_blocks_of_rows_equal_the_whole(name, full, symmetric, setup, monkeypatch):
    metric = random_metric(D, full, symmetric)
    loss = build(name, metric, normalize=setup == "own")
    x, given = arguments(setup, seed=3)
    whole = loss(x, **given)
    wanted = all_gradients(loss, 3 * whole, x, given)
    calls = []
    monkeypatch.setattr(base, "blockwise_sum", lambda *args: calls.append(args) or pairs.blockwise_sum(*args))
    for rows in (1, 3):
        make_blocks(monkeypatch, rows * len(given.get("ref_emb", x)))
        blocks = loss(x, **given)
        assert relative_error(blocks, whole) <= 1e-13
        for want, got in zip(wanted, all_gradients(loss, 3 * blocks, x, given), strict=True):
            assert relative_error(got, want) <= 1e-12
    assert len(calls) == 2


@pytest.mark.parametrize("name", MATRIX_LOSSES)
@pytest.mark.parametrize("frozen", ["x", "metric", "beta", "both"])
def test_blocks_leave_out_what_needs_no_gradient(name, frozen, monkeypatch):
    metric = random_metric(D, full_sigma=False)
    loss = build(name, metric)
    x, given = arguments("own", seed=1)
    with torch.no_grad():
        expected = loss(x, **given)
    wanted = dict(
        zip(("x", *dict(metric.named_parameters())), all_gradients(loss, loss(x, **given), x, given), strict=True)
    )
    x.requires_grad_(frozen not in ("x", "both"))
    for key, parameter in metric.named_parameters():
        parameter.requires_grad_(not (frozen in ("metric", "both") or key == frozen))
    make_blocks(monkeypatch, 2 * len(x))
    value = loss(x, **given)
    assert relative_error(value, expected) <= 1e-13
    inputs = {"x": x} | dict(metric.named_parameters())
    if frozen == "both":
        assert not value.requires_grad
        return
    value.backward()
    for key, tensor in inputs.items():
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or relative_error(tensor.grad, wanted[key]) <= 1e-12


@pytest.mark.parametrize("name", MATRIX_LOSSES)
def test_blocks_compute_no_gradient_where_none_is_wanted(name, monkeypatch):
    loss = build(name, random_metric(D, full_sigma=True))
    x, given = arguments("own", seed=1)
    expected = loss(x, **given)
    make_blocks(monkeypatch, 2 * len(x))
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        assert relative_error(loss(x, **given), expected.detach()) <= 1e-13


@pytest.mark.parametrize("name", [n for n in MATRIX_LOSSES if n != "all-soft"])  # that one has a row for each pair
@pytest.mark.parametrize("full", [False, True])
def test_blocks_never_make_or_keep_anything_of_size_b_times_n(name, full, monkeypatch):
    B, rows = 96, 4
    metric = random_metric(D, full)
    loss = build(name, metric)
    x, labels = torch.randn(B, D, dtype=torch.float64, requires_grad=True), torch.arange(B) % 12
    with LargestAllocation() as whole:
        loss(x, labels).backward()
    make_blocks(monkeypatch, rows * B)
    with LargestAllocation() as blocks:
        value = loss(x, labels)
        value.backward()
    assert whole.numel >= B * B  # the counter does see it
    assert blocks.numel <= max(rows * (B + 1), B * D, D * D)
    fresh = loss(x, labels)  # held: its graph must live
    nodes, kept = [fresh.grad_fn], 0
    while nodes:
        node = nodes.pop()
        kept += sum(t.numel() for t in getattr(node, "saved_tensors", ()) if t is not None)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert 2 * B * D <= kept <= 4 * B * D  # the gradients of both sides


def test_blocks_differentiate_once(monkeypatch):
    loss = build("ntxent", random_metric(D, full_sigma=False))
    x, given = arguments("own", seed=0)
    make_blocks(monkeypatch, 2 * len(x))
    with pytest.raises(RuntimeError, match=f"differentiated once.*create_graph.*at most {2 * len(x)} pairs"):
        torch.autograd.grad(loss(x, **given), x, create_graph=True)
    make_blocks(monkeypatch, 2**22)
    (gradient,) = torch.autograd.grad(loss(x, **given), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.any()


@pytest.mark.parametrize(("name", "blocks"), PATHS)
@pytest.mark.parametrize(("full", "symmetric"), [(False, True), (True, False)], ids=["diagonal", "full-randers"])
def test_gradcheck(name, full, symmetric, blocks, monkeypatch):
    labels = torch.tensor([0, 1, 0, 1, 0, 2])
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    loss = build(name, random_metric(3, full, symmetric))
    loss.shared = loss.metric  # registered, so that functional_call finds its parameters
    names = [key for key, _ in loss.named_parameters()]
    if blocks:
        make_blocks(monkeypatch, 12)

    def value(x, *parameters):
        return functional_call(loss, dict(zip(names, parameters, strict=True)), (x, labels))

    assert torch.autograd.gradcheck(value, (x, *loss.parameters()))


DEGENERATE = {
    "all equal": (lambda x: torch.ones_like(x), LABELS),
    "all zero": (lambda x: torch.zeros_like(x), LABELS),
    "one class": (lambda x: x, torch.zeros_like(LABELS)),
    "no positives": (lambda x: x, torch.arange(len(LABELS))),
    "a single row": (lambda x: x[:1], LABELS[:1]),
    "large": (lambda x: 1e4 * x, LABELS),
    "far from the origin": (lambda x: x + 1e3, LABELS),
}


@pytest.mark.parametrize(("name", "blocks"), PATHS)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_have_finite_values_and_gradients(name, case, blocks, monkeypatch):
    make, labels = DEGENERATE[case]
    x = make(torch.randn(len(LABELS), D)).requires_grad_()
    if blocks:
        make_blocks(monkeypatch, 1)
    for full, symmetric in ((False, True), (True, False)):
        for normalize in (False, True):
            metric = random_metric(D, full, symmetric, dtype=torch.float32)
            value = build(name, metric, normalize=normalize)(x, labels)
            value.backward()
            gradients = [x.grad, *(p.grad for p in metric.parameters())]
            assert all(torch.isfinite(t).all() for t in (value, *gradients))
            if case in ("no positives", "a single row") or (case == "one class" and name != "supcon"):
                assert value == 0 and not any(g.any() for g in gradients)
            elif case in ("all equal", "all zero"):
                assert value > 0
            x.grad = None


@each_loss
def test_an_all_zero_embedding_has_a_bounded_gradient(name):
    x = torch.randn(len(LABELS), D).index_fill_(0, torch.tensor([0]), 0).requires_grad_()
    build(name, random_metric(D, False, dtype=torch.float32), normalize=True)(x, LABELS).backward()
    assert x.grad[0].any() and x.grad.norm() < 1e6


@pytest.mark.parametrize("name", MATRIX_LOSSES)
def test_anchors_without_negatives(name):
    """Pairs of a miner without any negative: nothing to push away, and ntxent and the triplets are 0."""
    x = torch.randn(4, D, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    metric = random_metric(D, False, dtype=torch.float32)
    value = build(name, metric)(x, None, (torch.tensor([0, 0, 2]), torch.tensor([1, 2, 3]), none, none))
    value.backward()
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(p.grad).all() for p in metric.parameters())
    s = -metric.reference(x, x)[0] / TEMPERATURE
    supcon = (torch.logsumexp(s[1:3], 0) - s[1:3].mean()) / 2  # anchor 2 has one positive and nothing else: 0
    assert value.item() == pytest.approx(supcon.item() if name == "supcon" else 0, abs=1e-6)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_lose_only_their_own_rounding(name, dtype):
    metric = random_metric(D, full_sigma=True, dtype=torch.float32)
    loss = build(name, metric, normalize=True)
    x, given = arguments("own", 0, dtype)
    wide = x.detach().float().requires_grad_()
    expected = loss(wide, **given)
    plain = loss(x, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = loss(x, **given)
    want = all_gradients(loss, expected, wide, given)
    for value in (plain, autocast):
        assert value.dtype is torch.float32
        assert relative_error(value, expected.double()) <= 1e-6
        got = all_gradients(loss, value, x, given)
        assert got[0].dtype is dtype
        assert relative_error(got[0], want[0].double()) <= torch.finfo(dtype).eps
        assert all(relative_error(g, w.double()) <= 1e-5 for g, w in zip(got[1:], want[1:], strict=True))


def test_the_temperature_is_not_rounded_to_the_dtype_of_the_metric():
    metric = random_metric(D, full_sigma=False, dtype=torch.bfloat16)
    wide = copy.deepcopy(metric).float()
    x, given = arguments("own", 0, torch.float32)
    values = [FAIMInfoNCELoss(m, temperature=0.07)(x, **given) for m in (metric, wide)]
    assert relative_error(values[0], values[1].double()) <= 1e-6


@pytest.mark.parametrize("name", ["ntxent", "supcon", "batch-hard", "semi-hard", "all", "npair"])
def test_compile(name):
    x, given = arguments("own", 0, torch.float32)
    loss = build(name, random_metric(D, full_sigma=True, dtype=torch.float32), normalize=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=name != "npair")  # whose pairs vary in number
    values = loss(x, **given), compiled(x, **given)
    assert relative_error(values[1], values[0].double()) <= 1e-5
    for want, got in zip(*(all_gradients(loss, v, x, given) for v in values), strict=True):
        assert relative_error(got, want.double()) <= 1e-4


@each_loss
def test_a_shared_metric_belongs_to_the_head(name):
    head = flat(D, 4)
    loss = build(name, head.metric)
    assert not list(loss.parameters()) and not loss.state_dict() and not list(loss.children())
    x, given = arguments("own", 0, torch.float32)
    loss(x, **given).backward()
    assert all(p.grad.any() for p in head.metric.parameters())
    both = nn.ModuleDict({"head": head, "loss": loss})
    for copied in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert copied["loss"].metric is copied["head"].metric is not head.metric
        with torch.no_grad():
            copied["head"].metric.lmbda.add_(1)
        assert copied["loss"](x, **given) != loss(x, **given)
    both.double()
    assert loss.metric.beta.dtype is torch.float64


@each_loss
def test_an_owned_metric_travels_with_the_loss(name):
    x, given = arguments("own", 0, torch.float32)
    loss = build(name, in_features=D)
    with torch.no_grad():
        loss.metric.lmbda.add_(1)
    expected = loss(x, **given)
    assert set(loss.parameters()) == set(loss.metric.parameters()) != set()
    fresh = build(name, in_features=D)
    assert fresh(x, **given) != expected
    fresh.load_state_dict(loss.state_dict())
    for other in (fresh, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(x, **given), expected)
        assert other.metric is other.owned_metric is not loss.metric
    assert loss.double().metric.beta.dtype is torch.float64


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [16, 512])
def test_an_owned_metric_starts_at_distance_one(width, normalize):
    metric = FAIMInfoNCELoss(in_features=width, normalize=normalize).metric
    x, y = torch.randn(64, width), torch.randn(64, width)
    x, y = (F.normalize(x, dim=1), F.normalize(y, dim=1)) if normalize else (x, y)
    assert metric(x, y).mean().item() == pytest.approx(1, abs=0.8 / width + 0.03)  # E sqrt(q) < sqrt(E q) at small D


@each_loss
def test_a_reducer_gets_one_loss_an_anchor(name):
    """The mean of each anchor; the mean over anchors is checked through a batch that is one anchor each."""
    seen = {}

    def reducer(losses, embeddings, labels):
        seen.update(losses["loss"], embeddings=embeddings, labels=labels)
        return losses["loss"]["losses"].sum()

    metric = random_metric(D, full_sigma=True)
    x, given = arguments("ref", 0)
    labels = given.pop("labels")
    assert build(name, metric, reducer=reducer)(x, labels, **given) == seen["losses"].sum()
    assert seen["reduction_type"] == "element" and seen["losses"].dim() == 1
    assert torch.equal(seen["indices"], torch.arange(len(seen["losses"])))
    assert len(seen["embeddings"]) == len(seen["labels"]) == len(seen["losses"])
    if name == "npair":
        assert torch.equal(seen["labels"], labels.unique()[:3])
        assert relative_error(seen["losses"].mean(), build(name, metric)(x, labels, **given)) <= 1e-12
        return
    alone = [build(name, metric)(x[i : i + 1], labels[i : i + 1], **given) for i in range(len(x))]
    assert relative_error(seen["losses"], torch.stack(alone)) <= 1e-9


def test_a_reducer_without_any_pair():
    loss = FAIMNPairLoss(in_features=D, reducer=lambda losses, *_: losses["loss"]["losses"].mean())
    x = torch.randn(3, D, requires_grad=True)
    value = loss(x, torch.arange(3))
    value.backward()
    assert value == 0 and not x.grad.any()


def test_the_first_argument_of_a_randers_distance_is_the_query():
    metric = random_metric(D, full_sigma=False, symmetric=False)
    x, y = torch.randn(1, D, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    value = FAIMInfoNCELoss(metric, temperature=1.0)(x, torch.tensor([1]), None, y, torch.tensor([1, 0, 0]))
    d = torch.stack([metric.norm(x[0] - point) for point in y])
    back = torch.stack([metric.norm(point - x[0]) for point in y])
    assert relative_error(value, F.cross_entropy(-d, torch.tensor(0))) <= 1e-9
    assert relative_error(value, F.cross_entropy(-back, torch.tensor(0))) > 1e-2


def test_a_semi_hard_negative_is_farther_than_the_positive_not_as_far():
    metric = FAIMMetric(1, dtype=torch.float64)
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[1.0], [-1.0], [1.5]], dtype=torch.float64)
    d = metric(x, y)[0]
    assert d[0] == d[1] < d[2]
    loss = FAIMTripletLoss(metric, margin=2.0, mining="semi-hard")
    value = loss(x, torch.tensor([0]), None, y, torch.tensor([0, 1, 1]))
    assert value.item() == pytest.approx((d[0] - d[2] + 2.0).item())


def test_references_that_are_the_embeddings_are_themselves_no_positives():
    for name in LOSSES:
        loss = build(name, random_metric(D, full_sigma=False))
        x, given = arguments("own", 0)
        assert torch.equal(loss(x, **given, ref_emb=x), loss(x, **given))


# The margin loss


@each_form
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("counts", [None, [5, 80, 3, 16]])
def test_margin_loss_is_its_formula(full, symmetric, space, counts):
    options = dict(full_sigma=full, symmetric=symmetric, learn_metric=True, lambda_init=0.2, prior=True)
    head = FAIMHead(D, 4, space=space, **options, dtype=torch.float64)
    learning = [p for p in head.parameters() if p.requires_grad]
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in learning:
                parameter.add_(0.3 * torch.randn_like(parameter))
        x, labels = torch.randn(7, D, dtype=torch.float64, requires_grad=True), torch.randint(4, (7,))
        loss = FAIMMarginLoss(head=head, margin=0.4, class_counts=counts)
        value = loss(x, labels)
        d = head.metric.reference(head.embed(x), head.project(head.mu))
        terms = []
        for i, y in enumerate(labels.tolist()):
            margin = 0.4 * (1.0 if counts is None else (min(counts) / counts[y]) ** 0.25)
            logits = [-head.scale * (d[i, k] + margin * (k == y)) + head.prior[k] for k in range(4)]
            terms.append(-torch.log(torch.exp(logits[y]) / sum(torch.exp(t) for t in logits)))
        expected = torch.stack(terms).mean()
        assert relative_error(value, expected) <= 1e-6  # margins are float32
        inputs = (x, *learning)
        for got, want in zip(*(torch.autograd.grad(v, inputs) for v in (value, expected)), strict=True):
            assert relative_error(got, want) <= 1e-6


@each_form
def test_margin_loss_gradcheck(full, symmetric):
    options = dict(full_sigma=full, symmetric=symmetric, scale_init=3.0, dtype=torch.float64)
    head = FAIMHead(3, 4, **PRESETS["flat"] | options)
    loss = FAIMMarginLoss(head=head, class_counts=[1, 2, 3, 4])
    loss.shared = head
    x, labels = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 1, 1, 2])
    names = [key for key, _ in loss.named_parameters()]
    assert torch.autograd.gradcheck(
        lambda x, *p: functional_call(loss, dict(zip(names, p, strict=True)), (x, labels)), (x, *loss.parameters())
    )


def test_margin_loss_shares_or_owns_a_head():
    head, x, labels = FAIMHead(D, 4), torch.randn(6, D), torch.tensor([0, 1, 2, 3, 0, 1])
    shared = FAIMMarginLoss(head=head)
    assert not list(shared.parameters())
    shared(x, labels).backward()
    assert all(p.grad.any() for p in head.parameters() if p.requires_grad)
    assert shared(x, labels) > F.cross_entropy(head(x), labels)
    both = copy.deepcopy(nn.ModuleList([head, shared]))
    assert both[1].head is both[0] is not head
    owned = FAIMMarginLoss(4, D, class_counts=torch.tensor([1, 2, 3, 4]))
    assert owned.head.space == "sphere" and owned.head.scale.item() == 24
    fresh = FAIMMarginLoss(4, D, margin=0.9)
    fresh.load_state_dict(owned.state_dict())
    for other in (fresh, copy.deepcopy(owned), pickle.loads(pickle.dumps(owned))):
        assert torch.equal(other(x, labels), owned(x, labels)) and other.head is other.owned_head


def test_margin_loss_leaves_ignored_labels_out_and_reduces():
    loss = FAIMMarginLoss(4, D)
    x, labels = torch.randn(6, D), torch.tensor([0, 1, -100, 3, 0, -100])
    assert torch.allclose(loss(x, labels), loss(x[labels >= 0], labels[labels >= 0]))
    loss.reducer = lambda losses, *_: losses["loss"]["losses"].sum()
    kept = x[labels >= 0], labels[labels >= 0]
    total = loss(*kept)
    loss.reducer = None
    assert torch.allclose(total, 4 * loss(*kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_margin_loss_in_half_precision(dtype):
    loss = FAIMMarginLoss(4, D)
    x, labels = torch.randn(6, D).to(dtype), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = loss(x.float(), labels).detach().double()
    assert relative_error(loss(x, labels), expected) <= 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(loss(x, labels), expected) <= 1e-6


# Bad input


@pytest.mark.parametrize("name", ["ntxent", "batch-hard", "npair"])  # each has its way through the checks
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=LABELS[:4]), r"labels must be.*\[10\].*\[4\]"),
        (dict(labels=LABELS[:, None]), r"labels must be.*\[10, 1\]"),
        (dict(labels=LABELS.double()), "labels must be integers.*float64.*soft"),
        (dict(labels=LABELS > 0), "labels must be integers.*bool"),
        (dict(labels=None), "labels"),
        (dict(embeddings=torch.zeros(10, D + 1)), rf"embeddings must be \[B, {D}\].*\[10, {D + 1}\]"),
        (dict(embeddings=torch.zeros(10, D, 2)), rf"embeddings must be \[B, {D}\].*\[10, {D}, 2\]"),
        (
            dict(embeddings=torch.zeros(10, D).index_fill(0, torch.tensor([3, 7]), math.nan)),
            "embeddings are not finite in 2 of 10 rows.*row 3",
        ),
        (dict(embeddings=torch.full((10, D), math.inf)), "not finite in 10 of 10 rows.*row 0"),
        (dict(ref_emb=torch.zeros(4, D)), "ref_emb needs ref_labels"),
        (dict(ref_labels=LABELS), "ref_labels are given without ref_emb"),
        (dict(ref_emb=torch.zeros(4, D), ref_labels=LABELS), r"ref_labels must be.*\[4\].*\[10\]"),
        (dict(ref_emb=torch.zeros(4, D - 1), ref_labels=LABELS[:4]), rf"ref_emb must be \[B, {D}\].*\[4, {D - 1}\]"),
        (dict(ref_emb=torch.full((4, D), math.nan), ref_labels=LABELS[:4]), "ref_emb are not finite in 4 of 4"),
        (dict(indices_tuple=(LABELS, LABELS)), "indices_tuple"),
    ],
)
def test_bad_calls(name, change, message):
    call = dict(embeddings=torch.randn(10, D), labels=LABELS) | change
    with pytest.raises(ValueError, match=message):
        build(name, in_features=D)(**call)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAIMInfoNCELoss(), "a head or a metric.*in_features.*neither"),
        (lambda: FAIMTripletLoss(FAIMMetric(D), D), "a head or a metric.*in_features.*both"),
        *(
            (lambda value=value, loss=loss: loss(in_features=D, temperature=value), f"temperature.*{value}")
            for value in (0, -1.0, math.nan, math.inf)
            for loss in (FAIMInfoNCELoss, FAIMNPairLoss)
        ),
        *(
            (lambda value=value: FAIMTripletLoss(in_features=D, margin=value), f"margin.*{value}")
            for value in (0, -0.5, math.nan)
        ),
        (lambda: FAIMInfoNCELoss(in_features=D, form="simclr"), "form.*ntxent.*supcon.*simclr"),
        (lambda: FAIMTripletLoss(in_features=D, mining="hard"), "mining.*batch-hard.*semi-hard.*'hard'"),
        (lambda: FAIMMarginLoss(4, D, margin=0), "margin.*0"),
        (lambda: FAIMMarginLoss(4, D, margin=-0.1), "margin.*-0.1"),
        (lambda: FAIMMarginLoss(), "head=.*num_classes and in_features"),
        (lambda: FAIMMarginLoss(4), "head=.*num_classes and in_features"),
        (lambda: FAIMMarginLoss(4, D, head=FAIMHead(D, 4)), "head=.*num_classes and in_features"),
        (lambda: FAIMMarginLoss(4, head=FAIMHead(D, 4)), "head=.*num_classes and in_features"),
        (lambda: FAIMMarginLoss(4, D, class_counts=[1, 2, 3]), r"class_counts must be 4 numbers.*1.0, 2.0, 3.0"),
        (lambda: FAIMMarginLoss(4, D, class_counts=[1, 2, 3, 0]), "class_counts must be 4 numbers > 0"),
        (lambda: FAIMMarginLoss(4, D)(torch.randn(2, D), torch.tensor([1, 4])), "label 4 is out of range for 4"),
        (lambda: FAIMMarginLoss(4, D)(torch.randn(2, D), torch.tensor([-1, 0])), "label -1 is out of range for 4"),
        (lambda: FAIMMarginLoss(4, D)(torch.randn(2, D), torch.tensor([1, 2, 3])), r"labels must be.*\[2\].*\[3\]"),
        (lambda: FAIMMarginLoss(4, D)(torch.randn(2, D), torch.rand(2)), "labels must be integers.*float32"),
        (lambda: FAIMNPairLoss(in_features=D)(torch.randn(2, D), LABELS[:2], (LABELS,) * 3), "no indices_tuple"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_metric_must_be_a_metric():
    with pytest.raises(TypeError, match="must be a FAIMHead or a FAIMMetric, got int"):
        FAIMTripletLoss(D)
    with pytest.raises(ValueError, match="leave normalizing out"):
        FAIMTripletLoss(FAIMHead(D, 3), normalize=True)


@each_loss
@pytest.mark.parametrize("space", SPACES)
def test_the_losses_of_a_head_are_between_its_own_points(name, space):
    head = FAIMHead(D, 4, space=space, dtype=torch.float64)
    x, given = arguments("own", 0)
    fit_(head, [(3.0 * torch.randn(40, D, dtype=torch.float64) + 1.0, torch.arange(40) % 4)])
    loss = build(name, head)
    assert not list(loss.parameters())
    expected = build(name, head.metric)(head.embed(x), **given)
    assert relative_error(loss(x, **given), expected) <= 1e-12
    copied = copy.deepcopy(nn.ModuleDict({"head": head, "loss": loss}))
    with torch.no_grad():
        copied["head"].metric.lmbda.add_(1)
    assert copied["loss"](x, **given) != loss(x, **given)


def test_whether_embeddings_are_finite_can_be_left_to_the_caller():
    loss = FAIMInfoNCELoss(in_features=D, check_finite=False)
    assert loss(torch.full((4, D), math.nan), torch.tensor([0, 0, 1, 1])).isnan()


def test_the_library_is_optional_and_imported_late():
    """Without pytorch-metric-learning everything but FAIMDistance is there, and that one says what to install."""
    code = """
import sys
import timm_faim
assert not [name for name in sys.modules if name.startswith("pytorch_metric_learning")]
sys.modules["pytorch_metric_learning"] = None
timm_faim.FAIMInfoNCELoss(in_features=4)
try:
    from timm_faim import FAIMDistance
except ImportError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "FAIMDistance needs pytorch-metric-learning: pip install 'timm-faim[metric]'" in done.stdout
