"""Conjugate gradients (Hestenes and Stiefel 1952) for several shifts and right sides that share a matrix."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmntk.solvers.problem import Array

STALLED = 0.5
"""Where a restart leaves more than this part of the residual, rounding lets it become no smaller."""


class Iterated(NamedTuple):
    """What the iterations have reached.

    Attributes:
        values: The solutions, ``[n, s]``.
        residuals: ‖b − (M + μI)x‖ / ‖b‖ of each, computed from the solution and not by the recursion, ``[s]``.
        steps: The products with M.
        indefinite: Whether a direction showed that M + μI is not positive definite, ``[s]``.
    """

    values: Array
    residuals: Array
    steps: int
    indefinite: np.ndarray


def conjugate_gradients(
    product: Callable[[Array], Array],
    penalties: Array,
    right_sides: Array,
    tolerance: float,
    most_steps: int,
    on_step: Callable[[float], object] = lambda residual: None,
) -> Iterated:
    """Solve (M + μI) x = b for several pairs of μ and b: a step takes one product with M, of all of them together.

    Where the recursion has reached the tolerance, the residual is computed anew; if rounding has moved it away, the
    iterations start again from there.

    Args:
        product: Returns M V of V, ``[n, s]``.
        penalties: The μ, ``[s]``.
        right_sides: The b, ``[n, s]``.
        tolerance: The norm of a residual over that of its right side.
        most_steps: The number of products with M after which to stop.
        on_step: Called after each step with the largest relative residual, as the recursion has it.
    """
    norms = np.linalg.norm(right_sides, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    values, residuals, steps = np.zeros(right_sides.shape), right_sides.copy(), 0
    indefinite, left = np.zeros(len(norms), bool), norms / scale
    while steps < most_steps:
        wanted = (left > tolerance) & ~indefinite
        if not wanted.any():
            break
        active = np.flatnonzero(wanted)
        directions = residuals[:, active]
        squares = (directions**2).sum(axis=0)
        current, goals = directions.copy(), (tolerance * norms[active]) ** 2
        running = np.arange(len(active))
        while len(running) and steps < most_steps:
            own = active[running]
            moved = product(directions[:, running]) + penalties[own] * directions[:, running]
            steps += 1
            curvatures = (directions[:, running] * moved).sum(axis=0)
            sound = curvatures > 0
            indefinite[own[~sound]] = True
            running, own, moved, curvatures = running[sound], own[sound], moved[:, sound], curvatures[sound]
            lengths = squares[running] / curvatures
            values[:, own] += lengths * directions[:, running]
            current[:, running] -= lengths * moved
            before = squares[running]
            squares[running] = (current[:, running] ** 2).sum(axis=0)
            directions[:, running] = current[:, running] + squares[running] / before * directions[:, running]
            on_step(float(np.sqrt(squares / norms[active] ** 2).max()))
            running = running[squares[running] > goals[running]]
        residuals = right_sides - product(values) - penalties * values
        reached = np.linalg.norm(residuals, axis=0) / scale
        stalled = bool((reached[wanted] > STALLED * left[wanted]).all())
        left = reached
        if stalled:
            break
    return Iterated(values, left, steps, indefinite)
