"""The least-squares problem as one value, against dense formulas and really solving again."""

import tracemalloc

import numpy as np
import pytest

from lmntk.errors import SolverError
from lmntk.solvers import fit
from lmntk.solvers.problem import SolverSettings
from lmntk.solvers.ridge_problem import RidgeProblem
from random_kernels import CLOSE, Case


def problem_of(case: Case, regularization: float = 0.01, f0: bool = False, samples: int = 1) -> RidgeProblem:
    settings = SolverSettings(regularization=regularization, f0_scaling=10)
    return RidgeProblem(case.train, case.train_labels, settings, case.train_f0 if f0 else None, samples)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_gcv_is_that_of_the_hat_matrix(regularization: float, asymmetric: bool) -> None:
    case = Case(1 if asymmetric else 3, asymmetric=asymmetric)
    problem = problem_of(case, regularization or 1e-6, f0=True)
    kernel = case.flat(case.train[0] if asymmetric else case.train)
    ridged = kernel + problem.settings.regularization * np.linalg.norm(kernel, 2) * np.eye(len(kernel))
    hat = np.eye(len(kernel)) - kernel.T @ np.linalg.inv(ridged)
    wanted = (case.targets(case.train_labels) - case.train_f0 / 10).reshape(-1)
    expected = len(kernel) * ((hat @ wanted) ** 2).sum() / np.trace(hat) ** 2
    assert problem.gcv() == pytest.approx(expected, rel=1e-6)
    if regularization == 0:  # the limit of ever smaller λ
        assert problem_of(case, 0.0, f0=True).gcv() == pytest.approx(problem.gcv(), rel=1e-2)


def test_a_restricted_problem_is_that_of_fewer_examples_with_its_own_norm() -> None:
    case, kept = Case(2), [7, 3, 12, 0, 5]
    restricted = problem_of(case, 0.1, f0=True).restricted_to(kept)
    kernel = case.train[np.ix_(kept, range(2), kept, range(2))]
    flat = case.flat(kernel)
    wanted = (case.targets(case.train_labels) - case.train_f0 / 10)[kept].reshape(-1)
    alpha = np.linalg.solve(flat + 0.1 * np.linalg.norm(flat, 2) * np.eye(10), wanted)
    expected = (case.flat(case.test[kept]).T @ alpha).reshape(-1, 2) + case.test_f0 / 10
    x_kernel = problem_of(case).restrict(case.test, kept)
    found = restricted.predict(x_kernel, case.test_labels, case.test_f0).logits
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


def test_the_samples_of_an_example_leave_together_and_are_averaged() -> None:
    case = Case(2)
    case.train_labels = np.tile(case.train_labels[:10], 2)
    problem = problem_of(case, 0.1, samples=2)
    flat, targets = case.flat(case.train), case.targets(case.train_labels)
    ridged = flat + 0.1 * np.linalg.norm(flat, 2) * np.eye(len(flat))
    rows = np.empty((20, 2))
    for example in range(10):
        out = np.repeat(np.isin(np.arange(20), [example, example + 10]), 2)
        alpha = np.linalg.solve(ridged[~out][:, ~out], targets.reshape(-1)[~out])
        rows[[example, example + 10]] = (flat[~out][:, out].T @ alpha).reshape(2, 2)
    np.testing.assert_allclose(problem.leave_one_out(), rows.reshape(2, 10, 2).mean(axis=0), rtol=0, atol=CLOSE)
    loss = np.mean((rows - targets) ** 2)
    assert problem.leave_one_out_loss() == pytest.approx(loss, abs=CLOSE)
    halved = problem.restricted_to([4, 1])
    np.testing.assert_array_equal(halved.kernel, case.train[np.ix_([4, 1, 14, 11], range(2), [4, 1, 14, 11], range(2))])


def test_a_singular_kernel_names_the_regularisation_that_would_do() -> None:
    problem = RidgeProblem(np.ones((4, 1, 4, 1)), np.array([-1.0, 1, -1, 1]))
    assert not problem.is_regular
    for ask in (problem.gcv, problem.leave_one_out):
        with pytest.raises(SolverError, match="take `kernel_regularization="):
            ask()


def test_gcv_is_left_out_where_an_example_has_several_samples() -> None:
    case = Case(2)
    case.train_labels = np.tile(case.train_labels[:10], 2)
    assert np.isnan(problem_of(case, 0.1, samples=2).gcv()) and not np.isnan(problem_of(case, 0.1).gcv())


@pytest.mark.parametrize("lower", [1.0, 2.0])
def test_a_kernel_that_is_singular_without_an_example_has_no_leave_one_out(lower: float) -> None:
    direction = np.array([[0.0, 1.0], [lower, 0.0]])
    kernel = np.stack([direction, direction.T]).reshape(2, 2, 1, 2, 1)
    problem = RidgeProblem(kernel if lower > 1 else kernel[0], np.array([-1.0, 1.0]))
    assert problem.is_regular and not problem.has_leave_one_out
    assert lower > 1 or np.isnan(problem.gcv())
    with pytest.raises(SolverError, match="take `kernel_regularization=0.001`"):
        problem.leave_one_out_loss()


@pytest.mark.parametrize("regularization", [0.0, 0.01])
def test_fitted_solvers_keep_no_kernel(regularization: float) -> None:
    features = np.random.default_rng(0).standard_normal((120, 200))
    labels = np.where(np.arange(120) % 2, 1.0, -1.0)
    settings = SolverSettings(regularization=regularization)
    fit("lstsq", np.eye(2).reshape(2, 1, 2, 1), [-1, 1], settings)  # imports
    tracemalloc.start()
    try:
        fitted = [
            fit("lstsq", (scale * features @ features.T).reshape(120, 1, 120, 1), labels, settings)
            for scale in (1.0, 2.0, 3.0, 4.0)
        ]
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 8 * 120**2, "four solvers take less than one kernel"
    assert fitted[0].train.kernel.shape == (120, 1, 120, 1)
