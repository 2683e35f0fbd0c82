"""Σ of few directions, from rows in one pass, against the literal inverse root in float64."""

import re

import pytest
import torch
from children import in_group
from torch import distributed

from timm_faim import FAIMHead
from timm_faim.head.closed_form import fit_from_statistics_
from timm_faim.head.statistics import HeadStatistics
from timm_faim.metric import LowRankFrame, RowScatter

D, CPU = 12, torch.device("cpu")
CLOSE = dict(rtol=1e-9, atol=1e-9)


def rows_of(count, wide=D, decay=0.7):
    """Rows whose variances fall by `decay` from one direction to the next, none of them along an axis."""
    basis = torch.linalg.qr(torch.randn(wide, wide, dtype=torch.float64)).Q
    return torch.randn(count, wide, dtype=torch.float64) * decay ** torch.arange(wide) @ basis.t()


def scatter_of(rows, most=64):
    scatter = RowScatter(rows.shape[1], most, CPU)
    scatter.add(rows)
    return scatter


def inverse_root(rows, rank, shrinkage, degrees):
    """((1-s) S + s t I)^-½ of the covariance S cut at `rank` directions, with t of all of it."""
    e, vectors = torch.linalg.eigh(rows.t() @ rows / degrees)
    t = e.sum() / len(e)
    e = torch.where(torch.arange(len(e)) >= len(e) - rank, e.clamp_min(0.0), 0.0)
    return vectors * ((1 - shrinkage) * e + shrinkage * t).rsqrt() @ vectors.t(), (shrinkage * t).sqrt()


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 4, D])
@pytest.mark.parametrize("count", [5, 40])
def test_the_frame_is_the_inverse_root_up_to_its_factor(rank, shrinkage, count):
    rows, degrees, center = rows_of(count), torch.tensor(count - 3), torch.randn(D, dtype=torch.float64)
    frame = LowRankFrame(D, rank, dtype=torch.float64).set_(center, scatter_of(rows), shrinkage, degrees)
    wanted, factor = inverse_root(rows, rank, shrinkage, degrees)
    x = torch.randn(7, 3, D, dtype=torch.float64)
    torch.testing.assert_close(frame(x), (x - center) @ wanted * factor, **CLOSE)


def test_a_frame_is_the_identity_at_first_and_without_rows():
    frame, x = LowRankFrame(D, 4, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)
    assert torch.equal(frame(x), x)
    center = torch.randn(D, dtype=torch.float64)
    frame.set_(torch.zeros(D), scatter_of(rows_of(9)), 0.3, torch.tensor(5))
    assert not torch.allclose(frame(x), x)
    for rows in (rows_of(0), torch.zeros(3, D)):
        frame.set_(center, scatter_of(rows), 0.3, torch.tensor(1))
        assert torch.equal(frame(x), x - center)


def test_directions_are_orthonormal_or_nothing():
    frame = LowRankFrame(D, 8, dtype=torch.float64).set_(torch.zeros(D), scatter_of(rows_of(5)), 0.3, torch.tensor(2))
    products = frame.directions.t() @ frame.directions
    wanted = torch.diag((torch.arange(8) < 5).double())
    torch.testing.assert_close(products, wanted, **CLOSE)
    assert (frame.stretch[:5] < 0).all() and (frame.stretch > -1).all() and not frame.stretch[5:].any()


