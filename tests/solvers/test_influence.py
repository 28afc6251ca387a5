"""Influence in closed form, against really solving again without each group."""

import numpy as np
import pytest

from lmntk.errors import KernelMismatchError, SolverError
from lmntk.solvers.influence import influence
from lmntk.solvers.problem import SolverSettings, margins, signed
from lmntk.solvers.ridge_problem import RidgeProblem
from random_kernels import CLOSE, Case


def refitted(case: Case, problem: RidgeProblem, groups: np.ndarray) -> np.ndarray:
    """f(x) − f₋g(x) by solving the others' equations with the term λ‖K‖₂ of the whole kernel: ``[G, X, C]``."""
    train, test = (kernel if kernel.ndim == 4 else kernel[0] for kernel in (case.train, case.test))
    flat, columns = case.flat(train), case.flat(test)
    ridged = flat + problem.settings.regularization * np.linalg.norm(flat, 2) * np.eye(len(flat))
    f0 = 0 if problem.f0 is None else problem.f0 / problem.settings.f0_scaling
    targets = (case.targets(case.train_labels) - f0).reshape(-1)

    def predict(kept: np.ndarray) -> np.ndarray:
        return columns[kept].T @ np.linalg.solve(ridged[kept][:, kept], targets[kept])

    everyone = predict(np.ones(len(flat), dtype=bool))
    changes = [everyone - predict(np.repeat(groups != group, case.logits)) for group in np.unique(groups)]
    return np.stack(changes).reshape(-1, case.x, case.logits)


def problem_of(case: Case, regularization: float, f0: bool = False, samples: int = 1) -> RidgeProblem:
    settings = SolverSettings(regularization=regularization, f0_scaling=10)
    return RidgeProblem(case.train, case.train_labels, settings, case.train_f0 if f0 else None, samples)


@pytest.mark.parametrize("regularization", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("logits", [1, 2, 6])
@pytest.mark.parametrize("f0", [False, True])
def test_influence_is_the_change_of_a_fit_without_the_example(logits: int, regularization: float, f0: bool) -> None:
    case = Case(logits)
    problem = problem_of(case, regularization, f0)
    found = influence(problem, case.test)
    assert found.shape == (case.n, case.x, logits)
    np.testing.assert_allclose(found, refitted(case, problem, np.arange(case.n)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_an_asymmetric_kernel_has_the_influence_of_its_first_direction(regularization: float) -> None:
    case = Case(1, asymmetric=True)
    problem = problem_of(case, regularization)
    wanted = refitted(case, problem, np.arange(case.n))
    np.testing.assert_allclose(influence(problem, case.test), wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("logits", [1, 3])
def test_groups_of_any_sizes_leave_together_in_the_order_of_their_numbers(logits: int) -> None:
    case, groups = Case(logits), np.array([9] * 3 + [2] * 5 + [4] * 12)[::-1]
    problem = problem_of(case, 0.01, f0=True)
    found = influence(problem, case.test, groups)
    assert found.shape == (3, case.x, logits)
    np.testing.assert_allclose(found, refitted(case, problem, groups), rtol=0, atol=CLOSE)


def test_the_samples_of_an_example_leave_together_and_predictions_are_averaged_over_those_of_x() -> None:
    case = Case(2)
    case.train_labels = np.tile(case.train_labels[:10], 2)
    problem = problem_of(case, 0.1, samples=2)
    twice = np.concatenate([case.test, 3 * case.test], axis=2)
    wanted = refitted(case, problem, np.tile(np.arange(10), 2))
    np.testing.assert_allclose(influence(problem, twice, x_samples=2), 2 * wanted, rtol=0, atol=CLOSE)


def test_the_influence_on_its_own_example_ends_in_leave_one_out() -> None:
    case = Case(3)
    problem = problem_of(case, 0.1)
    own = influence(problem, case.train)[np.arange(case.n), np.arange(case.n)]
    fitted = problem.predict(case.train, case.train_labels).logits
    # Leave-one-out takes an example's column without the ridge, as the kernel file has it.
    np.testing.assert_allclose(fitted - own, problem.leave_one_out(), rtol=0, atol=CLOSE)


def test_a_singular_kernel_has_no_influence_and_other_shapes_are_refused() -> None:
    case = Case(2)
    with pytest.raises(SolverError, match="take `kernel_regularization="):
        influence(RidgeProblem(np.ones((4, 1, 4, 1)), np.array([-1.0, 1, -1, 1])), np.ones((4, 1, 2, 1)))
    with pytest.raises(KernelMismatchError):
        influence(problem_of(case, 0.1), case.test[1:])
    with pytest.raises(KernelMismatchError, match="`groups`"):
        influence(problem_of(case, 0.1), case.test, [0, 1])


def test_a_margin_is_above_zero_where_the_prediction_is_right() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 6, 3))
    classes = np.arange(6) % 3
    found = margins(logits, classes)
    np.testing.assert_array_equal(found > 0, logits.argmax(axis=-1) == classes)
    assert found[1, 2] == logits[1, 2, 2] - logits[1, 2, :2].max()
    np.testing.assert_array_equal(margins(np.array([[[2.0], [3.0]]]), np.array([0, 1])), [[-2, 3]])


@pytest.mark.parametrize("regularization", [0.0, 0.1])
def test_one_logit_that_is_the_difference_of_two_has_their_margins_and_influences(regularization: float) -> None:
    features = np.random.default_rng(0).normal(size=(15, 50))
    kernel, difference = features @ features.T, np.array([-1.0, 1.0])
    two = np.einsum("ij,ab->iajb", kernel, np.eye(2))
    one = np.einsum("iajb,a,b->ij", two, difference, difference)[:, None, :, None]
    classes, settings = np.arange(15) * 7 % 3 % 2, SolverSettings(regularization=regularization)
    numbers = []
    for values, labels in ((two, classes), (one, signed(classes))):
        problem = RidgeProblem(values[:8, :, :8], labels[:8], settings)
        predicted = problem.predict(values[:8, :, 8:], labels[8:]).logits
        without = predicted - influence(problem, values[:8, :, 8:])
        on_margins = margins(predicted, classes[8:]) - margins(without, classes[8:])
        numbers.append((margins(problem.leave_one_out(), classes[:8]), on_margins))
    for of_two, of_one in zip(*numbers, strict=True):
        np.testing.assert_allclose(of_one, of_two, rtol=0, atol=CLOSE)
