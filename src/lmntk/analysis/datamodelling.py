"""How well outputs are predicted that a model has after training on subsets: the linear datamodelling score.

A model is trained again on m random subsets of the train examples. For each test example, Spearman's correlation over
the subsets of the predicted output and the real one; the score is its mean over test examples: Park et al. 2023,
"TRAK: Attributing Model Behavior at Scale"; for datamodels Ilyas et al. 2022.

Letters: E train examples, m subsets, X test examples, C logits.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata

from lmntk.errors import DataError
from lmntk.solvers.problem import Array, ClassIds

Subsets = NDArray[np.bool_]
FLAT = 1e-6
"""An output varies over the subsets if its range is more than this, over its largest value: less can be rounding."""
RESAMPLES = 1000
PERMUTATIONS = 200
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Agreement:
    """How well a kind of prediction agrees with the real outputs.

    Attributes:
        score: The mean of `correlations`; NaN if there are none.
        low: The lower end of its interval.
        high: The upper end.
        correlations: Spearman's correlation of each test example, ``[X]``; NaN for one whose outputs do not vary.
    """

    score: float
    low: float
    high: float
    correlations: Array


def half_subsets(classes: ClassIds, count: int, seed: int) -> Subsets:
    """Draw subsets with half of the train examples of each class, rounded down, but one at least.

    The first subsets of a larger count are those of a smaller one.

    Args:
        classes: The class ids of the train examples, ``[E]``.
        count: How many subsets to draw, m.
        seed: The seed of the draw.

    Returns:
        Which examples each subset keeps, ``[m, E]``.

    Raises:
        DataError: Every class has one example, so that a half is the whole.

    Examples:
        >>> half_subsets(np.array([0, 1, 0, 1]), 3, seed=0).sum(axis=1).tolist()
        [2, 2, 2]
    """
    members = [np.flatnonzero(classes == one) for one in np.unique(classes)]
    if all(len(rows) < 2 for rows in members):
        raise DataError("each class has one train example: halves need two or more of a class", classes=len(members))
    kept = np.zeros((count, len(classes)), dtype=bool)
    for index, row in enumerate(kept):
        generator = np.random.default_rng([seed, index])
        for rows in members:
            row[generator.choice(rows, max(1, len(rows) // 2), replace=False)] = True
    return kept


def varies(outputs: Array) -> NDArray[np.bool_]:
    """Return which columns of outputs ``[m, X]`` vary over the subsets, ``[X]``."""
    return np.ptp(outputs, axis=0) > FLAT * np.abs(outputs).max(axis=0)


class RankCorrelation:
    """Spearman's correlation of each pair of columns, also where rows count several times, as in the bootstrap.

    Args:
        first: ``[m, X]``.
        second: The same.

    Examples:
        >>> correlation = RankCorrelation(np.array([[1.0, 1], [2, 0], [9, 5]]), np.array([[0.0, 4], [1, 4], [2, 4]]))
        >>> correlation().tolist()
        [1.0, nan]
    """

    def __init__(self, first: Array, second: Array) -> None:
        self._count = len(first)
        self._sides = [self._places(values.T) for values in (first, second)]

    def __call__(self, rows: NDArray[np.int64] | None = None) -> Array:
        """Return the correlations of some rows, all by default, ``[X]``: NaN where a column is constant in them.

        Args:
            rows: Their numbers; a row may stand there several times.
        """
        weights = np.ones(self._count) if rows is None else np.bincount(rows, minlength=self._count).astype(np.float64)
        a, b = (self._ranks(weights, *side) for side in self._sides)
        squares = [np.einsum("xm,xm,m->x", ranks, ranks, weights) for ranks in (a, b)]
        scale = np.sqrt(squares[0] * squares[1])
        products = np.einsum("xm,xm,m->x", a, b, weights)
        found: Array = np.divide(products, scale, out=np.full(len(scale), np.nan), where=scale > 0)
        return found

    @staticmethod
    def _places(values: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each column, the rows in order; and how many rows stand before each one, and before or with it.

        The two numbers are places in an array ``[X, m + 1]`` whose rows are written one after the other.
        """
        starts = (np.arange(len(values)) * (values.shape[1] + 1))[:, None]
        before = rankdata(values, method="min", axis=1).astype(np.int64) - 1
        until = rankdata(values, method="max", axis=1).astype(np.int64)
        return np.argsort(values, axis=1, kind="stable"), starts + before, starts + until

    def _ranks(
        self, weights: Array, order: NDArray[np.int64], before: NDArray[np.int64], until: NDArray[np.int64]
    ) -> Array:
        """Return the ranks of the rows in each column, less their mean, ``[X, m]``; equal values share theirs."""
        totals = np.zeros((len(order), self._count + 1))
        np.cumsum(weights[order], axis=1, out=totals[:, 1:])
        flat = totals.reshape(-1)
        centred: Array = (flat[before] + flat[until] - weights.sum()) / 2
        return centred


def agreement(real: Array, predicted: Array, seed: int) -> Agreement:
    """Compare predicted with real outputs, with a 95 % interval by the bootstrap over subsets.

    Resamples hold subsets twice, which lowers rank correlations: the basic interval (Davison and Hinkley 1997,
    "Bootstrap Methods and their Application"), which turns the errors of the resamples around, covers the truth where
    percentiles and BCa are too low.

    Args:
        real: The real outputs, ``[m, X]``.
        predicted: The predicted ones.
        seed: The seed of the bootstrap.
    """
    used = varies(real) & varies(predicted)
    correlations = np.full(real.shape[1], np.nan)
    if not used.any():
        return Agreement(np.nan, np.nan, np.nan, correlations)
    correlation = RankCorrelation(real[:, used], predicted[:, used])
    correlations[used] = correlation()
    score = _mean(correlations)
    with warnings.catch_warnings(action="ignore", category=DegenerateDataWarning):  # NaN, with too few subsets
        found = bootstrap(
            (np.arange(len(real)),), lambda rows: _mean(correlation(rows)), n_resamples=RESAMPLES, vectorized=False,
            confidence_level=CONFIDENCE, method="basic", rng=np.random.default_rng(seed),
        )  # fmt: skip
    low, high = np.clip(found.confidence_interval, -1, 1).tolist()
    return Agreement(score, low, high, correlations)


def chance_agreement(real: Array, predicted: Array, seed: int) -> Agreement:
    """Compare real outputs with predictions for other subsets: those of `predicted` in random orders.

    Returns:
        The mean over permutations, which is near 0; the range of 95 % of them; each example's mean correlation.
    """
    used = varies(real) & varies(predicted)
    correlations = np.full(real.shape[1], np.nan)
    if not used.any():
        return Agreement(np.nan, np.nan, np.nan, correlations)
    ranks = [rankdata(outputs[:, used], axis=0) - (len(real) + 1) / 2 for outputs in (real, predicted)]
    first, second = (part / np.linalg.norm(part, axis=0) for part in ranks)
    generator = np.random.default_rng(seed)
    orders = (generator.permutation(len(real)) for _ in range(PERMUTATIONS))
    found = np.stack([(first * second[order]).sum(axis=0) for order in orders])
    scores, tail = found.mean(axis=1), (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    correlations[used] = found.mean(axis=0)
    return Agreement(float(scores.mean()), float(low), float(high), correlations)


def _mean(correlations: Array) -> float:
    """The mean of those that are numbers; NaN if none is."""
    numbers = correlations[np.isfinite(correlations)]
    return float(numbers.mean()) if len(numbers) else float("nan")
