"""Logistic regression on kernels: as published where that ends soon, to the same minimum where it does not."""

import logging
import warnings

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold

from lmntk import logistic
from lmntk.errors import UsageError
from lmntk.solver_problem import Prediction
from lmntk.solvers import fit
from random_kernels import PLAIN, Case

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


@pytest.mark.parametrize(("logits", "features"), [(1, 600), (1, 80), (2, 80)])
def test_logistic_takes_newtons_method_where_a_large_kernel_keeps_l_bfgs_from_converging(
    logits: int, features: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logistic, "FEW_ITERATIONS", 20)
    case = Case(logits, features, n=260, decay=3.0)
    case.train, case.test = case.train * 1e6, case.test * 1e6
    found = scores_of(case.predict("logistic"))
    assert [record.getMessage() for record in caplog.records] == [
        "logistic regression on 260 train examples: L-BFGS did not converge in 20 iterations, so Newton's method was "
        "used, which goes closer to the minimum"
    ]
    # Both end near the minimum, where the scores may move far before the loss does: measured, 6e-5 of the largest.
    expected = logistic_without_scikit_learn(case)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_at_newtons_solution_the_gradient_of_the_penalised_loss_vanishes(
    logits: int, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "LARGE", 10)
    monkeypatch.setattr(logistic, "FEW_ITERATIONS", 1)
    case = Case(logits, features)
    rows = rows_by_hand(case)
    # X examples whose features are all 0, for the intercept, and the unit vectors, for the weights.
    units = np.eye(rows.shape[1] + 1)[1:].reshape(case.n, logits, logits, -1).transpose(0, 1, 3, 2)
    fitted = fit("logistic", case.train, case.train_labels, PLAIN)
    found = fitted.predict(units, case.train_labels[:1].repeat(rows.shape[1] + 1))
    # Of more than two classes' scores the log-probabilities know all but the mean, which the penalty makes 0.
    scores = found.logits - found.logits.mean(axis=1, keepdims=True) if logits > 2 else scores_of(found)[:, None]
    intercepts, weights = scores[0], scores[1:] - scores[0]
    scores = rows @ weights + intercepts
    p = softmax(scores, axis=1) if logits > 2 else expit(scores)
    pull = (case.targets(case.train_labels) if logits > 2 else case.train_labels[:, None] > 0) - p
    c = (weights**2).sum() / (weights * (rows.T @ pull)).sum()
    # One of the grid, but for what is left of the gradient.
    assert np.abs(np.log10(c) - np.linspace(-4, 4, 10)).min() < 1e-3
    # The solver allows 1e-4 for the mean over the 20 examples, and its last step goes beyond: measured, 4e-5 in all.
    np.testing.assert_allclose(rows.T @ pull, weights / c, atol=1e-4)
    np.testing.assert_allclose(pull.sum(axis=0), 0, atol=1e-4)


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("features", [300, 80])
def test_logistic_on_a_large_kernel_is_scikit_learns_where_that_converges_soon(
    logits: int, features: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(logits, features, n=260)
    columns, model = logistic_by_hand(case)
    np.testing.assert_allclose(scores_of(case.predict("logistic")), model.decision_function(columns), rtol=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("reason", ["too many unknowns", "Newton's method fails too"])
def test_logistic_on_a_large_kernel_goes_on_with_l_bfgs_where_newtons_method_is_of_no_use(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logistic, "LARGE", 10)
    monkeypatch.setattr(logistic, "FEW_ITERATIONS", 1)
    if reason == "too many unknowns":
        monkeypatch.setattr(logistic, "MOST_UNKNOWNS", 59)
    else:
        monkeypatch.setattr(
            logistic, "_fit_newton", lambda *_: warnings.warn("stuck", ConvergenceWarning, stacklevel=1)
        )
    case = Case(3)
    columns, model = logistic_by_hand(case)
    # The features are rotated, so that the largest entry of the gradient falls below 1e-4 an iteration off.
    np.testing.assert_allclose(case.predict("logistic").logits, model.predict_log_proba(columns), rtol=1e-4)
    assert not caplog.records


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
    assert logistic.cross_validation_folds(np.array([0, 1] * 5), 2) == 5
    assert logistic.cross_validation_folds(np.array([0, 1] * 50), 2) == 5
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "count"), [([0] * 19 + [1], "1 training example,"), ([0] * 20, "0 training examples,")]
)
def test_logistic_stops_at_a_class_that_cannot_be_split(labels: list[int], count: str) -> None:
    case = Case(2)
    case.train_labels = np.array(labels)
    with pytest.raises(UsageError, match=f"class 1 has {count} but logistic regression is cross-validated"):
        case.predict("logistic")
