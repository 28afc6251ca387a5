"""The regularised train kernel, A = K + λ‖K‖₂ I, for many λ at the cost of one decomposition of K."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lstsq as lstsq_of_scipy

from lmntk.solvers.problem import Array

Rows = NDArray[np.int64]

SYMMETRIC = 1e-12
"""The largest difference of K and Kᵀ, over the largest value of K, that counts as rounding."""

WELL_CONDITIONED = 1e5
"""Up to this condition number the eigenvectors solve A as exactly as `minimum_norm_solution` does, to about 1e-11."""


class RidgeSystem:
    """A = K + λ‖K‖₂ I of one flattened train kernel K, for any λ.

    A symmetric K is decomposed once: with K = Q diag(w) Qᵀ, A⁻¹ = Q diag(1 / (w + λ‖K‖₂)) Qᵀ for every λ. If K is not
    symmetric, as direction [0] of `asymmetric_signgd` is not, each λ takes a solution of its own.

    Args:
        kernel: K, float64 ``[n, n]``.

    Attributes:
        norm: ‖K‖₂, the largest singular value.

    Examples:
        >>> system = RidgeSystem(np.diag([1.0, 4.0]))
        >>> system.solve(0.5, np.array([[3.0], [6.0]]))[0].tolist()
        [[1.0], [1.0]]
    """

    def __init__(self, kernel: Array) -> None:
        self._kernel = kernel
        self._is_symmetric = bool(np.abs(kernel - kernel.T).max() <= SYMMETRIC * np.abs(kernel).max())
        if self._is_symmetric:
            self._values, self._vectors = np.linalg.eigh(kernel)
            self.norm = float(np.abs(self._values).max())
        else:
            self.norm = float(np.linalg.norm(kernel, 2))

    @property
    def singular_values(self) -> Array:
        """The singular values of K, ``[n]``, in no order."""
        if self._is_symmetric:
            return np.abs(self._values)
        return np.asarray(np.linalg.svd(self._kernel, compute_uv=False), dtype=np.float64)

    def solve(self, regularization: float, right_sides: Array) -> tuple[Array, int]:
        """Solve A α = y for several y: the minimum-norm least-squares solution where A is singular.

        Args:
            regularization: λ.
            right_sides: The y, ``[n, s]``.

        Returns:
            The α, ``[n, s]``, and the rank of A.
        """
        if self._is_symmetric and self.condition(regularization) <= WELL_CONDITIONED:
            shares = (self._vectors.T @ right_sides) / self._shifted(regularization)[:, None]
            return self._vectors @ shares, len(right_sides)
        return minimum_norm_solution(self._matrix(regularization), right_sides)

    def condition(self, regularization: float) -> float:
        """Return the condition number of A, infinity if A is singular."""
        sizes = (
            np.abs(self._shifted(regularization))
            if self._is_symmetric
            else np.linalg.svd(self._matrix(regularization), compute_uv=False)
        )
        return float(sizes.max() / sizes.min()) if sizes.min() > 0 else float("inf")

    def is_regular(self, regularization: float) -> bool:
        """Return whether A has full rank in float64, by the cut-off of `minimum_norm_solution`."""
        return self.condition(regularization) * _cut_off(self._kernel) < 1

    def inverse(self, regularization: float, right_sides: Array) -> tuple[Array, float]:
        """Return A⁻¹ y for several y, ``[n, s]``, and the trace of A⁻¹; A must be regular."""
        if self._is_symmetric:
            values = self._shifted(regularization)
            return self._vectors @ ((self._vectors.T @ right_sides) / values[:, None]), float((1 / values).sum())
        inverse = np.linalg.inv(self._matrix(regularization))
        return inverse @ right_sides, float(np.trace(inverse))

    def is_regular_without(self, regularization: float, groups: Rows) -> bool:
        """Return whether A is still regular without each group of rows: whether each block B_gg of B = A⁻¹ is.

        The determinant of A without g is that of A times that of B_gg. A block's smallest singular value is compared
        with ‖B‖₂, by the cut-off of `is_regular`; those of a positive definite A pass as A itself does.

        Args:
            regularization: λ, such that A is regular.
            groups: The rows of each group, integers ``[G, g]``; groups are of one size.
        """
        if self._is_symmetric and self._shifted(regularization).min() > 0:
            return True
        blocks, inverse = self._blocks(regularization, groups)
        norm = 1 / np.abs(self._shifted(regularization)).min() if inverse is None else np.linalg.norm(inverse, 2)
        smallest = np.linalg.svd(blocks, compute_uv=False).min()
        return bool(smallest > _cut_off(self._kernel) * norm)

    def gcv(self, regularization: float, right_side: Array) -> float:
        """Return n ‖(I − KᵀA⁻¹) y‖² / tr(I − KᵀA⁻¹)² for y, ``[n, 1]``; A must be regular; NaN for a trace of 0."""
        alpha, trace = self.inverse(regularization, right_side)
        if self._is_symmetric:  # I − K A⁻¹ = λ‖K‖₂ A⁻¹, whose factor cancels
            residuals, size = alpha, float(np.abs(1 / self._shifted(regularization)).sum())
        else:
            residuals, size = right_side - self._kernel.T @ alpha, float(len(alpha))
            trace = size - float(np.trace(np.linalg.solve(self._matrix(regularization).T, self._kernel)))
        if abs(trace) <= _cut_off(self._kernel) * size:
            return float("nan")
        return float(len(alpha) * (residuals**2).sum() / trace**2)

    def left_out(self, regularization: float, right_sides: Array, groups: Rows) -> Array:
        """Predict each group of rows by the solution that the other rows alone would have.

        With B = A⁻¹ and α = B y, the others' solution is α − B_{·g} B_gg⁻¹ α_g (the inverse of a bordered matrix), so
        that the prediction of group g is (Aᵀα)_g − (AᵀB)_gg B_gg⁻¹ α_g. For a symmetric A this is y_g − B_gg⁻¹ α_g.

        Args:
            regularization: λ, such that A is regular.
            right_sides: The y, ``[n, s]``.
            groups: The rows of each group, integers ``[G, g]``; groups are of one size.

        Returns:
            The predictions, ``[n, s]``; rows that no group has are NaN.
        """
        predictions = np.full(right_sides.shape, np.nan)
        corrections, alpha, inverse = self._corrections(regularization, right_sides, groups)
        if inverse is None:
            predictions[groups] = right_sides[groups] - corrections
            return predictions
        matrix, rows, columns = self._matrix(regularization), groups[:, :, None], groups[:, None, :]
        own = (matrix.T @ inverse)[rows, columns] @ corrections
        predictions[groups] = (matrix.T @ alpha)[groups] - own
        return predictions

    def influence(self, regularization: float, right_side: Array, groups: Rows, columns: Array) -> Array:
        """Return what each group of rows changes in predictions: kᵀα less kᵀ times the others' solution.

        With B and α as in `left_out` it is (kᵀB)_g B_gg⁻¹ α_g for a column k of the kernel.

        Args:
            regularization: λ, such that A is regular.
            right_side: y, ``[n]``.
            groups: The rows of each group, integers ``[G, g]``; groups are of one size.
            columns: The kernel of the rows with what is predicted, ``[n, m]``.

        Returns:
            ``[G, m]``.
        """
        corrections, _, inverse = self._corrections(regularization, right_side[:, None], groups)
        spread = self.inverse(regularization, columns)[0] if inverse is None else inverse.T @ columns
        return np.asarray(np.einsum("gr,grm->gm", corrections[:, :, 0], spread[groups], optimize=True))

    def _corrections(
        self, regularization: float, right_sides: Array, groups: Rows
    ) -> tuple[Array, Array, Array | None]:
        """Return B_gg⁻¹ α_g, ``[G, g, s]``, and α, ``[n, s]``; and B, ``[n, n]``, of a K that is not symmetric."""
        blocks, inverse = self._blocks(regularization, groups)
        alpha = self.inverse(regularization, right_sides)[0] if inverse is None else inverse @ right_sides
        return np.asarray(np.linalg.solve(blocks, alpha[groups]), dtype=np.float64), alpha, inverse

    def _blocks(self, regularization: float, groups: Rows) -> tuple[Array, Array | None]:
        """Return B_gg of each group, ``[G, g, g]``; and B, ``[n, n]``, of a K that is not symmetric."""
        if self._is_symmetric:
            vectors, values = self._vectors[groups], self._shifted(regularization)
            return np.asarray((vectors / values) @ vectors.transpose(0, 2, 1)), None
        inverse = np.asarray(np.linalg.inv(self._matrix(regularization)), dtype=np.float64)
        return inverse[groups[:, :, None], groups[:, None, :]], inverse

    def _shifted(self, regularization: float) -> Array:
        """The eigenvalues of A, for a symmetric K."""
        return self._values + regularization * self.norm

    def _matrix(self, regularization: float) -> Array:
        return self._kernel + regularization * self.norm * np.eye(len(self._kernel))


def minimum_norm_solution(matrix: Array, right_side: Array) -> tuple[Array, int]:
    """Return the minimum-norm least-squares solution, and the rank found.

    Through scipy, with torch's cut-off: torch 2.13 calls gelsy with pivots that it never set (pytorch issue 187411), so
    that on singular matrices its rank and solution are whatever memory happens to hold.

    Args:
        matrix: ``[n, n]``.
        right_side: ``[n]`` or ``[n, s]``.
    """
    solution, _, rank, _ = lstsq_of_scipy(matrix, right_side, cond=_cut_off(matrix), lapack_driver="gelsy")
    return solution, int(rank)


def _cut_off(matrix: Array) -> float:
    return float(np.finfo(np.float64).eps) * max(matrix.shape)
