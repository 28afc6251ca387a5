"""Ridge regression on features: the predictions of `lstsq` with the kernel ΦΦᵀ, without forming that kernel.

With features Φ, ``[N · C, d]``, targets y and μ = λ‖ΦΦᵀ‖₂, the weights that minimise ‖Φw − y‖² + μ‖w‖² are

    w = (ΦᵀΦ + μI)⁻¹ Φᵀy = Φᵀ (ΦΦᵀ + μI)⁻¹ y,

so that Φ_x w is the prediction Φ_x Φᵀ α of `lstsq` (Hoerl and Kennard 1970; Saunders et al. 1998 for the dual form).
Features are read in blocks, twice at most for the direct way, and sums are float64.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from scipy.linalg.blas import dsymm, dsyrk
from scipy.linalg.lapack import dpotrf, dpotrs

from lmntk.errors import Bounds, NotFiniteError, SolverError, check_numbers
from lmntk.solvers.conjugate_gradients import conjugate_gradients
from lmntk.solvers.problem import Array
from lmntk.solvers.spectral_norm import spectral_norm

LARGEST_GRAM = 20_000
"""Up to this size a Gram matrix is formed and factored, which takes n³ / 3 multiplications for each λ."""

BLOCK_NUMBERS = 2**23
"""Numbers of a block of features in float64, 64 MB: enough for fast products of matrices."""

ROW_BLOCKS = 4
"""So many times as large are the blocks of which ΦΦᵀ is made, two at a time."""

CACHED_NUMBERS = 2**18
"""The same for products with few vectors, which read a block twice: 2 MB, within the processor's cache."""

MIRRORED_ROWS = 1024
"""Rows of a Gram matrix that are copied across its diagonal at a time."""

TOLERANCE = 1e-8
"""Conjugate gradients stop where the residual is this part of the right side."""

MOST_STEPS = 5000
RIDGE_BOUNDS = (Bounds("kernel_regularization", 0, 1e6, above=True),)


