"""The Gaussian process of `lstsq` against dense formulas with an explicit joint kernel, and calibration by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal, norm

from lmntk.errors import KernelMismatchError, SolverError
from lmntk.solvers.calibration import expected_calibration_error, negative_log_likelihood, reliability_bins
from lmntk.solvers.gaussian_process import GaussianProcess, class_probabilities, difference_std
from lmntk.solvers.problem import SolverSettings
from lmntk.solvers.ridge_problem import RidgeProblem

N, X = 7, 4


def joint(c: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The joint kernel of train and X examples, ``[(N + X) C, (N + X) C]``, and its three blocks."""
    gradients = np.random.default_rng(seed).standard_normal((N + X, c, 60))
    kernel = np.einsum("iap,jbp->iajb", gradients, gradients)
    train, cross, x = kernel[:N, :, :N], kernel[:N, :, N:], kernel[N:, :, N:]
    return kernel, train, cross, np.stack([x[i, :, i] for i in range(X)])


def labels_of(c: int, count: int) -> np.ndarray:
    classes = np.arange(count) % max(c, 2)
    return classes * 2.0 - 1 if c == 1 else classes


def process_of(c: int, regularization: float, with_f0: bool) -> tuple[GaussianProcess, np.ndarray, np.ndarray]:
    _, train, cross, diagonal = joint(c)
    f0 = np.random.default_rng(1).standard_normal((N, c)) if with_f0 else None
    settings = SolverSettings(regularization=regularization, f0_scaling=2.0)
    return GaussianProcess(RidgeProblem(train, labels_of(c, N), settings, f0)), cross, diagonal


@pytest.mark.parametrize("with_f0", [False, True])
@pytest.mark.parametrize("regularization", [0.0, 0.1])
@pytest.mark.parametrize("c", [1, 2, 3])
def test_mean_and_covariance_are_those_of_the_joint_gaussian(c: int, regularization: float, with_f0: bool) -> None:
    process, cross, diagonal = process_of(c, regularization, with_f0)
    problem, f0_of_x = process.problem, np.random.default_rng(2).standard_normal((X, c)) if with_f0 else None
    kernel = joint(c)[0].reshape((N + X) * c, -1)
    noise = regularization * np.linalg.norm(kernel[: N * c, : N * c], 2)
    inverse = np.linalg.inv(kernel[: N * c, : N * c] + noise * np.eye(N * c))
    y = (problem.targets - problem.offset).reshape(-1)
    scale = y @ inverse @ y / len(y)
    whole = scale * (kernel[N * c :, N * c :] - kernel[N * c :, : N * c] @ inverse @ kernel[: N * c, N * c :])
    blocks = whole.reshape(X, c, X, c)
    truth = np.stack([blocks[i, :, i] for i in range(X)])
    np.testing.assert_allclose(process.covariance(cross, diagonal), truth, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose([process.scale, process.noise], [scale, scale * noise], rtol=1e-10)
    mean = (kernel[N * c :, : N * c] @ inverse @ y).reshape(X, c) + (0 if f0_of_x is None else f0_of_x / 2)
    np.testing.assert_allclose(problem.predict(cross, labels_of(c, X), f0_of_x).logits, mean, rtol=1e-9, atol=1e-9)


def test_the_scale_makes_the_train_targets_most_likely() -> None:
    process, *_ = process_of(2, 0.1, True)
    problem = process.problem
    kernel = problem.kernel.reshape(N * 2, -1)
    matrix = kernel + 0.1 * np.linalg.norm(kernel, 2) * np.eye(N * 2)
    y = (problem.targets - problem.offset).reshape(-1)

    def unlikelihood(log_scale: float) -> float:
        return -multivariate_normal(cov=np.exp(log_scale) * matrix).logpdf(y)

    found = minimize_scalar(unlikelihood, bounds=(-20, 10), method="bounded", options={"xatol": 1e-10})
    assert np.exp(found.x) == pytest.approx(process.scale, rel=1e-5)


def test_a_train_example_without_noise_has_no_variance_left() -> None:
    process, *_ = process_of(2, 0.0, False)
    kernel = process.problem.kernel
    diagonal = np.stack([kernel[i, :, i] for i in range(N)])
    covariance = process.covariance(kernel, diagonal)
    assert np.abs(covariance).max() < 1e-9 * process.scale * np.abs(diagonal).max()
    sure = class_probabilities(process.problem.targets, np.zeros((N, 2, 2)), 0.0)
    assert sure.argmax(axis=1).tolist() == process.problem.classes.tolist()
    assert set(sure.reshape(-1)) == {0.0, 1.0}


@pytest.mark.parametrize("c", [1, 2])
def test_two_classes_have_their_probability_in_closed_form(c: int) -> None:
    process, cross, diagonal = process_of(c, 0.1, False)
    mean = process.problem.predict(cross, labels_of(c, X)).logits
    covariance = process.covariance(cross, diagonal)
    weights = np.array([1.0]) if c == 1 else np.array([-1.0, 1.0])
    variance = np.einsum("a,xab,b->x", weights, covariance + process.noise * np.eye(c), weights)
    truth = norm.cdf(mean @ weights / np.sqrt(variance))
    found = class_probabilities(mean, covariance, process.noise)
    np.testing.assert_allclose(found, np.stack([1 - truth, truth], axis=1), rtol=1e-10)
    np.testing.assert_allclose(difference_std(covariance, process.noise, 0, c - 1), np.sqrt(variance), rtol=1e-10)


def test_three_classes_have_the_share_of_seeded_draws() -> None:
    """Against the cumulative normal distribution of the differences; four standard errors of 8192 draws."""
    process, cross, diagonal = process_of(3, 0.1, False)
    mean = process.problem.predict(cross, labels_of(3, X)).logits
    covariance = process.covariance(cross, diagonal)
    found = class_probabilities(mean, covariance, process.noise)
    assert np.array_equal(found, class_probabilities(mean, covariance, process.noise))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)
    for x in range(X):
        for own in range(3):
            differences = np.delete(np.eye(3)[own] - np.eye(3), own, axis=0)
            spread = differences @ (covariance[x] + process.noise * np.eye(3)) @ differences.T
            truth = multivariate_normal(mean=-differences @ mean[x], cov=spread).cdf(np.zeros(2))
            assert found[x, own] == pytest.approx(truth, abs=4 * np.sqrt(0.25 / 8192))


