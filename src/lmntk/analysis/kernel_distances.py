"""How far a kernel has moved from another, entry by entry and as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lmntk.analysis import statistics

NEAR_ZERO = 1e-3
"""Entries below this share of the mean |B| count as near zero."""


@dataclass(frozen=True)
class KernelDistances:
    """How far a kernel A is from another, B; for an asymmetric kernel over the entries of both directions.

    Attributes:
        mean: The mean of |A − B| / |B| over the entries; infinite if an entry that is 0 in B is not 0 in A.
        median: Their median.
        near_zero: How many entries of B are near zero, below 10⁻³ of the mean |B|: they make the mean explode.
        entries: How many entries there are.
        frobenius: ‖A − B‖ / ‖B‖.
        cka: Centred kernel alignment of the kernels of the logits' differences, see `statistics.alignment`.
    """

    mean: float
    median: float
    near_zero: int
    entries: int
    frobenius: float
    cka: float


def kernel_distances(moved: ArrayLike, reference: ArrayLike) -> KernelDistances:
    """Compute how far a kernel is from another of its shape.

    The mean of |A − B| / |B| is the distance by which third-party re-implementations decide whether features are
    fixed; the other numbers do not depend on single entries near zero.

    Args:
        moved: A, [N, C, X, C] or [2, N, C, X, C].
        reference: B, of the same shape. An entry that is 0 in both kernels has not moved: its distance is 0.

    Examples:
        >>> reference = np.array([1.0, 2.0, 2.0, 4.0]).reshape(2, 1, 2, 1)
        >>> found = kernel_distances(reference * 1.5, reference)
        >>> found.mean, found.median, found.near_zero, found.frobenius
        (0.5, 0.5, 0, 0.5)
    """
    a, b = np.asarray(moved, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    change, size = np.abs(a - b), np.abs(b)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        relative = np.where(change == 0, 0.0, change / size)
    found = statistics.compare(a, b)
    return KernelDistances(
        mean=float(relative.mean()),
        median=float(np.median(relative)),
        near_zero=int((size < NEAR_ZERO * size.mean()).sum()),
        entries=size.size,
        frobenius=found.distance,
        cka=found.alignment,
    )


def mean_distances(found: Sequence[KernelDistances]) -> KernelDistances:
    """Average the distances of several kernels; the numbers of entries are summed.

    Args:
        found: The distances, at least one.

    Examples:
        >>> mean_distances([KernelDistances(1, 1, 2, 9, 0, 1), KernelDistances(3, 1, 1, 9, 1, 1)])
        KernelDistances(mean=2.0, median=1.0, near_zero=3, entries=18, frobenius=0.5, cka=1.0)
    """
    mean, median, frobenius, cka = (
        float(np.mean([getattr(one, name) for one in found])) for name in ("mean", "median", "frobenius", "cka")
    )
    near_zero, entries = (sum(getattr(one, name) for one in found) for name in ("near_zero", "entries"))
    return KernelDistances(mean, median, near_zero, entries, frobenius, cka)
