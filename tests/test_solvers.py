"""Each solver against an independent calculation, and what happens with input that does not fit."""

import logging
import warnings
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC, SVR

from lmntk import solvers
from lmntk.errors import UsageError
from lmntk.solver_problem import Prediction, SolverSettings, class_ids, two_logits
from lmntk.solvers import SOLVERS, fit

pytestmark = pytest.mark.filterwarnings("error")

# Two float64 ways to solve a well-conditioned system of some 40 unknowns; measured differences are below 1e-11.
CLOSE = 1e-9
PLAIN = SolverSettings()


def predict(
    solver: str, train: Any, train_labels: Any, x: Any, x_labels: Any, settings: SolverSettings, *f0: Any, **names: str
) -> Prediction:
    """Fit and predict in one go; `f0`: the logits of the untrained model on the train and the X examples, or none."""
    return fit(solver, train, train_labels, settings, *f0[:1]).predict(x, x_labels, *f0[1:], **names)


class Case:
    """A kernel of random features with labels: N = 20, X = 7; feature f is of order 10^(-decay · f / features)."""

    def __init__(
        self, logits: int, features: int = 300, asymmetric: bool = False, n: int = 20, decay: float = 0.0
    ) -> None:
        rng = np.random.default_rng(0)
        x = 7
        classes = np.arange(n + x) % max(2, logits)
        phi = rng.normal(size=(n + x, logits, features)) + 0.4 * rng.normal(size=(max(2, logits), 1, features))[classes]
        phi *= np.logspace(0, -decay, features)
        kernel = np.einsum("iaf,jbf->iajb", phi, phi, optimize=True) / features
        if asymmetric:
            other = np.einsum("iaf,jbf->iajb", np.sign(phi), phi) / features
            kernel = np.stack([other, np.einsum("iajb->jbia", other)])
        labels = 2.0 * classes - 1 if logits == 1 else classes
        self.logits, self.n, self.x = logits, n, x
        self.train, self.test = kernel[..., :n, :, :n, :], kernel[..., :n, :, n:, :]
        self.train_labels, self.test_labels = labels[:n], labels[n:]
        self.train_f0, self.test_f0 = np.split(rng.normal(size=(n + x, logits)), [n])

    def predict(self, solver: str, settings: SolverSettings = PLAIN, f0: bool = False) -> Prediction:
        """Call the solver under test."""
        untrained = (self.train_f0, self.test_f0) if f0 else ()
        return predict(solver, self.train, self.train_labels, self.test, self.test_labels, settings, *untrained)

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Targets [n, C], written one by one."""
        if self.logits == 1:
            return labels[:, None].astype(float)
        targets = np.zeros((len(labels), self.logits))
        for row, label in zip(targets, labels, strict=True):
            row[label] = 1
        return targets

    def flat(self, kernel: np.ndarray) -> np.ndarray:
        """A direction of the kernel as a matrix, entry by entry: [N·C, X·C]."""
        n, c, x, _ = kernel.shape
        matrix = np.empty((n * c, x * c))
        for index in np.ndindex(kernel.shape):
            i, a, j, b = index
            matrix[i * c + a, j * c + b] = kernel[index]
        return matrix


def sum_of_squares_per_logit(case: Case, logits: np.ndarray) -> float:
    return ((logits - case.targets(case.test_labels)) ** 2).sum() / (case.x * case.logits)


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_lstsq_is_the_pseudo_inverse_of_the_kernel_singular_or_not(logits: int, features: int) -> None:
    case = Case(logits, features)
    found = case.predict("lstsq")
    alpha = np.linalg.pinv(case.flat(case.train), rcond=1e-12) @ case.targets(case.train_labels).reshape(-1)
    expected = (case.flat(case.test).T @ alpha).reshape(case.x, logits)
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)
    assert found.metrics == {"rank0": min(features, 20 * logits)}
    assert type(found.metrics["rank0"]) is int


def test_lstsq_on_a_kernel_of_rank_one_takes_the_shortest_solution() -> None:
    # K = v vᵀ with v = (1, 2): the shortest α with v (v·α) nearest to y = (1, -1) is v (v·y) / |v|⁴ = -(1, 2) / 25.
    kernel = np.array([[1.0, 2.0], [2.0, 4.0]]).reshape(2, 1, 2, 1)
    found = predict("lstsq", kernel, [1.0, -1.0], kernel[:, :, :1], [1.0], PLAIN)
    np.testing.assert_allclose(found.logits, [[-0.2]], rtol=1e-14)
    assert found.loss == pytest.approx(1.44, rel=1e-14)
    assert found.metrics == {"rank0": 1}


@pytest.mark.parametrize("logits", [1, 3])
def test_lstsq_without_a_remainder_gives_back_the_training_targets(logits: int) -> None:
    case = Case(logits)
    for untrained in ((), (case.train_f0, case.train_f0)):
        settings = SolverSettings(f0_scaling=2.0)
        found = predict("lstsq", case.train, case.train_labels, case.train, case.train_labels, settings, *untrained)
        np.testing.assert_allclose(found.logits, case.targets(case.train_labels), atol=CLOSE)
        assert found.loss < CLOSE


@pytest.mark.parametrize("logits", [1, 2])
def test_regularisation_is_in_units_of_the_largest_singular_value(logits: int) -> None:
    case = Case(logits, features=9)
    found = case.predict("lstsq", SolverSettings(regularization=0.1))
    matrix = case.flat(case.train)
    ridge = 0.1 * np.sqrt(np.linalg.eigvalsh(matrix @ matrix.T).max())
    alpha = np.linalg.solve(matrix + ridge * np.eye(len(matrix)), case.targets(case.train_labels).reshape(-1))
    np.testing.assert_allclose(found.logits.reshape(-1), case.flat(case.test).T @ alpha, rtol=CLOSE, atol=CLOSE)
    assert found.metrics == {"rank0": 20 * logits}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_the_regularised_kernel(solver: str) -> None:
    case = Case(1, asymmetric=True)
    found = case.predict(solver, SolverSettings(regularization=0.3))
    for direction in case.train:
        direction[...] += 0.3 * np.linalg.norm(case.flat(direction), 2) * np.eye(20).reshape(direction.shape)
    expected = case.predict(solver)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(expected.loss, rel=CLOSE)


@pytest.mark.parametrize("solver", ["lstsq", "svr"])
@pytest.mark.parametrize("logits", [1, 2])
def test_f0_divided_by_its_scaling_leaves_the_targets_and_joins_the_predictions(solver: str, logits: int) -> None:
    case = Case(logits)
    found = case.predict(solver, SolverSettings(f0_scaling=4.0), f0=True)
    targets = (case.targets(case.train_labels) - case.train_f0 / 4).reshape(-1)
    if solver == "lstsq":
        flat = case.flat(case.test).T @ np.linalg.solve(case.flat(case.train), targets)
    else:
        flat = SVR(kernel="precomputed").fit(case.flat(case.train), targets).predict(case.flat(case.test).T)
    expected = flat.reshape(case.x, logits) + case.test_f0 / 4
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE, atol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)


@pytest.mark.parametrize("solver", ["lstsq", "svr", "asym"])
def test_an_f0_scaling_of_zero_means_no_adjustment(solver: str) -> None:
    case = Case(1, asymmetric=True)
    with_f0 = case.predict(solver, SolverSettings(f0_scaling=0.0), f0=True)
    np.testing.assert_allclose(with_f0.logits, case.predict(solver).logits, rtol=CLOSE)


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
    monkeypatch.setattr(solvers, "FEW_ITERATIONS", 20)
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
    monkeypatch.setattr(solvers, "LARGE", 10)
    monkeypatch.setattr(solvers, "FEW_ITERATIONS", 1)
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
    monkeypatch.setattr(solvers, "LARGE", 10)
    monkeypatch.setattr(solvers, "FEW_ITERATIONS", 1)
    if reason == "too many unknowns":
        monkeypatch.setattr(solvers, "MOST_UNKNOWNS", 59)
    else:
        monkeypatch.setattr(solvers, "_fit_newton", lambda *_: warnings.warn("stuck", ConvergenceWarning, stacklevel=1))
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
    assert solvers.cross_validation_folds(np.array([0, 1] * 5), 2) == 5
    assert solvers.cross_validation_folds(np.array([0, 1] * 50), 2) == 5
    assert not caplog.records


@pytest.mark.parametrize(
    ("labels", "count"), [([0] * 19 + [1], "1 training example,"), ([0] * 20, "0 training examples,")]
)
def test_logistic_stops_at_a_class_that_cannot_be_split(labels: list[int], count: str) -> None:
    case = Case(2)
    case.train_labels = np.array(labels)
    with pytest.raises(UsageError, match=f"class 1 has {count} but logistic regression is cross-validated"):
        case.predict("logistic")


@pytest.mark.parametrize("logits", [1, 2, 3])
@pytest.mark.parametrize("features", [300, 9])
def test_svr_is_scikit_learns_on_the_flattened_kernel(logits: int, features: int) -> None:
    case = Case(logits, features)
    targets = case.targets(case.train_labels).reshape(-1)
    model = SVR(kernel="precomputed").fit(case.flat(case.train), targets)
    expected = model.predict(case.flat(case.test).T).reshape(case.x, logits)
    found = case.predict("svr")
    np.testing.assert_allclose(found.logits, expected, rtol=CLOSE)
    assert found.loss == pytest.approx(sum_of_squares_per_logit(case, expected), rel=CLOSE)


@pytest.mark.parametrize("features", [30, 9])
def test_svc_with_one_logit_predicts_minus_and_plus_one_and_counts_four_for_each_error(features: int) -> None:
    case = Case(1, features)
    model = SVC(kernel="precomputed").fit(case.flat(case.train), case.train_labels > 0)
    expected = np.where(model.predict(case.flat(case.test).T), 1.0, -1.0)
    found = case.predict("svc")
    np.testing.assert_array_equal(found.logits[:, 0], expected)
    assert found.loss == 4 * np.mean(expected != case.test_labels)
    assert found.loss > 0


@pytest.mark.parametrize("logits", [2, 4])
@pytest.mark.parametrize("features", [30, 6])
def test_svc_with_more_logits_separates_each_class_from_the_rest_on_the_kernel_summed_over_equal_logits(
    logits: int, features: int
) -> None:
    case = Case(logits, features)
    train = sum(case.train[:, c, :, c] for c in range(logits))
    test = sum(case.test[:, c, :, c] for c in range(logits))
    found = case.predict("svc")
    wrong = 0
    for label in range(logits):
        values = SVC(kernel="precomputed").fit(train, case.train_labels == label).decision_function(test.T)
        np.testing.assert_allclose(found.logits[:, label], values, rtol=CLOSE, atol=CLOSE)
        wrong += np.sum((values > 0) != (case.test_labels == label))
    assert found.loss == pytest.approx(4 * wrong / (case.x * logits), rel=CLOSE)


# libsvm stops when the optimality conditions hold to 1e-3 (its `tol`), which is what its decision values are off by.
LIBSVM = 5e-3


def quadratic_program(matrix: np.ndarray, linear: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """The v in [0, 1] with signs·v = 0 that minimises ½ vᵀ M v + linear·v."""
    found = minimize(
        lambda v: 0.5 * v @ matrix @ v + linear @ v,
        np.full(len(linear), 0.5),
        jac=lambda v: matrix @ v + linear,
        bounds=[(0, 1)] * len(linear),
        constraints={"type": "eq", "fun": lambda v: signs @ v, "jac": lambda v: signs},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-13},
    )
    assert found.success
    return found.x


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("features", [300, 9])
def test_svr_solves_its_quadratic_program(logits: int, features: int) -> None:
    case = Case(logits, features)
    kernel, y = case.flat(case.train), case.targets(case.train_labels).reshape(-1)
    # Smola & Schölkopf 2004, eq. 10, with C = 1 and ε = 0.1: α = up - down.
    signs = np.repeat([1.0, -1.0], len(y))
    up, down = np.split(quadratic_program(np.kron([[1, -1], [-1, 1]], kernel), 0.1 - signs * np.tile(y, 2), signs), 2)
    free = [(v > 1e-6) & (v < 1 - 1e-6) for v in (up, down)]
    remainder = y - kernel @ (up - down)
    offset = np.concatenate([remainder[free[0]] - 0.1, remainder[free[1]] + 0.1]).mean()
    expected = (case.flat(case.test).T @ (up - down) + offset).reshape(case.x, logits)
    np.testing.assert_allclose(case.predict("svr").logits, expected, atol=LIBSVM)


@pytest.mark.parametrize("features", [30, 6])
def test_svc_solves_its_quadratic_program(features: int) -> None:
    case = Case(2, features)
    kernel = np.einsum("icjc->ij", case.train)
    y = 2.0 * case.train_labels - 1
    alpha = quadratic_program(y[:, None] * kernel * y, -np.ones(case.n), y) * y
    free = (np.abs(alpha) > 1e-6) & (np.abs(alpha) < 1 - 1e-6)
    offset = (y - kernel @ alpha)[free].mean()
    expected = np.einsum("icjc->ij", case.test).T @ alpha + offset
    np.testing.assert_allclose(case.predict("svc").logits, np.stack([-expected, expected], axis=1), atol=LIBSVM)


@pytest.mark.parametrize("logits", [1, 2])
def test_svc_stops_at_a_class_without_examples(logits: int) -> None:
    case = Case(logits)
    case.train_labels = np.full(20, case.train_labels[0])
    with pytest.raises(UsageError, match="class 1 has no training example, but --kernel_solver svc needs one of each"):
        case.predict("svc")


@pytest.mark.parametrize("f0", [False, True])
@pytest.mark.parametrize("features", [300, 9])
def test_asym_solves_the_asymmetric_least_squares_svm(f0: bool, features: int) -> None:
    case = Case(1, features, asymmetric=True)
    gamma, weight = 0.7, 0.2
    found = case.predict("asym", SolverSettings(gamma=gamma, lambda_=weight, f0_scaling=3.0), f0=f0)
    y = case.train_labels - (case.train_f0[:, 0] / 3 if f0 else 0)
    h = np.diag(y) @ case.flat(case.train[0]) @ np.diag(y)
    # The first block row gives α = γ(1 - Hβ), which the second turns into a system for β alone.
    one, identity = np.ones(20), np.eye(20)
    beta = np.linalg.solve(identity / gamma - gamma * h.T @ h, one - gamma * h.T @ one)
    alpha = gamma * (one - h @ beta)
    forward, backward = (case.flat(direction).T for direction in case.test)
    expected = weight * forward @ (alpha * y) + (1 - weight) * backward @ (beta * y)
    expected += case.test_f0[:, 0] / 3 if f0 else 0
    np.testing.assert_allclose(found.logits[:, 0], expected, rtol=1e-7)
    assert found.loss == pytest.approx(np.mean((expected - case.test_labels) ** 2), rel=1e-7)
    assert found.metrics == {"rank0": 40}


@pytest.mark.parametrize("solver", ["lstsq", "logistic", "svr", "svc"])
def test_a_solver_of_symmetric_kernels_uses_the_first_direction_of_an_asymmetric_one(solver: str) -> None:
    case = Case(1, asymmetric=True)
    found = case.predict(solver)
    case.train, case.test = case.train[0], case.test[0]
    np.testing.assert_allclose(found.logits, case.predict(solver).logits, rtol=CLOSE)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_arrays_of_the_caller_stay_as_they_are(solver: str) -> None:
    case = Case(1, asymmetric=True)
    for array in (case.train, case.test, case.train_labels, case.test_labels, case.train_f0, case.test_f0):
        array.flags.writeable = False
    found = case.predict(solver, SolverSettings(regularization=0.1), f0=SOLVERS[solver].allows_f0)
    assert found.logits.shape == (7, 1)
    assert found.logits.dtype == np.float64


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_fit_predicts_any_number_of_splits(solver: str) -> None:
    case = Case(1, asymmetric=True)
    fitted = fit(solver, case.train, case.train_labels, PLAIN)
    for columns in (slice(0, 3), slice(2, 7)):
        found = fitted.predict(case.test[..., columns, :], case.test_labels[columns])
        expected = predict(
            solver, case.train, case.train_labels, case.test[..., columns, :], case.test_labels[columns], PLAIN
        )
        np.testing.assert_allclose(found.logits, expected.logits, rtol=CLOSE)
        assert found.loss == pytest.approx(expected.loss, rel=CLOSE)
        assert found.metrics == expected.metrics


@pytest.mark.parametrize("solver", ["lstsq", "svr", "asym"])
@pytest.mark.parametrize(("label", "class_id"), [(-1.0, 0), (1.0, 1)])
def test_train_examples_of_one_class_are_worth_a_warning(
    solver: str, label: float, class_id: int, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(1, asymmetric=True)
    fit(solver, case.train, case.train_labels, PLAIN)
    assert not caplog.records
    case.train_labels = np.full(20, label)
    fit(solver, case.train, case.train_labels, PLAIN)
    assert [record.getMessage() for record in caplog.records] == [
        f"all train examples are of class {class_id}: {solver} learns nothing about other classes from them; look at "
        "the labels of the train data"
    ]


def test_two_logits_have_the_single_logits_class_as_their_largest() -> None:
    single = np.array([[-2.0], [0.0], [0.5]])
    np.testing.assert_array_equal(two_logits(single), [[2, -2], [0, 0], [-0.5, 0.5]])
    np.testing.assert_array_equal(two_logits(single).argmax(axis=1), [0, 0, 1])
    more = np.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(two_logits(more), more)


def test_class_ids_come_from_signs_with_a_single_logit_only() -> None:
    np.testing.assert_array_equal(class_ids(np.array([-1.0, 1.0]), 1), [0, 1])
    np.testing.assert_array_equal(class_ids(np.array([0, 2, 1]), 3), [0, 2, 1])


def test_an_unknown_solver_is_told_with_the_nearest_name() -> None:
    case = Case(1)
    with pytest.raises(UsageError, match="unknown kernel solver 'lsqr': did you mean 'lstsq'"):
        case.predict("lsqr")


def test_asym_on_a_symmetric_kernel_names_the_formula_it_needs() -> None:
    with pytest.raises(UsageError) as caught:
        Case(2).predict("asym")
    assert str(caught.value) == (
        "--kernel_solver asym needs an asymmetric kernel (--kernel_formula asymmetric_signgd) and a single logit "
        "(--binary_classification): change that, or take another solver"
    )


@pytest.mark.parametrize("solver", ["logistic", "svc"])
def test_a_solver_that_cannot_start_from_f0_says_so(solver: str) -> None:
    with pytest.raises(UsageError, match=f"--kernel_solver {solver} needs a command without --adjust_for_init"):
        Case(1).predict(solver, f0=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_example_without_finite_kernel_values_is_named_with_its_split(value: float) -> None:
    case = Case(2)
    case.test[:, :, 4] = value
    with pytest.raises(UsageError, match="the kernel of train and dev holds NaN or infinity, first at dev example 4 "):
        predict("lstsq", case.train, case.train_labels, case.test, case.test_labels, PLAIN, x_split="dev")
    case.train[:, :, 3] = case.train[3] = value
    with pytest.raises(UsageError, match=r"train and train .* first at train example 3 \(counted from 0\)"):
        case.predict("lstsq")


def test_a_single_infinite_kernel_value_is_named_with_both_examples() -> None:
    case = Case(1, asymmetric=True)
    case.test[1, 11, 0, 2, 0] = -np.inf
    with pytest.raises(UsageError, match="first at X example 2 with train example 11 "):
        case.predict("asym")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ((4, 2, 4, 2), (3, 2, 5, 2)),
        ((4, 2, 4, 2), (4, 2, 5, 1)),
        ((4, 2, 4, 2), (4, 2, 0, 2)),
        ((4, 2, 4, 2), (2, 4, 2, 5, 2)),
        ((2, 4, 2, 4, 2), (4, 2, 5, 2)),
        ((4, 2, 4, 2), (8, 10)),
        ((4, 2, 4, 2), ()),
    ],
)
def test_kernels_that_do_not_go_together_are_told_with_their_shapes(
    train: tuple[int, ...], test: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError) as caught:
        predict("lstsq", np.ones(train), [0] * 4, np.ones(test), [0] * 5, PLAIN)
    assert f"the train kernel {list(train)} and the X kernel {list(test)} do not go together" in str(caught.value)


@pytest.mark.parametrize("shape", [(4, 2, 3, 2), (4, 2, 4, 1), (3, 4, 2, 4, 2), (0, 2, 0, 2), (8, 8), ()])
def test_a_train_kernel_of_another_shape_is_told_before_the_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        fit("lstsq", np.ones(shape), [0] * 4, PLAIN)
    assert f"the train kernel {list(shape)} does not go together with itself" in str(caught.value)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (2, [0, 1], "the kernel has 20 train examples, but labels of shape [2]"),
        (
            2,
            [0, 1, 2] + [0] * 17,
            "train example 2 (counted from 0) has the label 2, but those of a kernel with 2 logits are 0, 1",
        ),
        (
            1,
            [-1.0, 0.0] * 10,
            "train example 1 (counted from 0) has the label 0.0, but those of a kernel with 1 logit are -1, 1",
        ),
    ],
)
def test_labels_that_do_not_belong_to_the_kernel_are_told(logits: int, labels: list[float], message: str) -> None:
    case = Case(logits)
    case.train_labels = np.array(labels)
    with pytest.raises(UsageError) as caught:
        case.predict("lstsq")
    assert str(caught.value) == message


@pytest.mark.parametrize("given", ["train", "x"])
def test_untrained_logits_are_those_of_both_sides_or_of_none(given: str) -> None:
    case = Case(2)
    fitted = fit("lstsq", case.train, case.train_labels, PLAIN, case.train_f0 if given == "train" else None)
    with pytest.raises(ValueError, match="train_f0 and x_f0 go together"):
        fitted.predict(case.test, case.test_labels, case.test_f0 if given == "x" else None)


def test_untrained_logits_of_another_shape_are_told() -> None:
    case = Case(2)
    case.test_f0 = case.test_f0[:, :1]
    with pytest.raises(UsageError) as caught:
        case.predict("lstsq", f0=True)
    assert str(caught.value) == "the X logits have shape [7, 1], but its kernel wants [7, 2]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": -0.1}, "--kernel_regularization is -0.1, but must be a number of at least 0"),
        ({"gamma": 0.0}, "--kernel_gamma is 0.0, but must be a number above 0"),
        ({"lambda_": float("nan")}, "--kernel_lambda is nan, but must be a number"),
        ({"f0_scaling": float("inf")}, "--f0_scaling is inf, but must be a number of at least 0 (0: no adjustment)"),
    ],
)
def test_settings_without_a_meaning_name_their_flag(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        SolverSettings(**settings)
    assert str(caught.value) == message