@pytest.mark.parametrize("count", [1, 20, 39, 40])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_up_to_twice_the_rows_are_exact_in_any_order_and_cut(count, block):
    rows = rows_of(count, wide=60, decay=0.95)
    scatter = RowScatter(60, 20, CPU)
    for some in rows[torch.randperm(count)].split(block):
        scatter.add(some)
    e, V = scatter.leading(60)
    torch.testing.assert_close(V * e @ V.t(), rows.t() @ rows, **CLOSE)
    torch.testing.assert_close(scatter.trace, rows.square().sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("block", [1, 50, 900])
def test_of_more_rows_the_leading_directions_stay_right(block):
    """Only what is beyond the kept rows' directions is dropped; each cut loses less than the first one dropped."""
    rows, most = rows_of(900, wide=60, decay=0.8), 20
    scatter = RowScatter(60, most, CPU)
    for some in rows.split(block):
        scatter.add(some)
    assert len(scatter.rows) <= 2 * most
    torch.testing.assert_close(scatter.trace, rows.square().sum(), rtol=1e-12, atol=0.0)
    e, V = scatter.leading(16)
    wanted, vectors = torch.linalg.eigh(rows.t() @ rows)
    wanted, vectors = wanted.flip(0), vectors.flip(1)
    dropped = wanted[most:].sum()  # by all cuts together
    assert ((e - wanted[:16]).abs() <= dropped).all()
    cosines = (V * vectors[:, :16]).sum(0)[:8].abs()
    assert (1 - cosines).max() < 1e-3


def head_of_parts(classes, rank=D, **options):
    return FAIMHead(5 + D, classes, parts=[5, D], rank=rank, dtype=torch.float64, **options)


def within_scatter(x, targets):
    """Σ (x - mean of its class)(…)' of all samples, by the book."""
    residuals = torch.cat([x[targets == k] - x[targets == k].mean(0) for k in targets.unique()])
    return residuals.t() @ residuals


def features(count, classes):
    x = torch.cat([torch.randn(count, 5, dtype=torch.float64), 3.0 + rows_of(count)], 1)
    targets = torch.arange(count) % classes
    x[:, 5] += targets
    return x, targets


def statistics(batches, classes, rank=D):
    stats = HeadStatistics(head_of_parts(classes, rank))
    for x, targets in batches:
        stats.update(x, targets)
    return stats


def assert_scatter(stats, wanted):
    e, V = stats.scatters[0].leading(D)
    torch.testing.assert_close(V * e @ V.t(), wanted, rtol=1e-8, atol=1e-8 * float(wanted.diagonal().max()))
    torch.testing.assert_close(stats.scatters[0].trace, wanted.trace(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 7, 50, 180])
@pytest.mark.parametrize("order", ["mixed", "by class", "one image of the last class"])
def test_batches_of_any_cut_give_the_scatter_within_classes(batch, order):
    x, targets = features(180, 6)
    if order == "by class":
        places = targets.argsort()  # batches of one class, and cuts within a class
        x, targets = x[places], targets[places]
    elif order != "mixed":
        targets[targets == 5] = 0
        targets[77] = 5
    stats = statistics(zip(x.split(batch), targets.split(batch), strict=True), classes=6)
    assert_scatter(stats, within_scatter(x[:, 5:], targets))


def test_one_image_a_class_has_the_directions_of_all_images():
    x, _ = features(7, 7)
    head = head_of_parts(9)  # two classes are never seen
    fit_from_statistics_(head, statistics([(x, torch.arange(7))], 9))
    torch.testing.assert_close(head.frames[0].center, x[:, 5:].mean(0), **CLOSE)
    around = x[:, 5:] - x[:, 5:].mean(0)
    T = around.t() @ around / 6
    shrunk = 0.07 * T + 0.93 * T.diagonal().mean() * torch.eye(D, dtype=torch.float64)
    z = head.frames[0](x[:, 5:])
    wanted = around @ torch.linalg.inv(shrunk) @ around.t() * 0.93 * T.diagonal().mean()
    torch.testing.assert_close(z @ z.t(), wanted, **CLOSE)


def test_rows_of_all_parts_are_of_their_own_columns():
    x, targets = features(40, 4)
    other = torch.randn(40, 3, dtype=torch.float64)
    head = FAIMHead(5 + D + 3, 4, parts=[5, D, 3], dtype=torch.float64)
    stats = HeadStatistics(head)
    for some in torch.arange(40).split(9):
        stats.update(torch.cat([x, other], 1)[some], targets[some])
    assert_scatter(stats, within_scatter(x[:, 5:], targets))
    e, V = stats.scatters[1].leading(3)
    torch.testing.assert_close(V * e @ V.t(), within_scatter(other, targets), **CLOSE)


def _join(folder):
    """Each process has every other batch; in the third group of batches one process has none of some classes."""
    rank = distributed.get_rank()
    for name, (x, targets) in torch.load(folder / "data.pt").items():
        batches = list(zip(x.split(13), targets.split(13), strict=True))
        stats = statistics(batches[rank::2] if name != "all on one" else batches * (rank == 1), classes=6)
        stats.all_reduce()
        e, V = stats.scatters[0].leading(D)
        torch.save([V * e @ V.t(), stats.scatters[0].trace, stats.sums_CD, stats.counts_C], folder / f"{name}{rank}.pt")


def test_two_processes_join_to_one_pass(tmp_path):
    x, targets = features(100, 6)
    places = targets.argsort()
    data = {"mixed": (x, targets), "by class": (x[places], targets[places]), "all on one": (x, targets)}
    torch.save(data, tmp_path / "data.pt")
    in_group(_join, tmp_path)
    wanted = within_scatter(x[:, 5:], targets)
    for name in data:
        found = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), name
        scatter, trace, sums, counts = found[0]
        torch.testing.assert_close(scatter, wanted, rtol=1e-8, atol=1e-8 * float(wanted.max()))
        torch.testing.assert_close(trace, wanted.trace(), rtol=1e-10, atol=0.0)
        assert counts.sum() == 100
        torch.testing.assert_close(sums.sum(0), x.sum(0), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_input_is_computed_in_float32(dtype):
    frame = LowRankFrame(D, 4).set_(torch.randn(D), scatter_of(rows_of(40)), 0.3, torch.tensor(30)).to(dtype)
    x = torch.randn(5, D).to(dtype)
    out = frame(x)
    wanted = LowRankFrame(D, 4).double()
    wanted.load_state_dict(frame.state_dict())
    assert out.dtype is torch.float32
    error = (out - wanted(x.double())).norm() / out.norm()
    assert error < D * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ((0, 1), ValueError, "in_features must be >= 1, got 0"),
    ((4, 0), ValueError, "rank must be >= 1, got 0"),
    ((4, 5), ValueError, "rank must be at most the 4 features, got 5"),
    ((4, 2.0), TypeError, "rank must be a whole number >= 1, got 2.0"),
    ((True, 1), TypeError, "in_features must be a whole number >= 1, got True"),
])  # fmt: skip
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LowRankFrame(*arguments)


def test_a_statistic_refuses_what_no_scatter_can_have():
    x, targets = features(10, 5)
    stats = HeadStatistics(head_of_parts(5))
    for bad, message in (((x[:, :-1], targets), r"expected features \[N, 17\]"), ((x, targets + 1), r"lie in \[0, 5\)"),
                         ((x * float("nan"), targets), "NaN or inf")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            stats.update(*bad)
    assert not stats.counts_C.any() and not stats.scatters[0].trace and not len(stats.scatters[0].rows)
