"""Cholesky factors of a matrix that is read in tiles, kept in a scratch file."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from lmntk.errors import FileError
from lmntk.solvers.problem import Array

TILE = 2000
"""The rows and columns of a tile, 32 MB: about five are in memory at once."""

Shifted = Callable[[slice, slice], Array]
"""Returns a copy of a tile of the matrix, whose rows are not above its columns."""


class NotPositiveDefiniteError(ArithmeticError):
    """A matrix has no Cholesky factor, to rounding."""


class BlockedCholesky:
    """A = L Lᵀ of a symmetric matrix, tile by tile from the left: L_ik = (A_ik − Σ_j L_ij L_kjᵀ) L_kk⁻ᵀ, j < k.

    Golub and Van Loan, Matrix Computations, section 4.2.9. The scratch file has no name: it is gone when the process
    ends, however it ends.

    Args:
        tile: Returns tiles of A.
        size: n, the number of its rows.
        folder: Where the scratch file may be, which takes 4 n² bytes and a few tiles.
        on_tile: Called after each tile of L with the number of products of tiles that it took.

    Raises:
        NotPositiveDefiniteError: A is not positive definite.
        FileError: The folder has too little room.
    """

    def __init__(self, tile: Shifted, size: int, folder: Path, on_tile: Callable[[int], object]) -> None:
        self._edges = [slice(start, min(start + TILE, size)) for start in range(0, size, TILE)]
        self._folder = folder
        with self._told():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed in __exit__)
        try:
            for k, columns in enumerate(self._edges):
                for i in range(k, len(self._edges)):
                    values = tile(self._edges[i], columns)
                    for j in range(k):
                        values -= self._read(i, j) @ self._read(k, j).T
                    self._write(i, k, self._finished(values, i, k))
                    on_tile(k + 1)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "BlockedCholesky":
        """Keep the scratch file until the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the scratch file."""
        self._file.close()

    @staticmethod
    def products(size: int) -> int:
        """Return how many products of tiles a matrix of `size` rows takes, the sum of what `on_tile` gets."""
        tiles = -(-size // TILE)
        return sum((k + 1) * (tiles - k) for k in range(tiles))

    def solve(self, right_sides: Array) -> Array:
        """Solve A x = b for several b, ``[n, s]``."""
        found = right_sides.copy()
        for i, rows in enumerate(self._edges):
            for j in range(i):
                found[rows] -= self._read(i, j) @ found[self._edges[j]]
            found[rows] = solve_triangular(self._read(i, i), found[rows], lower=True, check_finite=False)
        for i, rows in reversed(list(enumerate(self._edges))):
            for j in range(i + 1, len(self._edges)):
                found[rows] -= self._read(j, i).T @ found[self._edges[j]]
            found[rows] = solve_triangular(self._read(i, i), found[rows], lower=True, trans="T", check_finite=False)
        return found

    def _finished(self, values: Array, i: int, k: int) -> Array:
        if i > k:
            return np.asarray(solve_triangular(self._read(k, k), values.T, lower=True, check_finite=False).T)
        try:
            return np.asarray(cholesky(values, lower=True, check_finite=False))
        except LinAlgError as error:
            raise NotPositiveDefiniteError from error

    def _place(self, i: int, k: int) -> tuple[int, tuple[int, int]]:
        """Return where a tile begins in the file, and its shape."""
        rows, columns = self._edges[i], self._edges[k]
        return 8 * TILE**2 * (i * (i + 1) // 2 + k), (rows.stop - rows.start, columns.stop - columns.start)

    def _read(self, i: int, k: int) -> NDArray[np.float64]:
        start, shape = self._place(i, k)
        return np.memmap(self._file, np.float64, "r", start, shape)

    def _write(self, i: int, k: int, values: Array) -> None:
        start, _ = self._place(i, k)
        left = np.ascontiguousarray(values).data.cast("B")
        with self._told():
            while left:
                done = os.pwrite(self._file.fileno(), left, start)
                left, start = left[done:], start + done

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what the file system reports into a sentence."""
        try:
            yield
        except OSError as error:
            size = 4 * TILE**2 * len(self._edges) * (len(self._edges) + 1) / 2**30
            raise FileError(
                f"{self._folder} cannot hold the {size:.1f} GB of a Cholesky factor ({error.strerror}): make room, or "
                "take `lstsq_method=cg`, which needs none",
                path=self._folder,
            ) from error
