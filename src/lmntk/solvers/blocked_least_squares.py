"""`lstsq` with a kernel that stays in its file: Cholesky in a scratch file, or conjugate gradients."""

import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from lmntk.errors import SolverError
from lmntk.solvers.blocked import CG, CHOLESKY, Blocked
from lmntk.solvers.blocked_cholesky import BlockedCholesky, NotPositiveDefiniteError
from lmntk.solvers.conjugate_gradients import conjugate_gradients
from lmntk.solvers.problem import Array, FitInputs, Predict
from lmntk.solvers.ridge import SYMMETRIC
from lmntk.solvers.spectral_norm import spectral_norm

logger = logging.getLogger(__name__)

PANEL_NUMBERS = 2**23
"""Numbers of the kernel that are read at once, 64 MB."""

MOST_STEPS = 5000
REFINEMENTS = 2
"""Steps of iterative refinement after Cholesky; each takes a pass, and a solution with the factor."""

REFINED = 1e-12
"""Residuals that are no larger, relative to the right side, are not refined."""

LARGEST_RESIDUAL = 1e-8
"""The solution of Cholesky is refused above: the factor is that of a matrix which is singular to rounding."""

SMALL = 50
"""Up to so many rows the norm is computed in memory."""


class PanelMatrix:
    """A symmetric kernel K that is read in panels of rows, from a file that is mapped.

    Args:
        kernel: K, float64 ``[n, n]``.
    """

    def __init__(self, kernel: Array) -> None:
        self._kernel = kernel

    def __len__(self) -> int:
        """N · C, the number of rows."""
        return len(self._kernel)

    @functools.cached_property
    def largest(self) -> float:
        """The largest size of a value of K."""
        return max(float(self._kernel.max()), -float(self._kernel.min()))

    def is_symmetric(self) -> bool:
        """Return whether K is symmetric to rounding, by the rule of `lmntk.solvers.ridge.RidgeSystem`."""
        kernel = self._kernel
        step = max(1, int(PANEL_NUMBERS**0.5))
        parts = [slice(start, start + step) for start in range(0, len(kernel), step)]
        return all(
            np.abs(kernel[one, other] - kernel[other, one].T).max() <= SYMMETRIC * self.largest
            for number, one in enumerate(parts)
            for other in parts[: number + 1]
        )

    def product(self, vectors: Array) -> Array:
        """Return K V of V, ``[n, s]``, in one pass."""
        found = np.empty(vectors.shape)
        for rows in self._panels():
            found[rows] = self._kernel[rows] @ vectors
        return found

    def norm(self, progress: bool = False) -> float:
        """Return ‖K‖₂, to a relative error of about 1e-12, by `spectral_norm`, whose steps take a pass each.

        Args:
            progress: Whether to show a progress bar.
        """
        if len(self) <= SMALL:
            return float(np.linalg.norm(self._kernel, 2))
        with tqdm(desc="norm of the kernel", unit="pass", disable=not progress, leave=False) as bar:

            def on_pass(error: float) -> None:
                bar.set_postfix_str(f"error {error:.1e}", refresh=False)
                bar.update()

            return spectral_norm(self.product, len(self), on_pass)

    def shifted(self, penalty: float, rows: slice, columns: slice) -> Array:
        """Return a copy of a tile of K + μI."""
        tile = np.array(self._kernel[rows, columns])
        if rows == columns:
            tile[np.diag_indices(len(tile))] += penalty
        return tile

    def _panels(self) -> Iterator[slice]:
        step = max(1, PANEL_NUMBERS // len(self._kernel))
        return (slice(start, start + step) for start in range(0, len(self._kernel), step))


def blocked_lstsq(trains: Sequence[FitInputs]) -> list[Predict]:
    """Solve for each of some settings, which have the same `Blocked`.

    Those that cannot be solved give predictions of NaN, and a warning says why, unless it is all of them.

    Args:
        trains: The inputs of each setting, which share a kernel that is not regularised.

    Raises:
        SolverError: The kernel is not symmetric, or no system can be solved; names the largest λ, and one that may do.
        FileError: There is no room for the scratch file.
    """
    blocked = trains[0].settings.blocked
    assert blocked is not None
    matrix = PanelMatrix(trains[0].flat())
    if trains[0].directions > 1 or not matrix.is_symmetric():
        raise SolverError(
            f"`lstsq_method={blocked.method}` needs a symmetric kernel of train and train: take `lstsq_method=direct`, "
            "or another `kernel_formula`",
            solver="lstsq",
        )
    regularizations = np.array([train.settings.regularization for train in trains])
    penalties = regularizations * matrix.norm(blocked.progress) if regularizations.any() else regularizations
    right_sides = np.stack([train.flat_targets() for train in trains], axis=1)
    solve = _of_zero if matrix.largest == 0 else _by_conjugate_gradients if blocked.method == CG else _by_cholesky
    alphas, residuals, failures, metrics = solve(matrix, penalties, right_sides, blocked)
    if len(failures) == len(trains):
        index = int(regularizations.argmax())
        sentence = _refusal(failures[index], regularizations[index], blocked)
        raise SolverError(sentence, solver="lstsq", regularization=float(regularizations[index]))
    for index, failure in failures.items():
        logger.warning("%s", _refusal(failure, regularizations[index], blocked))
        alphas[:, index] = np.nan
    found: list[Predict] = []
    for index, train in enumerate(trains):
        reached = metrics | {"lstsq_residual": float(residuals[index])}
        if index not in failures:
            about = ", ".join(f"{name} = {value:.3g}" for name, value in reached.items())
            logger.info("`lstsq_method=%s`, λ = %g: %s", blocked.method, train.settings.regularization, about)
        found.append(_predicting(alphas[:, index], reached))
    return found


def _predicting(alpha: Array, metrics: dict[str, float]) -> Predict:
    return lambda x: x.regression(x.flat().T @ alpha, dict(metrics))


Solution = tuple[Array, Array, dict[int, str], dict[str, float]]
"""The α of each setting, ``[n, s]``, and its ‖y − Aα‖ / ‖y‖, ``[s]``; by setting why it has none; and metrics."""

INDEFINITE = "indefinite"


def _of_zero(matrix: PanelMatrix, penalties: Array, right_sides: Array, blocked: Blocked) -> Solution:
    """Return the minimum-norm solution of K = 0, which is 0, as the direct method does."""
    residuals = (np.abs(right_sides).max(axis=0) > 0).astype(np.float64)
    return np.zeros(right_sides.shape), residuals, {}, {"cg_steps": 0} if blocked.method == CG else {}


def _by_conjugate_gradients(matrix: PanelMatrix, penalties: Array, right_sides: Array, blocked: Blocked) -> Solution:
    with tqdm(desc="conjugate gradients", unit="step", disable=not blocked.progress, leave=False) as bar:

        def on_step(residual: float) -> None:
            bar.set_postfix_str(f"residual {residual:.1e}", refresh=False)
            bar.update()

        found = conjugate_gradients(matrix.product, penalties, right_sides, blocked.tolerance, MOST_STEPS, on_step)
    failures = {}
    for index, residual in enumerate(found.residuals):
        if found.indefinite[index]:
            failures[index] = INDEFINITE
        elif not residual <= blocked.tolerance:
            failures[index] = f"conjugate gradients reached a residual of {residual:.1e} in {found.steps} steps"
    return found.values, found.residuals, failures, {"cg_steps": found.steps}


def _by_cholesky(matrix: PanelMatrix, penalties: Array, right_sides: Array, blocked: Blocked) -> Solution:
    members = defaultdict(list)
    for index, penalty in enumerate(penalties):
        members[float(penalty)].append(index)
    alphas, residuals = np.zeros(right_sides.shape), np.full(right_sides.shape[1], np.nan)
    failures: dict[int, str] = {}
    total = len(members) * BlockedCholesky.products(len(matrix))
    with tqdm(total=total, desc="Cholesky", unit="product", disable=not blocked.progress, leave=False) as bar:
        for penalty, indices in members.items():

            def tile(rows: slice, columns: slice, penalty: float = penalty) -> Array:
                return matrix.shifted(penalty, rows, columns)

            try:
                with BlockedCholesky(tile, len(matrix), blocked.folder, bar.update) as factor:
                    found = _refined(matrix, penalty, right_sides[:, indices], factor.solve)
                    alphas[:, indices], residuals[indices] = found
            except NotPositiveDefiniteError:
                failures |= dict.fromkeys(indices, INDEFINITE)
    for unsolved in np.flatnonzero(~(residuals <= LARGEST_RESIDUAL)):
        failures.setdefault(int(unsolved), f"left a residual of {residuals[unsolved]:.1e}")
    return alphas, residuals, failures, {}


def _refined(
    matrix: PanelMatrix, penalty: float, right_sides: Array, solve: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Return the solutions α of A α = y, ``[n, s]``, and ‖y − Aα‖ / ‖y‖ of each, ``[s]``.

    A factor of a matrix that is singular to rounding exists if rounding makes its pivots positive, and its solution can
    be far off. Iterative refinement (Golub and Van Loan, section 3.5.3) adds A⁻¹ of the residual where that helps.

    Args:
        matrix: K.
        penalty: μ of A = K + μI.
        right_sides: The y.
        solve: Solves A x = b for several b by the factor.
    """
    norms = np.linalg.norm(right_sides, axis=0)
    scale = np.where(norms > 0, norms, 1.0)

    def left_by(alphas: Array) -> tuple[Array, Array]:
        left = right_sides - matrix.product(alphas) - penalty * alphas
        return left, np.linalg.norm(left, axis=0) / scale

    alphas = solve(right_sides)
    left, residuals = left_by(alphas)
    for _ in range(REFINEMENTS):
        if (residuals <= REFINED).all():
            break
        corrected = alphas + solve(left)
        corrected_left, reached = left_by(corrected)
        better = reached < residuals / 2
        if not better.any():
            break
        alphas[:, better], left[:, better] = corrected[:, better], corrected_left[:, better]
        residuals[better] = reached[better]
    return alphas, residuals


def _refusal(failure: str, regularization: float, blocked: Blocked) -> str:
    way_out = (
        f"take a larger one, such as `kernel_regularization={max(1e-6, 10 * regularization):g}`, or "
        "`lstsq_method=direct`"
    )
    if failure == INDEFINITE:
        return (
            f"the train kernel is not positive definite with `kernel_regularization={regularization:g}`, which "
            f"`lstsq_method={blocked.method}` needs: {way_out}"
        )
    if blocked.method == CHOLESKY:
        return (
            f"Cholesky {failure}, where at most {LARGEST_RESIDUAL:g} is allowed, because the train kernel is singular "
            f"to rounding with `kernel_regularization={regularization:g}`: {way_out}"
        )
    return (
        f"{failure}, short of `cg_tolerance={blocked.tolerance:g}` with `kernel_regularization={regularization:g}`: "
        "take a larger one of these, or `lstsq_method=cholesky`"
    )
