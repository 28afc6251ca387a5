"""The norm of a kernel by block Lanczos iterations, against all its eigenvalues."""

import logging
from collections.abc import Callable

import numpy as np
import pytest

from lmntk.solvers import spectral_norm as module
from lmntk.solvers.spectral_norm import spectral_norm

Kernel = Callable[[np.random.Generator], np.ndarray]


def with_eigenvalues(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    basis = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    found = (basis * values) @ basis.T
    return (found + found.T) / 2


def cluster(count: int, gap: float) -> Kernel:
    """`count` eigenvalues near 1, so far from each other, and decaying ones."""
    values = np.concatenate([1 - gap * np.arange(count), 0.1 * np.arange(1, 301.0 - count) ** -1.5])
    return lambda rng: with_eigenvalues(rng, values)


def wishart(samples: int) -> Kernel:
    def kernel(rng: np.random.Generator) -> np.ndarray:
        features = rng.standard_normal((400, samples))
        return features @ features.T

    return kernel


def equal_logits(logits: int, noise: float) -> Kernel:
    """G ⊗ I with noise, of the size `noise` of its largest value."""

    def kernel(rng: np.random.Generator) -> np.ndarray:
        features = rng.standard_normal((40, 64)) * np.arange(1, 65) ** -0.75
        whole = np.kron(features @ features.T, np.eye(logits))
        rows = rng.standard_normal(whole.shape)
        return whole + noise * np.abs(whole).max() * (rows + rows.T) / np.sqrt(4 * len(whole))

    return kernel


def near_identity(noise: float) -> Kernel:
    def kernel(rng: np.random.Generator) -> np.ndarray:
        rows = rng.standard_normal((300, 300))
        return np.eye(300) + noise * (rows + rows.T)

    return kernel


def low_rank(rank: int) -> Kernel:
    def kernel(rng: np.random.Generator) -> np.ndarray:
        features = rng.standard_normal((100, rank))
        return features @ features.T

    return kernel


CASES: dict[str, tuple[Kernel, int]] = {
    **{f"{n} within {n * gap:g}": (cluster(n, gap), 15) for n in (2, 8, 20) for gap in (0.0, 1e-12, 1e-8, 1e-4)},
    **{f"{n} logits, noise {e:g}": (equal_logits(n, e), 30) for n in (2, 6, 8, 23) for e in (0.0, 1e-8)},
    "random features": (wishart(200), 40),
    "many random features": (wishart(2000), 40),
    "identity": (near_identity(0.0), 1),
    "nearly the identity": (near_identity(1e-8), 40),
    "rank 1": (low_rank(1), 3),
    "rank 11": (low_rank(11), 3),
    "negative": (lambda rng: -wishart(800)(rng), 40),
    "as many of both signs": (lambda rng: with_eigenvalues(rng, np.arange(-50.0, 51)), 20),
    "evenly spread": (lambda rng: np.diag(np.linspace(0, 1, 800)), 80),
    "very small": (lambda rng: 1e-200 * wishart(200)(rng), 40),
    "very large": (lambda rng: 1e100 * wishart(200)(rng), 40),
}
"""Kernels, and how many passes are enough; 15 of them are those of 8-fold blocks that see more than 8 close values."""


@pytest.mark.parametrize("case", CASES)
def test_the_norm_is_that_of_the_direct_method(case: str) -> None:
    kernel, enough = CASES[case][0](np.random.default_rng(0)), CASES[case][1]
    errors: list[float] = []
    norm = spectral_norm(lambda vectors: kernel @ vectors, len(kernel), errors.append)
    assert norm == pytest.approx(np.linalg.norm(kernel, 2), rel=2e-12)
    assert len(errors) <= enough
    assert errors[-1] <= module.TOLERANCE


def test_the_norm_of_zeros_is_0_after_one_pass() -> None:
    products: list[int] = []

    def product(vectors: np.ndarray) -> np.ndarray:
        products.append(vectors.shape[1])
        return np.zeros_like(vectors)

    assert spectral_norm(product, 70) == 0
    assert products == [module.WIDTH]


def test_a_basis_that_starts_again_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = wishart(800)(np.random.default_rng(0))
    monkeypatch.setattr(module, "MOST_NUMBERS", 48 * 400)
    passes: list[float] = []
    norm = spectral_norm(lambda vectors: kernel @ vectors, len(kernel), passes.append)
    assert norm == pytest.approx(np.linalg.norm(kernel, 2), rel=2e-12)
    assert len(passes) > 48 / module.WIDTH, "it has started again"


def test_a_norm_that_takes_too_many_passes_is_a_lower_bound_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = np.diag(np.linspace(0, 1, 800))
    monkeypatch.setattr(module, "MOST_PASSES", 10)
    with caplog.at_level(logging.WARNING):
        norm = spectral_norm(lambda vectors: kernel @ vectors, 800)
    assert 0.99 < norm < 1
    assert caplog.messages == [text for text in caplog.messages if "the norm of the train kernel is exact to" in text]
    assert len(caplog.messages) == 1