class FeatureRows(Protocol):
    """The features of the examples of a split, in memory or in a file."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, C and d."""
        ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the features of some consecutive examples, ``[n, C, d]``."""
        ...


def direct_bytes(shape: tuple[int, int, int]) -> int:
    """Return the memory that factoring takes for features of N, C and d: the Gram matrix once, and blocks of features.

    >>> round(direct_bytes((20_000, 1, 50_000)) / 2**30, 1)
    3.5
    """
    n, c, d = shape
    blocks = BLOCK_NUMBERS if d <= n * c else 2 * ROW_BLOCKS * BLOCK_NUMBERS
    return 8 * (min(d, n * c) ** 2 + min(blocks, 2 * n * c * d))


def fits_directly(shape: tuple[int, int, int], memory: float) -> bool:
    """Return whether a Gram matrix is small enough to be factored, within so many bytes."""
    n, c, d = shape
    return min(d, n * c) <= LARGEST_GRAM and direct_bytes(shape) <= memory


class FeatureRidge:
    """Ridge regression on the features of train examples, for several λ at the cost of one pass over them.

    It factors ΦᵀΦ + μI or ΦΦᵀ + μI, the smaller of the two, in place: the matrix stays in its upper triangle, and each
    λ's factor takes the lower one. Where both are large, or exceed the memory, it takes conjugate gradients on the
    first: one product with Φ and one with Φᵀ for a step, which need one pass, of all λ together.

    Args:
        features: Φ of the train examples.
        iterative: Whether to take conjugate gradients; None for what fits.
        tolerance: Of conjugate gradients: the norm of the residual over that of the right side, Φᵀy.
        memory: The bytes that factoring may take, where `iterative` is None.

    Attributes:
        norm: ‖ΦΦᵀ‖₂, by `spectral_norm`.
        is_iterative: Whether conjugate gradients are taken.

    Raises:
        NotFiniteError: Features are NaN or infinite.
    """

    def __init__(
        self,
        features: FeatureRows,
        iterative: bool | None = None,
        tolerance: float = TOLERANCE,
        memory: float = math.inf,
    ) -> None:
        n, c, d = features.shape
        self._features, self._tolerance = features, tolerance
        self._by_columns = d <= n * c
        self.is_iterative = not fits_directly(features.shape, memory) if iterative is None else iterative
        self._gram = None if self.is_iterative else _gram(features, self._by_columns)
        self._diagonal = None if self._gram is None else np.diag(self._gram).copy()
        if not np.isfinite(self._transposed(np.ones(n * c))).all():
            raise NotFiniteError("the features hold NaN or infinity: compute them again with `kernel_dtype=float64`")
        gram = self._gram
        self.norm = (
            spectral_norm(self._product, d)
            if gram is None
            else spectral_norm(lambda vectors: dsymm(1.0, gram, vectors), len(gram))
        )

    def fit(self, regularizations: Sequence[float], targets: Array) -> Array:
        """Return the weights for each λ, ``[d, number of λ]``, which are NaN where a λ cannot be solved.

        Args:
            regularizations: The λ, in units of ‖ΦΦᵀ‖₂, each above 0.
            targets: y, ``[N, C]``.

        Raises:
            SettingError: A λ is not above 0: features have fewer columns, or rows, than the system has unknowns.
            SolverError: No λ can be solved: the matrix is singular to rounding, or the tolerance is not reached.
        """
        if self.norm == 0:
            return np.zeros((self._features.shape[2], len(regularizations)))
        for number in regularizations:
            check_numbers(RIDGE_BOUNDS, {"kernel_regularization": number})
        penalties = np.asarray(regularizations, np.float64) * self.norm
        flat = np.asarray(targets, np.float64).reshape(-1)
        if self._gram is None:
            return self._iterate(penalties, self._transposed(flat))
        assert self._diagonal is not None
        right = self._transposed(flat) if self._by_columns else flat
        found = np.full((len(right), len(penalties)), np.nan)
        for place, penalty in enumerate(penalties):
            factor = factor_below(self._gram, self._diagonal + penalty)
            if factor is not None:
                found[:, place] = dpotrs(factor, right, lower=1)[0]
        _require_one(found, "the features are too alike for so small a `kernel_regularization`: take a larger one")
        return found if self._by_columns else self._transposed(found)

    def _iterate(self, penalties: Array, right: Array) -> Array:
        """Solve (ΦᵀΦ + μI) w = Φᵀy for each μ by conjugate gradients."""
        sides = np.repeat(right[:, None], len(penalties), axis=1)
        found = conjugate_gradients(self._product, penalties, sides, self._tolerance, MOST_STEPS)
        values = np.where(found.residuals <= self._tolerance, found.values, np.nan)
        _require_one(
            values,
            f"conjugate gradients did not reach the tolerance {self._tolerance:g} in {MOST_STEPS} steps: take a larger "
            "`kernel_regularization`",
        )
        return values

    def _product(self, vectors: Array) -> Array:
        """Return ΦᵀΦ v, ``[d, s]`` or ``[d]``, in one pass."""
        found = np.zeros(vectors.shape)
        for _, block in blocks_of(self._features, numbers=CACHED_NUMBERS):
            found += block.T @ (block @ vectors)
        return found

    def _transposed(self, vectors: Array) -> Array:
        """Return Φᵀv, ``[d, s]`` or ``[d]``, of v, ``[N · C, s]`` or ``[N · C]``."""
        found = np.zeros((self._features.shape[2], *vectors.shape[1:]))
        for rows, block in blocks_of(self._features, numbers=CACHED_NUMBERS):
            found += block.T @ vectors[rows]
        return found


def predict(features: FeatureRows, weights: Array) -> Array:
    """Return the predictions Φw, float64 ``[X, C]``, or ``[s, X, C]`` of weights ``[d, s]``."""
    n, c, _ = features.shape
    found = np.concatenate([block @ weights for _, block in blocks_of(features, numbers=CACHED_NUMBERS)])
    return np.ascontiguousarray(found.T).reshape(*weights.shape[1:], n, c)


def blocks_of(features: FeatureRows, first: int = 0, numbers: int | None = None) -> Iterator[tuple[slice, Array]]:
    """Yield the rows of Φ in blocks: which they are, and their values, float64 ``[rows, d]``.

    Args:
        features: The features.
        first: The example to begin with.
        numbers: How many numbers a block may have; None for `BLOCK_NUMBERS`.
    """
    n, c, d = features.shape
    size = max(1, (numbers or BLOCK_NUMBERS) // (c * d))
    for start in range(first, n, size):
        block = features.rows(start, min(start + size, n))
        yield slice(start * c, start * c + block.shape[0] * c), np.asarray(block, np.float64).reshape(-1, d)


def _gram(features: FeatureRows, by_columns: bool) -> Array:
    """Return ΦᵀΦ or ΦΦᵀ, of which the upper triangle is filled."""
    n, c, d = features.shape
    size = d if by_columns else n * c
    found = np.zeros((size, size), order="F")
    if by_columns:
        for _, block in blocks_of(features):
            found = dsyrk(1.0, block.T, beta=1.0, c=found, overwrite_c=True)
        return found
    # All rows are read again for each block: larger ones are read less often.
    large = ROW_BLOCKS * BLOCK_NUMBERS
    for rows, block in blocks_of(features, numbers=large):
        for others, other in blocks_of(features, rows.start // c, large):
            found[rows, others] = block @ other.T
    return found


def factor_below(gram: Array, diagonal: Array) -> Array | None:
    """Factor a symmetric matrix by Cholesky within its own memory, and leave what is above its diagonal as it is.

    Args:
        gram: The matrix, float64 ``[n, n]`` in Fortran's order, of which what is above the diagonal counts; the rest
            is overwritten.
        diagonal: Its diagonal, ``[n]``.

    Returns:
        The same memory, with the factor L on and below the diagonal; None if the matrix is not positive definite.
    """
    for start in range(0, len(gram), MIRRORED_ROWS):
        stop = start + MIRRORED_ROWS
        gram[stop:, start:stop] = gram[start:stop, stop:].T
        own = np.triu(gram[start:stop, start:stop], 1)
        gram[start:stop, start:stop] = own + own.T
    gram[np.diag_indices_from(gram)] = diagonal
    factor, failed_at = dpotrf(gram, lower=1, clean=0, overwrite_a=1)
    return None if failed_at else np.asarray(factor)


def _require_one(values: Array, sentence: str) -> None:
    if np.isnan(values).any(axis=0).all():
        raise SolverError(sentence, solver="ridge")
