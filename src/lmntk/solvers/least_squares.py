"""Least-squares solvers on the flattened kernel: `lstsq`, and `asym` for asymmetric kernels.

Each fits one setting, or, as a family, many settings of one kernel, for which it decomposes the kernel once.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from lmntk.solvers.blocked_least_squares import blocked_lstsq
from lmntk.solvers.problem import Array, FitInputs, Predict, PredictInputs, Prediction
from lmntk.solvers.ridge import WELL_CONDITIONED, RidgeSystem, minimum_norm_solution


def lstsq(train: FitInputs) -> Predict:
    """Minimum-norm least squares on the flattened kernel.

    The driver is LAPACK's gelsy with its default cut-off, as in the published program: rank0 is the rank it finds.
    With `SolverSettings.blocked` the kernel is not held in memory, and must be positive definite.
    """
    if train.settings.blocked is not None:
        return blocked_lstsq([train])[0]
    return _regression(*minimum_norm_solution(train.flat(), train.flat_targets()))


def lstsq_family(trains: Sequence[FitInputs]) -> list[Predict]:
    """`lstsq` for several settings: one eigendecomposition serves all λ, and f₀ scalings are further right sides.

    Args:
        trains: The inputs of each setting, which share a kernel that is not regularised yet.

    Returns:
        The fitted solver of each setting.
    """
    if trains[0].settings.blocked is not None:
        return blocked_lstsq(trains)
    system = RidgeSystem(trains[0].flat())
    members = defaultdict(list)
    for index, train in enumerate(trains):
        members[train.settings.regularization].append(index)
    fitted: dict[int, Predict] = {}
    for regularization, indices in members.items():
        targets = np.stack([trains[index].flat_targets() for index in indices], axis=1)
        alphas, rank = system.solve(regularization, targets)
        fitted |= {index: _regression(alpha, rank) for index, alpha in zip(indices, alphas.T, strict=True)}
    return [fitted[index] for index in range(len(trains))]


def _regression(alpha: Array, rank: int) -> Predict:
    return lambda x: x.regression(x.flat().T @ alpha, {"rank0": rank})


def asym(train: FitInputs) -> Predict:
    """Asymmetric least-squares SVM without bias (He et al. 2022, arXiv 2202.01397).

    With H_ij = y_i K[0]_ij y_j it solves [I/γ H; Hᵀ I/γ] [α; β] = 1 and predicts λ K[0]ᵀ(α∘y) + (1-λ) K[1]ᵀ(β∘y).
    """
    y = train.flat_targets()
    return _weighed(train, *_solve_asymmetric(y[:, None] * train.flat() * y, train.settings.gamma))


def asym_family(trains: Sequence[FitInputs]) -> list[Predict]:
    """`asym` for several settings: one singular value decomposition of H serves all γ, and λ only weighs.

    With H = U S Vᵀ, a = Uᵀα and b = Vᵀβ, the system falls apart into a/γ + S b = Uᵀ1 and S a + b/γ = Vᵀ1.

    Args:
        trains: The inputs of each setting, which share a kernel that is not regularised yet.

    Returns:
        The fitted solver of each setting.
    """
    kernel = trains[0].flat()
    norm = float(np.linalg.norm(kernel, 2))
    members = defaultdict(list)
    for index, train in enumerate(trains):
        members[train.settings.regularization, train.settings.f0_scaling].append(index)
    fitted = {}
    for (regularization, _), indices in members.items():
        y = trains[indices[0]].flat_targets()
        h = y[:, None] * (kernel + regularization * norm * np.eye(len(y))) * y
        solve = functools.cache(functools.partial(_solve_decomposed, h, *np.linalg.svd(h)))
        for index in indices:
            fitted[index] = _weighed(trains[index], *solve(trains[index].settings.gamma))
    return [fitted[index] for index in range(len(trains))]


def _solve_decomposed(h: Array, left: Array, values: Array, right: Array, gamma: float) -> tuple[Array, int]:
    ridge = 1 / gamma
    determinants = (ridge - values) * (ridge + values)
    # The eigenvalues of the system are 1/γ ± S.
    if np.abs(ridge - values).min() * WELL_CONDITIONED < (ridge + values).max():
        return _solve_asymmetric(h, gamma)
    ones = left.sum(axis=0), right.sum(axis=1)
    a, b = ((ridge * ones[side] - values * ones[1 - side]) / determinants for side in (0, 1))
    return np.concatenate([left @ a, right.T @ b]), 2 * len(h)


def _solve_asymmetric(h: Array, gamma: float) -> tuple[Array, int]:
    """Return α and β, one after the other, and the rank of the system."""
    ridge = np.eye(len(h)) / gamma
    return minimum_norm_solution(np.block([[ridge, h], [h.T, ridge]]), np.ones(2 * len(h)))


def _weighed(train: FitInputs, solution: Array, rank: int) -> Predict:
    y, weight = train.flat_targets(), train.settings.lambda_
    alpha, beta = np.split(solution, 2)

    def predict(x: PredictInputs) -> Prediction:
        predictions = weight * x.flat(0).T @ (alpha * y) + (1 - weight) * x.flat(1).T @ (beta * y)
        return x.regression(predictions, {"rank0": rank})

    return predict