def test_what_is_no_gaussian_process_is_refused() -> None:
    _, train, cross, diagonal = joint(2)
    with pytest.raises(SolverError, match="kernel_formula=sgd"):
        GaussianProcess(RidgeProblem(np.stack([train, train]), labels_of(2, N)))
    one = np.ones((N, 1, N, 1))
    with pytest.raises(SolverError, match="take `kernel_regularization="):
        GaussianProcess(RidgeProblem(one, labels_of(1, N)))
    process = GaussianProcess(RidgeProblem(train, labels_of(2, N)))
    with pytest.raises(SolverError, match="take a larger `kernel_regularization`"):
        process.covariance(cross, diagonal / 100)
    with pytest.raises(KernelMismatchError, match="has no diagonal of shape"):
        process.covariance(cross, diagonal[:2])


def test_calibration_error_and_likelihood_by_hand() -> None:
    probabilities = np.array([[0.1, 0.9], [0.8, 0.2], [0.35, 0.65], [0.5, 0.5], [0.0, 1.0]])
    classes = np.array([1, 1, 1, 0, 1])
    bins = reliability_bins(probabilities, classes, bins=10)
    assert [(round(one.high, 1), one.count, one.accuracy) for one in bins] == [
        (0.5, 1, 1.0),
        (0.7, 1, 1.0),
        (0.8, 1, 0.0),
        (0.9, 1, 1.0),
        (1.0, 1, 1.0),
    ]
    error = (0.5 + 0.35 + 0.8 + 0.1 + 0.0) / 5
    assert expected_calibration_error(probabilities, classes, bins=10) == pytest.approx(error)
    likelihood = -np.log([0.9, 0.2, 0.65, 0.5, 1.0]).mean()
    assert negative_log_likelihood(probabilities, classes) == pytest.approx(likelihood)
    assert negative_log_likelihood(np.array([[1.0, 0.0]]), np.array([1])) == pytest.approx(708.396, abs=1e-3)
