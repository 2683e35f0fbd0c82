"""Temperature, rejection and sets of classes: what they promise, on numbers that can be worked out by hand."""

import json
import math

import pytest
import torch
from torch import nn

from timm_faim import FAIMHead, fit_
from timm_faim.calibration import (
    COVERAGES,
    RATES,
    SOURCES,
    Calibration,
    apply_temperature_,
    calibrate,
    calibration_error,
    cross_fitted_logits,
    fit_temperature,
    known_score,
    lookalike_folds,
    prediction_sets,
    set_threshold,
    threshold,
)


def images(n=4000, classes=7, spread=3.0, seed=0):
    """Logits whose softmax is the truth, and classes drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


# temperature


def test_temperature_of_two_logits_is_exact():
    # 3 of 4 right at a gap of 2: softmax(2 / T) = 3 / 4, T = 2 / log 3
    logits, targets = torch.tensor([[2.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1])
    assert fit_temperature(logits, targets) == pytest.approx(2.0 / math.log(3.0), rel=1e-9)


@pytest.mark.parametrize("doubt", [0.0, 1.0])
@pytest.mark.parametrize("factor", [0.02, 0.5, 3.0, 40.0])
def test_temperature_undoes_a_factor(factor, doubt):
    logits, targets = images()
    plain = fit_temperature(logits, targets, doubt)
    assert fit_temperature(logits * factor, targets, doubt) == pytest.approx(factor * plain, rel=1e-8)
    assert plain == pytest.approx(1.0, abs=0.05)


def test_temperature_is_the_least_cross_entropy():
    logits, targets = images(500, seed=3)
    logits = 1.7 * logits + torch.randn(500, 7, generator=torch.Generator().manual_seed(9)).double()
    T = fit_temperature(logits, targets)
    losses = [nn.functional.cross_entropy(logits / (T * f), targets).item() for f in (0.99, 1.0, 1.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_temperature_knows_no_order_shift_or_precision():
    logits, targets = images(300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    shifted = logits + 100.0 * torch.arange(300.0, dtype=torch.float64)[:, None]
    T = fit_temperature(logits, targets)
    assert fit_temperature(logits, targets) == T
    assert fit_temperature(logits[order], targets[order]) == pytest.approx(T, rel=1e-9)
    assert fit_temperature(shifted, targets) == pytest.approx(T, rel=1e-9)
    assert fit_temperature(logits.float(), targets.int()) == pytest.approx(T, rel=1e-5)


def test_temperature_stays_in_its_range():
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(logits, right) == 0.01
    assert fit_temperature(logits, wrong) == 100.0
    assert fit_temperature(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) == 1.0
    assert fit_temperature(torch.full((3, 4), 5.0), torch.tensor([0, 1, 2])) == 1.0


def test_doubt_keeps_few_right_images_from_certainty():
    logits, targets = torch.tensor([[3.0, 0.0], [0.0, 3.0]]).repeat(5, 1), torch.tensor([0, 1] * 5)
    T = fit_temperature(logits, targets, doubt=1.0)
    assert (logits / T).softmax(1).amax().item() == pytest.approx(10 / 11, rel=1e-6)


@pytest.mark.parametrize(
    "logits, targets, message",
    [
        (torch.empty(0, 3), torch.empty(0, dtype=torch.long), "N, C >= 1"),
        (torch.zeros(2), torch.tensor([0, 1]), "N, C >= 1"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"\[0, 3\), got 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"\[0, 3\), got -1 to 0"),
        (torch.zeros(2, 3), torch.tensor([0]), "2 class indices"),
        (torch.zeros(2, 3), torch.zeros(2), "class indices"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "NaN or inf"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "NaN or inf"),
    ],
)
def test_bad_logits_are_named(logits, targets, message):
    for function in (fit_temperature, lambda *a: set_threshold(*a, 0.9), lambda *a: calibrate(*a, "validation")):
        with pytest.raises(ValueError, match=message):
            function(logits, targets)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = FAIMHead(5, 4, prior=True), FAIMHead(5, 4, scale_init=3.0)

    def forward(self, x):
        return 0.5 * (self.a(x) + self.b(x))


@pytest.mark.parametrize(
    "model",
    [FAIMHead(5, 4), FAIMHead(5, 4, prior=True), FAIMHead(5, 4, space="flat", lambda_init=0.1), TwoHeads()],
    ids=["head", "prior", "flat", "two"],
)
def test_applied_temperature_divides_logits(model):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("prior"):
                parameter.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
        before = model.eval()(x)
        trained = [p.requires_grad for p in model.parameters()]
        assert apply_temperature_(model, 0.25) is model
        torch.testing.assert_close(model(x), 4.0 * before)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_applied_temperature_refuses_and_leaves_the_model():
    with pytest.raises(ValueError, match="no FAIM head"):
        apply_temperature_(nn.Linear(3, 3), 2.0)
    head = FAIMHead(5, 4)
    for bad in (0.0, -1.0, math.nan, math.inf, 0.001, True, "2"):
        with pytest.raises(ValueError, match="temperature"):
            apply_temperature_(head, bad)
    both = TwoHeads()
    both.b.half()
    with torch.no_grad():
        both.b.scale.fill_(60000.0)
    with pytest.raises(ValueError, match="float16"):
        apply_temperature_(both, 0.01)
    assert both.a.scale.item() == 16.0 and both.b.scale.item() == 60000.0


def test_a_shared_head_is_divided_once():
    head = FAIMHead(5, 4)
    apply_temperature_(nn.ModuleList([head, head]), 2.0)
    assert head.scale.item() == 8.0


# rejection


def test_threshold_is_an_order_statistic():
    scores = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0, 7.0, 6.0])  # n + 1 = 10
    assert threshold(scores, 0.1) == 1.0
    assert threshold(scores, 0.19) == 1.0
    assert threshold(scores, 0.2) == 2.0
    assert threshold(scores.flip(0), 0.3) == 3.0
    assert threshold(scores, 0.95) == 9.0
    assert threshold(scores, 0.09) == threshold(scores, 0.0) == -math.inf
    assert threshold(torch.arange(99.0), 0.29) == 28.0  # 100 · 0.29 is 28.999999999999996 in floats


def test_threshold_of_one_image_and_of_ties():
    one = torch.tensor([0.5])
    assert threshold(one, 0.4) == -math.inf
    assert threshold(one, 0.5) == 0.5
    tied = torch.zeros(100)
    assert not (tied < threshold(tied, 0.5)).any()  # an image at the threshold is accepted


@pytest.mark.parametrize("n", [19, 30])
def test_known_images_are_rejected_at_the_rate(n):
    scores = torch.rand(5000, n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    for rate in (0.05, 0.1):
        least = torch.tensor([threshold(row[:n], rate) for row in scores])
        share = (scores[:, n] < least).double().mean().item()
        assert share == pytest.approx(math.floor((n + 1) * rate) / (n + 1), abs=0.017)  # four standard errors


@pytest.mark.parametrize("rate", [-0.1, 1.0, math.nan, "a", True, None])
def test_rates_have_a_range(rate):
    with pytest.raises(ValueError, match="rate"):
        threshold(torch.zeros(3), rate)
    with pytest.raises(ValueError, match="coverage"):
        set_threshold(torch.full((3, 2), 0.5), torch.zeros(3, dtype=torch.long), rate)


def test_scores_must_be_numbers():
    for bad, message in ((torch.empty(0), "N >= 1"), (torch.tensor([math.nan]), "NaN"), (torch.zeros(2, 2), "N >= 1")):
        with pytest.raises(ValueError, match=message):
            threshold(bad, 0.1)


# sets of classes


def test_set_threshold_is_an_order_statistic():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 0, 1])  # 1 - p_y: 0.1, 0.4, 0.8, 0.5
    assert set_threshold(p, targets, 0.2) == pytest.approx(0.1)
    assert set_threshold(p, targets, 0.5) == pytest.approx(0.5)  # ⌈2.5⌉ = 3rd
    assert set_threshold(p, targets, 0.8) == pytest.approx(0.8)
    assert set_threshold(p, targets, 0.81) == 1.0  # too few images: every class
    assert prediction_sets(p, 1.0).all()


def test_sets_are_never_empty():
    p = torch.tensor([[0.25, 0.5, 0.25], [0.4, 0.2, 0.4], [1.0, 0.0, 0.0]])
    assert prediction_sets(p, 0.0).tolist() == [[False, True, False], [True, False, False], [True, False, False]]
    assert prediction_sets(p, 0.6).tolist() == [[False, True, False], [True, False, True], [True, False, False]]
    assert prediction_sets(torch.ones(2, 1), 0.0).all()
    assert prediction_sets(torch.empty(0, 3), 0.5).shape == (0, 3)
    for q in (-0.1, 1.1, math.nan, True, None):
        with pytest.raises(ValueError, match="q must"):
            prediction_sets(p, q)
    with pytest.raises(ValueError, match="softmax"):
        prediction_sets(torch.tensor([[3.0, -1.0]]), 0.5)


@pytest.mark.parametrize("coverage", COVERAGES)
def test_sets_cover(coverage):
    logits, targets = images(20000)
    p, wrong = logits.softmax(1), (0.3 * logits).softmax(1)  # it holds whether or not the probabilities are right
    for each in (p, wrong):
        q = set_threshold(each[:5000], targets[:5000], coverage)
        hit = prediction_sets(each[5000:], q).gather(1, targets[5000:, None]).double().mean().item()
        assert hit > coverage - 0.012


# held-out training images


def test_look_alikes_are_held_out_together():
    series = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    jitter = torch.rand(24, 2, generator=torch.Generator().manual_seed(0))
    which = torch.arange(24) % 3
    targets = torch.arange(24) // 12
    folds = lookalike_folds(series[which] + jitter, targets, 3)
    for label in (0, 1):
        found = [set(folds[(targets == label) & (which == w)].tolist()) for w in range(3)]
        assert [len(each) for each in found] == [1, 1, 1] and set.union(*found) == {0, 1, 2}


def test_folds_leave_every_class_an_image():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 30, (120,), generator=generator)
    points = torch.randn(120, 6, generator=generator)
    for count in (2, 5, 200):
        folds = lookalike_folds(points, targets, count)
        assert int(folds.max()) < count
        for label in targets.unique():
            own = folds[targets == label]
            assert own.tolist() == [-1] if len(own) == 1 else len(own.unique()) == min(count, len(own))


def test_copies_of_one_image_are_not_held_out():
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    points = torch.tensor([[1.0], [1.0], [1.0], [0.0], [3.0], [5.0]])
    folds = lookalike_folds(points, targets)
    assert folds[:3].tolist() == [-1] * 3 and folds[5] == -1 and sorted(folds[3:5].tolist()) == [1, 2]
    with pytest.raises(ValueError, match="2 folds"):
        lookalike_folds(points, targets, 1)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        lookalike_folds(points, targets[:2])


def test_held_out_logits_are_those_of_a_head_without_the_fold():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(40) % 4
    x = 2.0 * torch.randn(4, 6, generator=generator)[targets] + torch.randn(40, 6, generator=generator)
    folds = torch.arange(40) // 4 % 3 - 1
    head = fit_(FAIMHead(6, 4), [(x, targets)])
    before = {name: value.clone() for name, value in head.state_dict().items()}
    logits, classes = cross_fitted_logits(head, x, targets, folds)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    expected = [fit_(FAIMHead(6, 4), [(x[folds != f], targets[folds != f])]).eval()(x[folds == f]) for f in (0, 1)]
    torch.testing.assert_close(logits, torch.cat(expected).detach())
    assert classes.tolist() == torch.cat([targets[folds == f] for f in (0, 1)]).tolist()
    with pytest.raises(ValueError, match="no training image"):
        cross_fitted_logits(head, x, targets, torch.full((40,), -1))


# the score


def test_score_is_of_the_shape_and_order_of_the_logits():
    logits, _ = images(50)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(known_score(logits[:, order]), known_score(logits))
    assert known_score(torch.empty(0, 3)).shape == (0,)
    assert known_score(logits.half()).dtype == torch.float32
    assert torch.equal(known_score(torch.tensor([[-1.0], [-3.0]])).argsort(), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"\[N, C\]"):
        known_score(torch.zeros(3))


# the record


def test_calibration_is_what_its_parts_give():
    logits, targets = images(2000)
    made = calibrate(2.0 * logits, targets, "validation")
    assert made.temperature == pytest.approx(fit_temperature(2.0 * logits, targets, doubt=1.0), rel=1e-12)
    calibrated = 2.0 * logits / made.temperature
    assert made.images == 2000 and made.source == "validation"
    assert made.ece_before == pytest.approx(calibration_error((2.0 * logits).softmax(1), targets))
    assert made.ece_after < 3.5 < made.ece_before
    assert made.reject == {rate: threshold(known_score(calibrated), rate) for rate in RATES}
    assert made.sets == {c: set_threshold(calibrated.softmax(1), targets, c) for c in COVERAGES}


def test_calibration_of_shuffled_images_differs_in_the_halves_alone():
    logits, targets = images(400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    one, other = (calibrate(logits[i], targets[i], "validation") for i in (torch.arange(400), order))
    assert other.temperature == pytest.approx(one.temperature, rel=1e-9)
    assert list(other.reject.values()) == pytest.approx(list(one.reject.values()), rel=1e-6)
    assert list(other.sets.values()) == pytest.approx(list(one.sets.values()), rel=1e-6)


def test_error_after_is_of_the_other_half():
    alike = calibrate(torch.tensor([[4.0, 0.0]]).repeat(40, 1), torch.tensor([0, 0, 0, 1] * 10), "validation")
    assert alike.ece_before == pytest.approx(100.0 / (1.0 + math.exp(-4.0)) - 75.0)
    assert alike.ece_after == pytest.approx(
        50.0 / 21.0
    )  # 3 of 4 are right in both halves, less one image of doubt in 21
    first_right = torch.tensor([[4.0, 0.0]] * 10 + [[0.0, 4.0]] * 10)
    assert calibrate(first_right, torch.zeros(20, dtype=torch.long), "validation").ece_after > 40.0


def test_calibration_of_the_least_images():
    one = calibrate(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), "validation")
    assert one.ece_after is None and one.images == 1
    assert set(one.reject.values()) == {-math.inf} and set(one.sets.values()) == {1.0}
    single = calibrate(torch.tensor([[-1.0], [-2.0]]), torch.tensor([0, 0]), "validation")
    assert single.temperature == 1.0 and single.ece_before == single.ece_after == 0.0


def test_calibration_goes_through_json():
    for n in (1, 300):
        logits, targets = images(n)
        made = calibrate(logits, targets, SOURCES[1])
        assert Calibration.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made


def test_what_is_no_calibration_is_refused():
    written = calibrate(*images(50), "validation").to_json()
    for changed in (
        {"temperature": 0.0},
        {"temperature": "warm"},
        {"images": 0},
        {"source": "guess"},
        {"ece_before": math.nan},
        {"reject": {"2": 0.0}},
        {"reject": {"0.05": math.nan}},
        {"sets": {"0.9": 1.5}},
        {"sets": None},
        {"more": 1},
    ):
        with pytest.raises(ValueError, match="calibrat"):
            Calibration.from_json(written | changed)
    with pytest.raises(ValueError, match="calibrat"):
        Calibration.from_json([])
    with pytest.raises(ValueError, match="source"):
        calibrate(*images(50), "test")


def test_error_of_known_bins():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], dtype=torch.float64)
    # |0.9 - 0.5| and |0.6 - 1| over two images each
    assert calibration_error(p, torch.tensor([0, 1, 1, 1])) == pytest.approx(40.0)
