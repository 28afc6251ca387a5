"""Logistic regression on kernels: scikit-learn's where that gets to its minimum, the minimum where it does not."""

import logging
import re
import warnings

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from lmntk.errors import SolverError
from lmntk.solvers import cross_validation, logistic
from lmntk.solvers.penalised_loss import PenalisedLoss
from lmntk.solvers.problem import Prediction, SolverSettings
from random_kernels import Case

pytestmark = pytest.mark.filterwarnings("error")


def rows_by_hand(case: Case) -> np.ndarray:
    return np.array([[case.train[m, b, i, a] for m, b, a in order(case)] for i in range(case.n)])


def columns_by_hand(case: Case) -> np.ndarray:
    return np.array([[case.test[m, b, j, a] for m, b, a in order(case)] for j in range(case.x)])


def logistic_by_hand(case: Case) -> tuple[np.ndarray, LogisticRegressionCV]:
    """Features of the X examples and a model fitted by scikit-learn's own defaults, whose changes it announces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = LogisticRegressionCV(max_iter=10000, random_state=0).fit(rows_by_hand(case), case.train_labels)
    return columns_by_hand(case), model


def order(case: Case) -> list[tuple[int, int, int]]:
    return [(m, b, a) for m in range(case.n) for b in range(case.logits) for a in range(case.logits)]


@pytest.mark.parametrize("logits", [2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_logistic_gives_the_log_probabilities_of_scikit_learn_on_the_flattened_columns(
    logits: int, features: int
) -> None:
    case = Case(logits, features)
    columns, model = logistic_by_hand(case)
    found = case.predict("logistic")
    expected = model.predict_log_proba(columns)
    np.testing.assert_allclose(found.logits, expected, rtol=1e-6)
    assert found.loss == pytest.approx(-expected[np.arange(case.x), case.test_labels].mean(), rel=1e-6)
    assert found.metrics == {}


@pytest.mark.parametrize("features", [300, 9])
def test_logistic_with_one_logit_gives_the_difference_of_the_log_probabilities(features: int) -> None:
    case = Case(1, features)
    columns, model = logistic_by_hand(case)
    found = case.predict("logistic")
    expected = model.predict_log_proba(columns)
    np.testing.assert_allclose(found.logits[:, 0], expected[:, 1] - expected[:, 0], rtol=1e-6)
    is_one = (case.test_labels > 0).astype(int)
    assert found.loss == pytest.approx(-expected[np.arange(case.x), is_one].mean(), rel=1e-6)


def minimum(rows: np.ndarray, is_one: np.ndarray, c: float, weights: np.ndarray) -> np.ndarray:
    """The [w, b] that minimises c Σ log loss + |w|² / 2, by damped Newton steps from `weights`."""
    rows = np.c_[rows, np.ones(len(rows))]
    penalty = np.r_[np.ones(rows.shape[1] - 1), 0] / c

    def objective(weights: np.ndarray) -> float:
        return np.logaddexp(0, np.where(is_one, -1, 1) * (rows @ weights)).sum() + penalty @ weights**2 / 2

    for _ in range(200):
        p = expit(rows @ weights)
        gradient = rows.T @ (p - is_one) + penalty * weights
        step = -np.linalg.solve((rows.T * (p * (1 - p))) @ rows + np.diag(penalty), gradient)
        length, before = 1.0, objective(weights)
        while objective(weights + length * step) > before * (1 + 1e-12) + 1e-4 * length * gradient @ step:
            length /= 2
        weights = weights + length * step
        if -gradient @ step < 1e-12:
            return weights
    raise AssertionError("no minimum found")


def logistic_without_scikit_learn(case: Case) -> np.ndarray:
    """Scores [X] of the minimum for the C that is right most often in five stratified folds; two classes."""
    scale = np.abs(case.train).max()  # for Newton steps that do not get lost in rounding
    rows, columns = (features / scale for features in (rows_by_hand(case), columns_by_hand(case)))
    span, _ = np.linalg.qr(rows.T)  # the weights are a combination of the rows
    rows, columns = rows @ span, columns @ span
    is_one = case.train_labels > 0
    grid = np.logspace(-4, 4, 10) * scale**2
    right = np.zeros(10)
    for learn, check in StratifiedKFold(5).split(rows, is_one):
        weights = np.zeros(rows.shape[1] + 1)
        for index, c in enumerate(grid):
            weights = minimum(rows[learn], is_one[learn], c, weights)
            right[index] += ((rows[check] @ weights[:-1] + weights[-1] > 0) == is_one[check]).mean()
    weights = np.zeros(rows.shape[1] + 1)
    for c in grid[: right.argmax() + 1]:
        weights = minimum(rows, is_one, c, weights)
    return columns @ weights[:-1] + weights[-1]


def scores_of(found: Prediction) -> np.ndarray:
    """What separates two classes, [X]."""
    return found.logits[:, -1] - (found.logits[:, 0] if found.logits.shape[1] == 2 else 0)


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("features", [300, 9])
def test_logistic_is_the_minimum_of_the_penalised_loss_with_the_best_c(logits: int, features: int) -> None:
    case = Case(logits, features)
    # L-BFGS stops at a gradient of 1e-4: measured, up to 4e-3 from the minimum.
    np.testing.assert_allclose(scores_of(case.predict("logistic")), logistic_without_scikit_learn(case), atol=1e-2)


@pytest.mark.parametrize(
    ("logits", "features", "n", "scale"), [(1, 9, 16, 1e8), (2, 9, 20, 1e4), (1, 300, 16, 1e-3), (1, 80, 30, 1e6)]
)
def test_logistic_goes_to_the_minimum_where_l_bfgs_stops_short_of_it_in_silence(
    logits: int, features: int, n: int, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Large entries, and small ones: measured, scikit-learn's scores are off by 0.4 to 1 of the largest."""
    case = Case(logits, features, n=n, decay=3.0 if n == 30 else 0.0)
    case.train, case.test = case.train * scale, case.test * scale
    with caplog.at_level(logging.INFO):
        found = scores_of(case.predict("logistic"))
    assert re.fullmatch(
        rf"logistic regression on {n} train examples: L-BFGS stopped short of the minimum in \d+ of 51 fits, so "
        "Newton's method went on to it",
        caplog.messages[0],
    )
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    expected = logistic_without_scikit_learn(case)
    # The oracle stops when its loss falls by less than 1e-12: measured, 3e-7 of the largest score.
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    columns, model = logistic_by_hand(case)
    assert np.abs(model.decision_function(columns) - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
@pytest.mark.parametrize("scale", [1e-6, 4e4, 1e8])
def test_the_gradient_of_the_penalised_loss_vanishes_whatever_the_size_of_the_entries(
    logits: int, features: int, scale: float
) -> None:
    case = Case(logits, features, n=12)
    case.train = case.train * scale
    rows = rows_by_hand(case)
    weights, intercepts = (array.T for array in logistic.fit_rows(rows, np.arange(12) % max(2, logits), 4))
    scores = rows @ weights + intercepts
    p = softmax(scores, axis=1) if logits > 2 else expit(scores)
    pull = (case.targets(case.train_labels) if logits > 2 else (np.arange(12) % 2)[:, None]) - p
    # (0, -1e-13, …) where examples are far from the decision: what rounding leaves of 1 - p decides the difference.
    c = (weights**2).sum() / (weights * (rows.T @ pull)).sum()
    assert np.abs(np.log10(c) - np.linspace(-4, 4, 10)).min() < 1e-3
    np.testing.assert_allclose(rows.T @ pull * c, weights, atol=1e-3 * np.abs(weights).max())
    assert np.abs(pull.sum(axis=0)).max() <= 1e-3 * np.abs(pull).max()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_fit_without_intercept_is_held_to_its_minimum_too(classes: int) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(24) % classes
    features = 1e4 * (rng.normal(size=(24, 5)) + rng.normal(size=(classes, 5))[labels])
    weights, intercepts = logistic.fit_rows(features, labels, 5, fit_intercept=False)
    assert not intercepts.any()
    scores = features @ weights.T
    p = softmax(scores, axis=1) if classes > 2 else expit(scores)
    pull = features.T @ ((np.eye(classes)[labels] if classes > 2 else labels[:, None]) - p)
    c = (weights**2).sum() / (weights.T * pull).sum()
    assert np.abs(np.log10(c) - np.linspace(-4, 4, 10)).min() < 1e-4
    np.testing.assert_allclose(pull * c, weights.T, atol=1e-3 * np.abs(weights).max())


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("features", [300, 80])
def test_logistic_on_a_large_kernel_is_scikit_learns_where_that_converges_soon(
    logits: int, features: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(logits, features, n=260)
    columns, model = logistic_by_hand(case)
    np.testing.assert_allclose(scores_of(case.predict("logistic")), model.decision_function(columns), rtol=1e-6)
    assert not caplog.records


def test_with_too_many_unknowns_for_newtons_method_l_bfgs_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logistic, "MOST_UNKNOWNS", 59)
    case = Case(3)
    columns, model = logistic_by_hand(case)
    # The features are rotated, so that the largest entry of the gradient falls below 1e-4 an iteration off.
    np.testing.assert_allclose(case.predict("logistic").logits, model.predict_log_proba(columns), rtol=1e-4)
    assert caplog.messages == [
        "logistic regression on 20 train examples has more than 59 unknowns, too many for Newton's method: that L-BFGS "
        "got to the minimum is not checked"
    ]


def test_a_fit_that_cannot_be_taken_to_its_minimum_is_worth_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(PenalisedLoss, "minimum", lambda self, weights: (weights, self.step(weights)))
    case = Case(2, 9)
    case.train = case.train * 1e6
    case.predict("logistic")
    assert re.fullmatch(
        r"logistic regression on 20 train examples: \d+ of 51 fits did not reach the minimum of their loss; do not "
        "trust the predictions, take another solver",
        *caplog.messages,
    )


def test_features_that_float64_has_no_room_for_are_told() -> None:
    case = Case(2)
    case.train = case.train * 1e99
    with pytest.raises(SolverError, match=r"up to 1e\+100, but the largest here is .*e\+11"):
        case.predict("logistic", SolverSettings(regularization=1e12))


def test_logistic_learns_from_the_rows_and_predicts_from_the_columns_of_an_asymmetric_kernel() -> None:
    case = Case(1, asymmetric=True)
    found = case.predict("logistic")
    case.train, case.test = case.train[0].transpose(2, 1, 0, 3), case.test[0]
    columns, model = logistic_by_hand(case)
    np.testing.assert_allclose(found.logits[:, 0], model.decision_function(columns), rtol=1e-6)


def test_logistic_keeps_its_loss_finite_where_probabilities_round_to_zero() -> None:
    case = Case(2)
    case.test = case.test * 1e9
    found = case.predict("logistic")
    assert np.isfinite(found.logits).all()
    assert np.isfinite(found.loss)


def test_logistic_says_that_it_uses_fewer_than_five_folds(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(2)
    case.train_labels = np.array([0] * 17 + [1] * 3)
    with caplog.at_level(logging.WARNING):
        case.predict("logistic")
    assert [record.getMessage() for record in caplog.records] == [
        "class 1 has 3 training examples: 3 folds instead of 5"
    ]


def test_five_examples_of_each_class_make_five_folds_and_no_message(caplog: pytest.LogCaptureFixture) -> None:
    assert cross_validation.cross_validation_folds(np.array([0, 1] * 5), 2) == 5
    assert cross_validation.cross_validation_folds(np.array([0, 1] * 50), 2) == 5
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "count"), [([0] * 19 + [1], "1 training example,"), ([0] * 20, "0 training examples,")]
)
def test_logistic_stops_at_a_class_that_cannot_be_split(labels: list[int], count: str) -> None:
    case = Case(2)
    case.train_labels = np.array(labels)
    with pytest.raises(SolverError, match=count) as caught:
        case.predict("logistic")
    assert caught.value.data == {"solver": "logistic", "label": 1}
