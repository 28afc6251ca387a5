"""Ridge regression on features against least squares on the kernel that they make, which is formed here."""

import numpy as np
import pytest

from lmntk.errors import NotFiniteError, SettingError, SolverError
from lmntk.solvers import feature_ridge, fit
from lmntk.solvers.feature_ridge import FeatureRidge, factor_below, predict
from lmntk.solvers.problem import SolverSettings, targets

LAMBDAS = (0.001, 0.03, 1.0)


class InMemory:
    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def rows(self, start, stop):
        return self.values[start:stop]


def random_features(n, c, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, c, d)) * np.linspace(0.1, 2, d)


def by_kernel(train, x, classes, regularization):
    """The predictions of `lstsq` on the kernels ΦΦᵀ and ΦΦ_xᵀ."""
    kernels = [np.einsum("iad,jbd->iajb", train, other) for other in (train, x)]
    solver = fit("lstsq", kernels[0], classes, settings=SolverSettings(regularization=regularization))
    return solver.predict(kernels[1], np.zeros(len(x), int)).logits


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("dimension", [7, 60])
def test_predictions_are_those_of_least_squares_on_the_kernel_of_the_features(dimension, iterative, monkeypatch):
    for name in ("BLOCK_NUMBERS", "CACHED_NUMBERS"):  # several blocks, the last one smaller
        monkeypatch.setattr(feature_ridge, name, 500)
    train, x = random_features(23, 2, dimension), random_features(9, 2, dimension, seed=1)
    classes = np.arange(23) % 2
    ridge = FeatureRidge(InMemory(train), iterative, tolerance=1e-12)
    assert ridge.is_iterative is iterative
    assert ridge.norm == pytest.approx(np.linalg.norm(train.reshape(-1, dimension), 2) ** 2, rel=1e-12)
    weights = ridge.fit(LAMBDAS, targets(classes, 2))
    for found, regularization in zip(predict(InMemory(x), weights), LAMBDAS, strict=True):
        expected = by_kernel(train, x, classes, regularization)
        assert np.abs(found - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("dimension", [6, 60])
def test_features_of_zeros_predict_0_as_the_kernel_of_zeros_does(dimension, iterative):
    zeros = np.zeros((20, 2, dimension))
    ridge = FeatureRidge(InMemory(zeros), iterative)
    weights = ridge.fit(LAMBDAS, targets(np.arange(20) % 2, 2))
    assert ridge.norm == 0 and weights.shape == (dimension, len(LAMBDAS))
    assert not weights.any() and not by_kernel(zeros, zeros, np.arange(20) % 2, LAMBDAS[0]).any()


@pytest.mark.parametrize("iterative", [False, True])
def test_features_whose_logits_are_almost_equal_have_the_norm_of_the_kernel(iterative):
    rng = np.random.default_rng(0)
    one = rng.standard_normal((40, 20)) * np.arange(1, 21) ** -0.75
    features = np.einsum("id,ab->iabd", one, np.eye(6)).reshape(40, 6, 120) + 1e-8 * rng.standard_normal((40, 6, 120))
    wanted = np.linalg.norm(features.reshape(-1, 120), 2) ** 2
    assert FeatureRidge(InMemory(features), iterative).norm == pytest.approx(wanted, rel=1e-12)


def test_float32_features_are_added_in_float64():
    features = random_features(40, 1, 6).astype(np.float32)
    ridge = FeatureRidge(InMemory(features))
    weights = ridge.fit([0.01], np.ones((40, 1)))
    flat = features.reshape(-1, 6).astype(np.float64)
    norm = np.linalg.norm(flat, 2) ** 2
    expected = np.linalg.solve(flat.T @ flat + 0.01 * norm * np.eye(6), flat.T @ np.ones(40))
    np.testing.assert_allclose(weights[:, 0], expected, rtol=1e-10)


def test_what_is_too_large_to_be_formed_is_solved_by_conjugate_gradients(monkeypatch):
    monkeypatch.setattr(feature_ridge, "LARGEST_GRAM", 5)
    assert FeatureRidge(InMemory(random_features(8, 1, 6))).is_iterative
    assert not FeatureRidge(InMemory(random_features(8, 1, 5))).is_iterative
    assert not FeatureRidge(InMemory(random_features(5, 1, 60))).is_iterative


def test_a_matrix_beyond_the_memory_is_not_formed():
    features = InMemory(random_features(8, 1, 6))
    needed = feature_ridge.direct_bytes(features.shape)
    assert needed == 8 * (6**2 + 2 * 8 * 6)
    assert FeatureRidge(features, memory=needed - 1).is_iterative
    assert not FeatureRidge(features, memory=needed).is_iterative


def test_a_factor_takes_the_memory_below_the_diagonal_and_leaves_what_is_above(monkeypatch):
    monkeypatch.setattr(feature_ridge, "MIRRORED_ROWS", 3)
    values = random_features(9, 1, 8)[:, 0]
    exact = values.T @ values
    gram = np.asfortranarray(np.triu(exact))
    for penalty in (0.5, 2.0):
        factor = factor_below(gram, np.diag(exact) + penalty)
        assert np.shares_memory(factor, gram)
        lower = np.tril(factor)
        np.testing.assert_allclose(lower @ lower.T, exact + penalty * np.eye(8), rtol=1e-12, atol=1e-12)
        assert np.array_equal(np.triu(gram, 1), np.triu(exact, 1))
    assert factor_below(gram, np.full(8, -1.0)) is None


@pytest.mark.parametrize("iterative", [False, True])
def test_a_regularization_that_cannot_be_solved_leaves_the_others(iterative, monkeypatch):
    monkeypatch.setattr(feature_ridge, "MOST_STEPS", 3)
    # Three steps are too few for four unlike eigenvalues; two equal columns, of squares, are singular to the bit.
    features = InMemory(random_features(4, 1, 4) if iterative else np.ones((4, 1, 2)))
    ridge, wanted = FeatureRidge(features, iterative), np.arange(4.0)[:, None]
    found = ridge.fit((1e-17, 1e4), wanted)
    assert np.isnan(found[:, 0]).all() and np.isfinite(found[:, 1]).all()
    alone = FeatureRidge(features, iterative).fit((1e4,), wanted)
    np.testing.assert_allclose(found[:, 1], alone[:, 0], rtol=1e-12)
    with pytest.raises(SolverError, match="take a larger"):
        ridge.fit((1e-17,), wanted)


def test_no_regularization_and_broken_features_are_refused():
    with pytest.raises(SettingError) as refused:
        FeatureRidge(InMemory(random_features(8, 1, 6))).fit([0.0], np.ones((8, 1)))
    assert refused.value.data["setting"] == "kernel_regularization"
    for iterative in (False, True):
        with pytest.raises(NotFiniteError):
            FeatureRidge(InMemory(np.full((4, 1, 5), np.nan)), iterative)
