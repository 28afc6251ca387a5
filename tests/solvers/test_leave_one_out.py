"""Leave-one-out in closed form, against really fitting to the other examples, one group at a time."""

from typing import Any

import numpy as np
import pytest

from lmntk.errors import KernelMismatchError, SolverError
from lmntk.solvers.leave_one_out import LeftOut, leave_one_out
from lmntk.solvers.ridge import RidgeSystem
from random_kernels import CLOSE, Case

LAMBDAS = (0.0, 0.001, 0.1, 1.0)


def refitted(case: Case, targets: np.ndarray, regularization: float, groups: np.ndarray) -> np.ndarray:
    """Predict each group by solving the others' equations with the term λ‖K‖₂ of the whole kernel."""
    kernel = case.train if case.train.ndim == 4 else case.train[0]
    flat, logits = case.flat(kernel), case.logits
    ridged = flat + regularization * np.linalg.norm(flat, 2) * np.eye(len(flat))
    predictions = np.empty_like(targets)
    for group in np.unique(groups):
        out = np.repeat(groups == group, logits)
        alpha = np.linalg.solve(ridged[~out][:, ~out], targets.reshape(-1)[~out])
        predictions[groups == group] = (ridged[~out][:, out].T @ alpha).reshape(-1, logits)
    return predictions


@pytest.mark.parametrize("regularization", LAMBDAS)
@pytest.mark.parametrize("logits", [1, 2, 6])
@pytest.mark.parametrize("f0", [False, True])
def test_each_example_is_predicted_as_by_a_fit_to_all_others(logits: int, regularization: float, f0: bool) -> None:
    case = Case(logits)
    targets = case.targets(case.train_labels) - (case.train_f0 / 10 if f0 else 0)
    found = leave_one_out(case.train, targets, regularization)
    np.testing.assert_allclose(found, refitted(case, targets, regularization, np.arange(case.n)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("regularization", LAMBDAS)
def test_an_asymmetric_kernel_leaves_examples_out_exactly_too(regularization: float) -> None:
    case = Case(1, asymmetric=True)
    targets = case.targets(case.train_labels)
    found = leave_one_out(case.train, targets, regularization)
    np.testing.assert_allclose(found, refitted(case, targets, regularization, np.arange(case.n)), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    "groups", [np.tile(np.arange(10), 2), np.array([0] * 3 + [7] * 5 + [2] * 12)], ids=["2", "3,5,12"]
)
@pytest.mark.parametrize("logits", [1, 3])
def test_the_examples_of_a_group_leave_together(logits: int, groups: np.ndarray) -> None:
    case = Case(logits)
    targets = case.targets(case.train_labels)
    found = leave_one_out(case.train, targets, 0.01, groups)
    np.testing.assert_allclose(found, refitted(case, targets, 0.01, groups), rtol=0, atol=CLOSE)


def test_several_targets_are_predicted_at_once_as_one_by_one() -> None:
    case = Case(2)
    several = np.random.default_rng(1).normal(size=(case.n, 2, 3))
    left_out = LeftOut(case.train)
    together = left_out.predict(several, 0.1)
    apart = [left_out.predict(several[..., index], 0.1) for index in range(3)]
    np.testing.assert_allclose(together, np.stack(apart, axis=2), rtol=0, atol=1e-13)


def test_a_singular_kernel_is_refused_with_a_regularization_that_would_do() -> None:
    case = Case(2)
    twice = np.tile(case.train, (2, 1, 2, 1))
    with pytest.raises(SolverError, match="take `kernel_regularization=0.001`") as error:
        leave_one_out(twice, np.tile(case.targets(case.train_labels), (2, 1)))
    assert error.value.data["regularization"] == 0


def test_a_kernel_of_zeros_has_no_leave_one_out_at_any_regularization() -> None:
    with pytest.raises(SolverError, match="all values of the kernel are 0"):
        leave_one_out(np.zeros((2, 1, 2, 1)), np.ones((2, 1)), 1.0)


@pytest.mark.parametrize(
    "kernel", [[[0.0, 1.0], [2.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]], ids=["asymmetric", "symmetric"]
)
def test_a_kernel_that_is_singular_without_an_example_is_refused_with_a_remedy_that_does(kernel: Any) -> None:
    left_out = LeftOut(np.reshape(kernel, (2, 1, 2, 1)))
    assert left_out.system.is_regular(0) and not left_out.is_defined(0)
    for ask in (
        lambda: left_out.predict(np.ones((2, 1))),
        lambda: left_out.influence(np.ones((2, 1)), np.ones((2, 1, 3, 1))),
    ):
        with pytest.raises(SolverError, match="without one of its examples .* take `kernel_regularization=0.001`"):
            ask()
    np.testing.assert_allclose(
        left_out.predict(np.array([[1.0], [3.0]]), 0.001),
        np.array([[3e3 * kernel[1][0]], [1e3 * kernel[0][1]]]) / left_out.system.norm,
    )


def test_the_regularization_that_is_named_is_checked() -> None:
    """K + λ‖K‖₂ I is singular, as a whole or without the last example, with each λ that is tried before."""
    kernel = np.diag([-0.001, -0.01, -0.1, -1.0, 0.0])
    kernel[4, 0] = kernel[0, 4] = 1e-3
    left_out = LeftOut(kernel.reshape(5, 1, 5, 1))
    assert left_out.remedy() == "take `kernel_regularization=2`"
    assert left_out.is_defined(2)


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(KernelMismatchError, match="`groups`"):
        LeftOut(Case(1).train, [0, 1])


@pytest.mark.parametrize("regularization", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 12.0])
def test_a_ridge_system_solves_as_gelsy_does(regularization: float, decay: float) -> None:
    """With decaying features the kernel is nearly singular, so that λ = 0 must be gelsy's own solution."""
    case = Case(2, features=60, decay=decay)
    flat = case.flat(case.train)
    ridged = flat + regularization * np.linalg.norm(flat, 2) * np.eye(len(flat))
    right_sides = np.random.default_rng(2).normal(size=(len(flat), 2))
    from scipy.linalg import lstsq

    wanted, _, rank, _ = lstsq(ridged, right_sides, cond=np.finfo(float).eps * len(flat), lapack_driver="gelsy")
    found, found_rank = RidgeSystem(flat).solve(regularization, right_sides)
    assert found_rank == rank
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
