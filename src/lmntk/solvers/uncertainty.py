"""How sure the predictions of a split are by the Gaussian process of `lstsq`, and how well that matches the labels."""

import functools
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from lmntk.solvers.calibration import (
    ReliabilityBin,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)
from lmntk.solvers.gaussian_process import GaussianProcess, class_probabilities, difference_std
from lmntk.solvers.problem import Array, ClassIds, margins, predicted_classes


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """The predictions of a split, their covariance and their class probabilities.

    Attributes:
        logits: The predictions, which are the posterior mean, float64 ``[X, C]``.
        covariance: The posterior covariance of the logits without the noise, ``[X, C, C]``.
        classes: The right classes, ``[X]``.
        scale: σ² of the process.
        noise: The variance of the noise that each target has besides.
    """

    logits: Array
    covariance: Array
    classes: ClassIds
    scale: float
    noise: float

    @functools.cached_property
    def predicted(self) -> ClassIds:
        """The predicted classes, ``[X]``, from the logits as in every other table."""
        return predicted_classes(self.logits)

    @functools.cached_property
    def runners_up(self) -> ClassIds:
        """The class of the largest other logit of each example, ``[X]``."""
        if self.logits.shape[1] == 1:
            return 1 - self.predicted
        others = self.logits.copy()
        others[np.arange(len(others)), self.predicted] = -np.inf
        return np.argmax(others, axis=1)

    @functools.cached_property
    def margins(self) -> Array:
        """How far the logit of the predicted class is above the largest other one, ``[X]``; the size of a single one.

        A single logit is a difference already.
        """
        return margins(self.logits, self.predicted)

    @functools.cached_property
    def margin_std(self) -> Array:
        """The standard deviation of `margins`, without the noise, ``[X]``."""
        return difference_std(self.covariance, 0.0, self.predicted, self.runners_up)

    @functools.cached_property
    def probabilities(self) -> Array:
        """The probability of each class, ``[X, max(C, 2)]``; see `class_probabilities`."""
        return class_probabilities(self.logits, self.covariance, self.noise)

    @property
    def nll(self) -> float:
        """The negative log-likelihood of the right classes, a mean in nats."""
        return negative_log_likelihood(self.probabilities, self.classes)

    @property
    def ece(self) -> float:
        """The expected calibration error of `probabilities`, from 0 to 1."""
        return expected_calibration_error(self.probabilities, self.classes)

    @property
    def bins(self) -> list[ReliabilityBin]:
        """The examples by the probability of their most probable class."""
        return reliability_bins(self.probabilities, self.classes)


def split_uncertainty(
    process: GaussianProcess, kernel: Array, diagonal: Array, logits: Array, classes: ClassIds
) -> Uncertainty:
    """Compute how sure the predictions of a split are.

    Args:
        process: The Gaussian process of the train examples.
        kernel: The kernel of train and X, ``[N, C, X, C]``.
        diagonal: K(x, x), ``[X, C, C]``.
        logits: The predictions, ``[X, C]``.
        classes: The right classes, ``[X]``.

    Raises:
        KernelMismatchError: The shapes do not match.
        SolverError: A is so close to singular that rounding hides the variance.
    """
    with threadpool_limits(limits=1):  # so that the bits do not depend on the number of cores
        covariance = process.covariance(kernel, diagonal)
        return Uncertainty(logits, covariance, classes, process.scale, process.noise)
