"""FAIMClassifier: scikit-learn's own checks, streams, probabilities, and what cannot be fitted."""

import builtins
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", minversion="1.6")
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from timm_faim import FAIMClassifier, FAIMHead, fit_

SPACES = ("indicatrix", "sphere", "flat")


def blobs(n=60, C=4, D=8, seed=0, spread=1.0):
    """n samples of each of C classes whose means and noise have a shared covariance; shuffled."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(D, D))
    means = 2.0 * np.random.default_rng(99).normal(size=(C, D))
    y = random.permutation(np.repeat(np.arange(C), n))
    return 5.0 + means[y] + spread * random.normal(size=(len(y), D)) @ mix / np.sqrt(D), y


@parametrize_with_checks(
    [FAIMClassifier(), FAIMClassifier(space="flat"), FAIMClassifier(space="sphere"), FAIMClassifier(full_sigma=False)]
)
def test_sklearns_own_checks(estimator, check):
    if estimator.space == "sphere" and check.func.__name__ == "check_fit2d_1feature":
        pytest.skip("one positive feature is one point of the sphere")
    check(estimator)


@pytest.mark.parametrize("space", SPACES)
def test_it_is_the_head_in_closed_form(space):
    X, y = blobs()
    found = FAIMClassifier(space=space, shrinkage=0.2, gamma=7.0).fit(X, y)
    head = FAIMHead(8, 4, space=space, scale_init=7.0, dtype=torch.float64)
    fit_(head, [(torch.tensor(X), torch.tensor(y))], shrinkage=0.2)
    np.testing.assert_allclose(found.decision_function(X), head(torch.tensor(X)).detach().numpy(), atol=1e-9)
    np.testing.assert_allclose(found.predict_proba(X).sum(1), 1.0)
    assert found.gamma_ == 7.0


def test_flat_predicts_as_linear_discriminants():
    X, y = blobs(spread=8.0)
    ours = FAIMClassifier(space="flat", shrinkage=1e-9).fit(X, y).predict(X)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(X, y).predict(X)
    assert (ours == theirs).mean() > 0.995 and (theirs == y).mean() < 0.98


@pytest.mark.parametrize("options", [{}, {"space": "sphere"}, {"space": "flat"}, {"full_sigma": False},
                                     {"parts": (5, 3), "part_weights": (0.3, 0.7), "rank": 3}], ids=str)  # fmt: skip
def test_a_stream_gives_what_one_fit_gives(options):
    X, y = blobs()
    names = np.array(["d", "b", "a", "c"])[y]
    whole = FAIMClassifier(gamma=16.0, **options).fit(X, names)
    stream = FAIMClassifier(gamma=16.0, **options)
    for start in range(0, len(X), 7):
        rows = slice(start, start + 7)
        stream.partial_fit(X[rows], names[rows], classes=["a", "b", "c", "d"] if start == 0 else None)
    np.testing.assert_allclose(stream.decision_function(X), whole.decision_function(X), rtol=1e-6)
    assert (stream.predict(X) == whole.predict(X)).all() and stream.score(X, names) > 0.9


def test_a_stream_goes_on_after_a_fit():
    X, y = blobs()
    on = FAIMClassifier(gamma=16.0).fit(X[:200], y[:200]).partial_fit(X[200:], y[200:])
    whole = FAIMClassifier(gamma=16.0).fit(X, y)
    np.testing.assert_allclose(on.decision_function(X), whole.decision_function(X), rtol=1e-8)


def test_a_class_that_has_not_come_yet_is_never_predicted():
    X, y = blobs()
    here = y < 3
    found = FAIMClassifier().partial_fit(X[here], y[here], classes=range(4))
    assert set(found.predict(X)) == {0, 1, 2}
    assert (found.predict_proba(X)[:, 3] == 0).all() and np.isneginf(found.decision_function(X)[:, 3]).all()
    found.partial_fit(X[~here], y[~here])
    assert found.score(X, y) > 0.9


def test_a_stream_may_begin_with_one_sample():
    X, y = blobs()
    found = FAIMClassifier().partial_fit(X[:1], y[:1], classes=range(4))
    with pytest.raises(ValueError, match="features are equal"):
        found.predict(X)
    assert found.partial_fit(X[1:], y[1:]).score(X, y) > 0.9


def test_gamma_is_found_and_makes_probabilities_better():
    X, y = blobs(spread=3.0)
    V, w = blobs(spread=3.0, seed=1)
    found = FAIMClassifier().fit(X, y)
    losses = {g: log_loss(w, FAIMClassifier(gamma=g).fit(X, y).predict_proba(V)) for g in (1.0, found.gamma_, 60.0)}
    assert losses[found.gamma_] == min(losses.values())
    assert (found.predict(V) == FAIMClassifier(gamma=1.0).fit(X, y).predict(V)).all()


def test_gamma_of_separable_classes_is_finite():
    X, y = blobs(spread=1e-3)
    found = FAIMClassifier().fit(X, y)
    assert found.gamma_ < 100 and found.predict_proba(X).max(1).min() > 0.9


@pytest.mark.parametrize("options", [{}, {"full_sigma": False}, {"space": "flat"}], ids=str)
def test_one_sample_a_class_and_fewer_samples_than_features(options):
    X, y = blobs(n=1, C=6, D=40)
    found = FAIMClassifier(**options).fit(X, y)
    assert (found.predict(X) == y).all() and found.gamma_ == 16.0


def test_constant_features_among_others_change_nothing():
    X, y = blobs()
    found = FAIMClassifier(gamma=16.0).fit(np.c_[X, np.full(len(X), 3.0)], y)
    assert found.score(np.c_[X, np.full(len(X), 3.0)], y) == FAIMClassifier(gamma=16.0).fit(X, y).score(X, y)


def test_one_class_is_the_answer():
    X, _ = blobs()
    assert set(FAIMClassifier().fit(X, ["only"] * len(X)).predict(X)) == {"only"}


def test_two_classes_have_one_number_a_sample():
    X, y = blobs(C=2)
    found = FAIMClassifier().fit(X, y)
    assert found.decision_function(X).shape == (len(X),)
    assert ((found.decision_function(X) > 0) == (found.predict(X) == 1)).all()


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"shrinkage": 0.0}, ValueError, r"shrinkage must be a number in \(0, 1\], got 0"),
    ({"shrinkage": 1.5}, ValueError, "shrinkage"), ({"shrinkage": "much"}, TypeError, "shrinkage"),
    ({"space": "round"}, ValueError, "space must be one of"),
    ({"gamma": 0.0}, ValueError, "gamma"), ({"gamma": "best"}, TypeError, "gamma"),
    ({"parts": (3, 3)}, ValueError, "parts"), ({"parts": (5, 3), "space": "flat"}, ValueError, "indicatrix"),
])  # fmt: skip
def test_parameters_out_of_range_are_named(options, error, message):
    with pytest.raises(error, match=message):
        FAIMClassifier(**options).fit(*blobs())


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda X: np.where(X[3, 2] == X, np.nan, X), "NaN"), (lambda X: np.where(X[3, 2] == X, np.inf, X), "infinity"),
    (lambda X: np.ones_like(X), "features are equal"), (lambda X: X[:, :0], "0 feature"),
])  # fmt: skip
def test_samples_that_cannot_be_fitted(spoil, message):
    X, y = blobs()
    found = FAIMClassifier()
    with pytest.raises(ValueError, match=message):
        found.fit(spoil(X), y)
    with pytest.raises(NotFittedError):
        found.predict(X)


def test_a_stream_says_which_classes_are_wrong():
    X, y = blobs()
    with pytest.raises(ValueError, match="classes must be passed"):
        FAIMClassifier().partial_fit(X, y)
    found = FAIMClassifier().partial_fit(X, y, classes=range(4))
    before = found.decision_function(X)
    with pytest.raises(ValueError, match="not told of at first: .*7"):
        found.partial_fit(X[:2], [0, 7])
    with pytest.raises(ValueError, match="not the same"):
        found.partial_fit(X, y, classes=range(5))
    assert (found.decision_function(X) == before).all()


def test_copies_and_company():
    X, y = blobs()
    found = FAIMClassifier(shrinkage=0.5).fit(X, y)
    again = pickle.loads(pickle.dumps(found))
    assert (again.decision_function(X) == found.decision_function(X)).all()
    assert (again.partial_fit(X, y).predict(X) == found.predict(X)).all()
    assert clone(found).get_params() == found.get_params()
    search = GridSearchCV(make_pipeline(StandardScaler(), FAIMClassifier()),
                          {"faimclassifier__shrinkage": [0.1, 0.9]}, cv=2)  # fmt: skip
    assert search.fit(X, y).score(X, y) > 0.9


def test_the_how_to_has_the_parameters():
    text = (Path(__file__).parents[1] / "docs" / "estimator.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(FAIMClassifier().get_params())


def test_without_sklearn_the_error_says_what_to_install(monkeypatch):
    import timm_faim

    real = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "timm_faim.estimator")
    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(ImportError, match=r"timm-faim\[sklearn\]"):
        _ = timm_faim.FAIMClassifier
