"""‖K‖₂ of a symmetric matrix that is only there as a product with several vectors: block Lanczos iterations."""

import logging
from collections.abc import Callable

import numpy as np

from lmntk.solvers.problem import Array

logger = logging.getLogger(__name__)

WIDTH = 8
"""Vectors of a block: fewer eigenvalues than these may be close, such as those of several logits, at no more passes."""

MOST_VECTORS = 160
"""The basis starts again with its best vectors, `KEPT`, where it has more: 26 MB for a kernel of 20,000 rows."""

KEPT = 24
MOST_NUMBERS = 2**24
"""A basis of fewer vectors, but at least 48, starts again where these 128 MB are exceeded."""

TOLERANCE = 1e-12
"""The relative error of the norm, as estimated, at which the iterations stop."""

INEXACT = 1e-8
"""The estimate of the relative error above which a warning says so."""

MOST_PASSES = 300
NEGLIGIBLE = 1e-13
"""A new direction that is no larger, relative to ‖K‖₂, is rounding."""


def spectral_norm(
    product: Callable[[Array], Array], size: int, on_pass: Callable[[float], object] = lambda error: None
) -> float:
    """Return ‖K‖₂, the largest size of an eigenvalue of a symmetric K; a lower bound after `MOST_PASSES`.

    Block Lanczos with full orthogonalisation (Golub and Van Loan, section 10.3.6), restarted with the best Ritz vectors
    (Wu and Simon 2000). A Ritz value is never above ‖K‖₂. With residuals rᵢ of the m largest Ritz values θᵢ, the error
    of θ₁ is at most r₁, and about max rᵢ² / (|θ₁| − |θ_{m+1}|) (Mathias 1998). The latter holds for m < `WIDTH` only,
    because of more close eigenvalues a block finds but `WIDTH`, without a sign that there are others.

    Args:
        product: Returns K V of V, ``[n, s]`` → ``[n, s]``.
        size: n.
        on_pass: Called after each product with the relative error, as estimated.
    """
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((size, min(WIDTH, size))))[0]
    projected = np.zeros((0, 0))  # of the vectors of the basis that K has been multiplied with
    most = max(2 * KEPT, min(MOST_VECTORS, MOST_NUMBERS // size))
    scale, norm, error = 0.0, 0.0, 0.0
    for _ in range(MOST_PASSES):
        old = len(projected)
        block = product(basis[:, old:])
        scale = scale or float(np.abs(block).max())
        if scale == 0:
            return 0.0
        block /= scale
        coefficients = basis.T @ block
        projected = _bordered(projected, coefficients)
        values, vectors = np.linalg.eigh(projected)
        order = np.argsort(-np.abs(values))
        values, vectors = values[order], vectors[:, order]
        norm = float(np.abs(values[0]))
        block -= basis @ coefficients
        block -= basis @ (basis.T @ block)
        directions, sizes, weights = np.linalg.svd(block, full_matrices=False)
        count = int((sizes > NEGLIGIBLE * norm).sum())
        residuals = np.linalg.norm((sizes[:, None] * weights) @ vectors[old:], axis=0)
        error = _error(np.abs(values), residuals) / norm
        on_pass(error)
        if error <= TOLERANCE or not count:
            break
        if basis.shape[1] + count > most:
            basis = basis @ vectors[:, :KEPT]
            projected = np.diag(values[:KEPT])
        fresh = directions[:, :count]
        fresh -= basis @ (basis.T @ fresh)
        basis = np.hstack([basis, np.linalg.qr(fresh)[0]])
    if error > INEXACT:
        logger.warning("the norm of the train kernel is exact to about %.0e: so is λ‖K‖", error)
    return scale * norm


def _bordered(projected: Array, coefficients: Array) -> Array:
    """Return QᵀKQ, of which all columns but the last ones, `coefficients`, are known."""
    old = len(projected)
    found = np.empty((len(coefficients), len(coefficients)))
    found[:old, :old] = projected
    found[:, old:], found[old:, :old] = coefficients, coefficients[:old].T
    return (found + found.T) / 2


def _error(sizes: Array, residuals: Array) -> float:
    """Return how far the largest Ritz value may be from an eigenvalue.

    Args:
        sizes: |θ| of the Ritz values, in descending order.
        residuals: ‖K q − θ q‖ of their vectors.
    """
    some = min(WIDTH, len(sizes)) - 1
    largest, gaps = np.maximum.accumulate(residuals[:some]), sizes[0] - sizes[1 : some + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        of_clusters = np.where(gaps > 0, largest**2 / gaps, np.inf)
    return float(min(residuals[0], of_clusters.min(initial=np.inf)))
