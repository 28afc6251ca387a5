"""The linear datamodelling score against scipy's rank correlation, and the draw of subsets."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from lmntk.analysis.datamodelling import RankCorrelation, agreement, chance_agreement, half_subsets
from lmntk.errors import DataError


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_those_of_scipy_for_repeated_rows_and_ties(ties: bool) -> None:
    rng = np.random.default_rng(0)
    first, second = (np.round(4 * rng.normal(size=(12, 5))) if ties else rng.normal(size=(12, 5)) for _ in range(2))
    correlation = RankCorrelation(first, second)
    for rows in (np.arange(12), rng.integers(0, 12, 12)):
        expected = [spearmanr(first[rows, i], second[rows, i]).statistic for i in range(5)]
        np.testing.assert_allclose(correlation(rows), expected, rtol=0, atol=1e-12)


def test_the_score_is_the_mean_and_its_interval_holds_the_truth() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(40, 30))
    real, predicted = common + rng.normal(size=common.shape), common + rng.normal(size=common.shape)
    found = agreement(real, predicted, seed=0)
    assert found.score == pytest.approx(np.mean([spearmanr(real[:, i], predicted[:, i]).statistic for i in range(30)]))
    truth = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's correlation of normal variables that correlate by 0.5
    assert found.low < truth < found.high
    assert 0.02 < found.high - found.low < 0.2
    assert agreement(real, predicted, seed=0) != agreement(real, predicted, seed=1), "the seed draws the resamples"
    chance = chance_agreement(real, predicted, seed=0)
    assert chance.low < 0 < chance.high < found.low


def test_examples_whose_outputs_do_not_vary_are_left_out() -> None:
    real = np.random.default_rng(0).normal(size=(8, 3))
    predicted = real.copy()
    real[:, 1] = 1 + 1e-9 * real[:, 1]
    predicted[:, 2] = 0
    found = agreement(real, predicted, seed=0)
    np.testing.assert_array_equal(found.correlations, [1, np.nan, np.nan])
    assert (found.score, found.low, found.high) == (1, 1, 1)
    nothing = agreement(real[:, 1:], predicted[:, 1:], seed=0)
    assert np.isnan([nothing.score, nothing.low, nothing.high]).all()


def test_halves_have_half_of_each_class_and_more_of_them_begin_with_the_same() -> None:
    classes = np.array([0, 1, 2, 0, 0, 1, 0, 0, 1, 1])
    kept = half_subsets(classes, 20, seed=3)
    assert all(np.bincount(classes[row]).tolist() == [2, 2, 1] for row in kept)
    assert len(np.unique(kept, axis=0)) > 15
    np.testing.assert_array_equal(kept[:5], half_subsets(classes, 5, seed=3))
    assert (kept != half_subsets(classes, 20, seed=4)).any()
    with pytest.raises(DataError):
        half_subsets(np.array([0, 1]), 2, seed=0)
