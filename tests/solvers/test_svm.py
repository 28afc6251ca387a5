"""Support vector machines: libsvm's where it ends, and those of the interior-point method where it does not."""

import logging
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.svm import SVC, SVR

from lmntk.solvers import fit, svm
from lmntk.solvers.interior_point import BoxProgram, Solution
from random_kernels import PLAIN, Case

pytestmark = pytest.mark.filterwarnings("error")

LIBSVM = 1e-3  # its tolerance of the optimality conditions


def drawn(samples: int, rank: int, size: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A kernel of random features of that many dimensions, whose diagonal is about `size`, and signs."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(samples, rank))
    return features @ features.T * (size / rank), np.sign(rng.normal(size=samples))


def of_regression(kernel: np.ndarray, y: np.ndarray) -> Solution:
    signs = np.stack([np.ones(len(y)), -np.ones(len(y))])
    return BoxProgram.of(kernel, signs, 0.1 - signs * y).solve()


def of_classification(kernel: np.ndarray, y: np.ndarray) -> Solution:
    return BoxProgram.of(kernel, y[None], -np.ones((1, len(y)))).solve()


def missed_by_regression(kernel: np.ndarray, y: np.ndarray, found: Solution) -> float:
    """How far β is from the fixed point that the minimum of ½ βᵀ K β - yᵀ β + 0.1 |β|₁ in the box is, or Σ β from 0."""
    beta = found.coefficients
    down = beta + y - kernel @ beta - found.bias
    expected = np.clip(np.sign(down) * np.maximum(np.abs(down) - 0.1, 0), -1, 1)
    return max(np.abs(beta - expected).max(), abs(beta.sum()))


def missed_by_classification(kernel: np.ndarray, y: np.ndarray, found: Solution) -> float:
    alpha = y * found.coefficients
    expected = np.clip(alpha + 1 - y * (kernel @ found.coefficients + found.bias), 0, 1)
    return max(np.abs(alpha - expected).max(), abs(found.coefficients.sum()))


MACHINES = [(SVR, of_regression, missed_by_regression), (SVC, of_classification, missed_by_classification)]
machines = pytest.mark.parametrize(("libsvm", "solve", "missed"), MACHINES, ids=["svr", "svc"])


# 0.1: all at the bounds. 30 of 50: singular. The values differ by no more than libsvm's own tolerance allows.
@machines
@pytest.mark.parametrize(("rank", "size"), [(100, 1.0), (30, 1.0), (100, 0.1), (100, 50.0), (100, 1e-300)])
def test_the_interior_point_method_finds_libsvms_machine_and_holds_its_conditions(
    libsvm: type, solve: Callable, missed: Callable, rank: int, size: float
) -> None:
    kernel, y = drawn(50, rank, size)
    found = solve(kernel, y)
    assert found.residual <= 1e-8
    assert missed(kernel, y, found) <= 1e-8
    model = libsvm(kernel="precomputed").fit(kernel, y)
    values = model.predict(kernel) if libsvm is SVR else model.decision_function(kernel)
    np.testing.assert_allclose(kernel @ found.coefficients + found.bias, values, atol=LIBSVM)


# Where float64 has no more digits for sums of ±size: measured, 1e-16 of it.
@machines
@pytest.mark.parametrize(("rank", "size", "tolerance"), [(30, 1e4, 1e-8), (3, 1e6, 1e-8), (30, 1e8, 1e-6)])
def test_large_values_and_a_singular_kernel_end_at_the_minimum_which_libsvm_does_not_reach(
    libsvm: type, solve: Callable, missed: Callable, rank: int, size: float, tolerance: float
) -> None:
    kernel, y = drawn(80, rank, size)
    found = solve(kernel, y)
    assert found.residual <= tolerance
    assert missed(kernel, y, found) <= tolerance
    with pytest.warns(match="Solver terminated early"):
        model = libsvm(kernel="precomputed", max_iter=2000).fit(kernel, y)
    of_libsvm = np.zeros(80)
    of_libsvm[model.support_] = model.dual_coef_[0]
    insensitive = 0.1 if libsvm is SVR else 0.0
    ours, theirs = (
        0.5 * beta @ kernel @ beta - y @ beta + insensitive * np.abs(beta).sum()
        for beta in (found.coefficients, of_libsvm)
    )
    assert ours < theirs - 0.1 * abs(theirs)


def test_svr_with_values_of_1e4_and_rank_300_of_400_ends_in_seconds_with_the_loss_of_its_minimum(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    flat, _ = drawn(400, 300, 1e4)
    kernel, classes = flat.reshape(200, 2, 200, 2), np.arange(200) % 2
    fitted = fit("svr", kernel, classes, PLAIN)
    # libsvm has 0.092 after 100,000 steps and 0.22 after 1,000,000.
    assert fitted.predict(kernel, classes).loss == pytest.approx(0.083407, rel=1e-4)
    assert caplog.messages == ["libsvm did not converge in 100000 steps: an interior-point method solved its problem"]


@pytest.mark.parametrize("logits", [1, 2])
@pytest.mark.parametrize("solver", ["svr", "svc"])
def test_what_libsvm_leaves_to_the_interior_point_method_is_predicted_as_by_libsvm(
    solver: str, logits: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(logits, 60)
    expected = case.predict(solver)
    monkeypatch.setattr(svm, "LIBSVM_STEPS", 5)
    monkeypatch.setattr(svm, "LIBSVM_STEPS_A_SAMPLE", 0)
    found = case.predict(solver)
    assert not caplog.messages
    np.testing.assert_allclose(found.logits, expected.logits, atol=5 * LIBSVM)
    assert found.loss == pytest.approx(expected.loss, abs=5 * LIBSVM)


@pytest.mark.parametrize("solver", ["svr", "svc"])
@pytest.mark.parametrize("why", ["too many samples", "not symmetric", "not positive"])
def test_a_machine_that_neither_finds_is_libsvms_with_a_warning(
    solver: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(1, 9)
    if why == "not symmetric":
        case.train = case.train + np.triu(np.ones((20, 20)))[:, None, :, None]
    elif why == "not positive":
        case.train = case.train - np.eye(20)[:, None, :, None]
    else:
        monkeypatch.setattr(svm, "MOST_SAMPLES", 19)
    for name in ("LIBSVM_STEPS", "LIBSVM_STEPS_A_SAMPLE", "LIBSVM_STEPS_OF_MORE_SAMPLES"):
        monkeypatch.setattr(svm, name, 0 if name == "LIBSVM_STEPS_A_SAMPLE" else 5)
    found = case.predict(solver)
    assert np.isfinite(found.logits).all()
    assert caplog.messages[0].startswith("libsvm did not converge in 5 steps, as the kernel's values are large (up to ")
