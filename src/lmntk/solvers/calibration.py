"""How well class probabilities match what happens: negative log-likelihood, calibration error, reliability bins."""

from dataclasses import dataclass

import numpy as np

from lmntk.solvers.problem import Array, ClassIds

BINS = 15
"""Bins of equal width, as in Guo et al. 2017."""


@dataclass(frozen=True)
class ReliabilityBin:
    """The examples whose largest probability is in an interval.

    Attributes:
        low: The interval's lower end, which it holds only if it is 0.
        high: Its upper end, which it holds.
        count: The number of examples.
        confidence: Their mean largest probability.
        accuracy: The share of them whose most probable class is right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def negative_log_likelihood(probabilities: Array, classes: ClassIds) -> float:
    """Return the mean of −log p of the right class, in nats.

    Args:
        probabilities: ``[X, C]``; a probability that rounds to 0 counts as the smallest number of float64.
        classes: The right classes, ``[X]``.

    Examples:
        >>> round(negative_log_likelihood(np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([0, 1])), 4)
        0.3993
    """
    of_right = probabilities[np.arange(len(classes)), classes]
    return float(-np.log(np.maximum(of_right, np.finfo(float).tiny)).mean())


def reliability_bins(probabilities: Array, classes: ClassIds, bins: int = BINS) -> list[ReliabilityBin]:
    """Sort examples by their largest probability into bins of equal width; empty bins are left out.

    Args:
        probabilities: ``[X, C]``.
        classes: The right classes, ``[X]``.
        bins: How many bins divide the interval from 0 to 1.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == classes
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for place in np.unique(number):
        own = number == place
        low, high = float(place / bins), float((place + 1) / bins)
        means = float(confidence[own].mean()), float(right[own].mean())
        found.append(ReliabilityBin(low, high, int(own.sum()), *means))
    return found


def expected_calibration_error(probabilities: Array, classes: ClassIds, bins: int = BINS) -> float:
    """Return Σ |B| / X · |accuracy(B) − confidence(B)| over the bins B.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args:
        probabilities: ``[X, C]``.
        classes: The right classes, ``[X]``.
        bins: How many bins divide the interval from 0 to 1.

    Examples:
        >>> sure = np.array([[0.2, 0.8]] * 4)
        >>> round(expected_calibration_error(sure, np.array([1, 1, 1, 0])), 4)
        0.05
    """
    filled = reliability_bins(probabilities, classes, bins)
    return sum(one.count * abs(one.accuracy - one.confidence) for one in filled) / len(classes)
