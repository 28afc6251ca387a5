"""The Gaussian process of `lstsq`: how sure its predictions are, and class probabilities.

The targets y, ±1 or one-hot, count as observations of a function with the prior mean f₀/s and covariance σ²K, under
Gaussian noise of variance σ²λ‖K‖₂. With A = K + λ‖K‖₂ I the posterior mean is what `lstsq` predicts, and the posterior
covariance of an example x is σ²(k_xx − k_xX A⁻¹ k_Xx): Rasmussen and Williams 2006, "Gaussian Processes for Machine
Learning", equations 2.25 and 2.26. A kernel of gradients has an arbitrary scale; σ² = yᵀA⁻¹y / n, for y less the prior
mean, maximises the marginal likelihood (equation 2.30) over it. It moves no prediction.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr

from lmntk.errors import KernelMismatchError, SolverError
from lmntk.solvers.problem import Array
from lmntk.solvers.ridge_problem import RidgeProblem

DRAWS = 8192
"""Draws for the probabilities of three and more classes, whose standard error is at most 0.6 %."""
LARGEST_ROUNDING = 1e-3
"""Of the largest K(x, x): a variance below 0 by less counts as 0."""


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """What a least-squares problem says of its own predictions.

    Args:
        problem: A problem with a symmetric kernel and a regular A.

    Raises:
        SolverError: The kernel is asymmetric, or A is singular; names a λ that would do.
    """

    problem: RidgeProblem

    def __post_init__(self) -> None:
        """Check that the problem has a posterior."""
        if self.problem.kernel.ndim == 5:
            raise SolverError(
                "a Gaussian process needs a symmetric kernel, which that of asymmetric_signgd is not: take "
                "`kernel_formula=sgd` or signgd",
                solver="lstsq",
            )
        if not self.problem.is_regular:
            regularization = self.problem.settings.regularization
            raise SolverError(
                f"the train kernel is singular with `kernel_regularization={regularization:g}`, so that the variance "
                f"of its Gaussian process is not defined: {self.problem.left_out.remedy()}",
                solver="lstsq",
                regularization=regularization,
            )

    @functools.cached_property
    def scale(self) -> float:
        """σ², which makes the train targets most likely."""
        residuals = (self.problem.targets - self.problem.offset).reshape(-1, 1)
        return float((residuals * self._inverse(residuals)).sum() / len(residuals))

    @property
    def noise(self) -> float:
        """The variance of the noise, σ²λ‖K‖₂."""
        return self.scale * self.problem.settings.regularization * self.problem.left_out.system.norm

    def covariance(self, x_kernel: Array, diagonal: Array) -> Array:
        """Return the posterior covariance of the logits of each example, without the noise.

        Args:
            x_kernel: The kernel of train and X, ``[N, C, X, C]``.
            diagonal: K(x, x), ``[X, C, C]``.

        Returns:
            float64 ``[X, C, C]``, symmetric, positive semi-definite.

        Raises:
            KernelMismatchError: The shapes do not match.
            SolverError: A is so close to singular that rounding hides the variance.
        """
        n, c, x, _ = x_kernel.shape
        if diagonal.shape != (x, c, c) or (n, c) != self.problem.kernel.shape[:2]:
            raise KernelMismatchError(
                f"a kernel of shape {list(x_kernel.shape)} has no diagonal of shape {list(diagonal.shape)}",
                shapes=[x_kernel.shape, diagonal.shape],
            )
        rows = x_kernel.reshape(n * c, x * c)
        explained = np.einsum("nxa,nxb->xab", rows.reshape(-1, x, c), self._inverse(rows).reshape(-1, x, c))
        left = diagonal - explained
        values, vectors = np.linalg.eigh((left + left.transpose(0, 2, 1)) / 2)
        if values.min(initial=0.0) < -LARGEST_ROUNDING * np.abs(diagonal).max(initial=0.0):
            regularization = self.problem.settings.regularization
            raise SolverError(
                f"with `kernel_regularization={regularization:g}` the train examples seem to explain more of K(x, x) "
                "than there is, so that rounding hides the variance: take a larger `kernel_regularization`, or "
                "`kernel_dtype=float64`",
                solver="lstsq",
                regularization=regularization,
            )
        kept = np.maximum(values, 0.0)
        return self.scale * (vectors * kept[:, None, :]) @ vectors.transpose(0, 2, 1)

    def _inverse(self, right_sides: Array) -> Array:
        return self.problem.left_out.system.inverse(self.problem.settings.regularization, right_sides)[0]


def class_probabilities(logits: Array, covariance: Array, noise: float, seed: int = 0) -> Array:
    """Return the probability that each class has the largest target, under independent Gaussians of the examples.

    A single logit f₁ − f₀, or two logits, have Φ(difference / standard deviation) in closed form. For more classes it
    is the share of `DRAWS` seeded draws, with one draw more for each class, so that no probability is 0.

    Args:
        logits: The means, ``[X, C]``.
        covariance: That of the logits, ``[X, C, C]``.
        noise: The variance that each target has besides, on its own.
        seed: Of the draws.

    Returns:
        float64 ``[X, max(C, 2)]``, rows sum to 1.

    Examples:
        >>> class_probabilities(np.array([[0.0], [2.0]]), np.ones((2, 1, 1)), 0.0).round(4).tolist()
        [[0.5, 0.5], [0.0228, 0.9772]]
    """
    examples, c = logits.shape
    if c <= 2:
        difference = logits[:, -1] - (logits[:, 0] if c == 2 else 0.0)
        deviation = difference_std(covariance, noise, 0, c - 1)
        with np.errstate(over="ignore"):  # where nothing is left of the variance
            scores = difference / np.maximum(deviation, np.finfo(np.float64).tiny)
        return np.stack([ndtr(-scores), ndtr(scores)], axis=1)
    draws = np.random.default_rng(seed).standard_normal((DRAWS, c))
    values, vectors = np.linalg.eigh(covariance + noise * np.eye(c))
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    counts = np.stack(
        [
            np.bincount((mean + draws @ root.T).argmax(axis=1), minlength=c)
            for mean, root in zip(logits, roots, strict=True)
        ]
    ).reshape(examples, c)
    return (counts + 1) / (DRAWS + c)


def difference_std(covariance: Array, noise: float, first: ArrayLike, second: ArrayLike) -> Array:
    """Return the standard deviation of the difference of two logits of each example, ``[X]``.

    Args:
        covariance: That of the logits, ``[X, C, C]``; with C = 1 the logit is the difference itself.
        noise: The variance that each target has besides.
        first: The one logit, of all examples or of each, ``[X]``.
        second: The other one.
    """
    if covariance.shape[1] == 1:
        return np.sqrt(np.maximum(covariance[:, 0, 0] + noise, 0.0))
    rows, one, other = np.arange(len(covariance)), np.asarray(first, np.intp), np.asarray(second, np.intp)
    own = covariance[rows, one, one] + covariance[rows, other, other]
    both = covariance[rows, one, other] + covariance[rows, other, one]
    return np.sqrt(np.maximum(own - both + 2 * noise, 0.0))
