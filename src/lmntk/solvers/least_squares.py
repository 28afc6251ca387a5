"""Least-squares solvers on the flattened kernel: `lstsq`, and `asym` for asymmetric kernels."""

import numpy as np
from scipy.linalg import lstsq as lstsq_of_scipy

from lmntk.solvers.problem import Array, FitInputs, Predict, PredictInputs, Prediction


def lstsq(train: FitInputs) -> Predict:
    """Minimum-norm least squares on the flattened kernel.

    The driver is LAPACK's gelsy with its default cut-off, as in the published program: rank0 is the rank it finds.
    """
    alpha, rank = _least_squares(train.flat(), train.flat_targets())
    return lambda x: x.regression(x.flat().T @ alpha, {"rank0": rank})


def asym(train: FitInputs) -> Predict:
    """Asymmetric least-squares SVM without bias (He et al. 2022, arXiv 2202.01397).

    With H_ij = y_i K[0]_ij y_j it solves [I/γ H; Hᵀ I/γ] [α; β] = 1 and predicts λ K[0]ᵀ(α∘y) + (1-λ) K[1]ᵀ(β∘y).
    """
    y = train.flat_targets()
    h = y[:, None] * train.flat() * y
    ridge = np.eye(len(y)) / train.settings.gamma
    solution, rank = _least_squares(np.block([[ridge, h], [h.T, ridge]]), np.ones(2 * len(y)))
    alpha, beta = np.split(solution, 2)
    weight = train.settings.lambda_

    def predict(x: PredictInputs) -> Prediction:
        predictions = weight * x.flat(0).T @ (alpha * y) + (1 - weight) * x.flat(1).T @ (beta * y)
        return x.regression(predictions, {"rank0": rank})

    return predict


def _least_squares(matrix: Array, right_side: Array) -> tuple[Array, int]:
    """The minimum-norm least-squares solution, and the rank found.

    Through scipy, with torch's cut-off: torch 2.13 calls gelsy with pivots that it never set (pytorch issue 187411), so
    that on singular matrices its rank and solution are whatever memory happens to hold.
    """
    cut_off = float(np.finfo(np.float64).eps) * max(matrix.shape)
    solution, _, rank, _ = lstsq_of_scipy(matrix, right_side, cond=cut_off, lapack_driver="gelsy")
    return solution, int(rank)
