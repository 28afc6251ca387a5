"""Logistic regression with the weights at which L-BFGS stops, possibly short of the minimum.

The published program takes them. `fit_two_rows` repeats what scikit-learn 1.4 did with two classes under
``LogisticRegressionCV(multi_class="multinomial")``: it gave both classes a row of weights, w₀ = −w₁, penalised both,
and returned w₁, which is half of the weights of the log-odds. So w₁ is half of a binary fit with twice the C. Because
L-BFGS ends up to some percent away from the minimum, it has to go the same way, in both rows, to end at the same
weights.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from lmntk.solvers.cross_validation import cross_validated
from lmntk.solvers.problem import Array, ClassIds

CS = np.logspace(-4, 4, 10)
TOLERANCE = 1e-4
MAX_ITERATIONS = 5000


def fit_rows(features: Array, classes: ClassIds, folds: int, fit_intercept: bool = True) -> tuple[Array, Array]:
    """Fit by scikit-learn; arguments and result are those of `lmntk.solvers.logistic.fit_rows`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may stop before it converges, on purpose
        model = cross_validated(folds, max_iter=10000, fit_intercept=fit_intercept).fit(features, classes)
    return model.coef_, np.broadcast_to(model.intercept_, len(model.coef_)).copy()


def fit_two_rows(features: Array, classes: ClassIds, folds: int, fit_intercept: bool = True) -> tuple[Array, Array]:
    """Fit two rows of weights with the C that predicts best in cross-validation, and return the second.

    Args:
        features: ``[N, F]``.
        classes: 0 or 1, ``[N]``.
        folds: The number of stratified folds, in the order of the examples.
        fit_intercept: Whether scores have a constant, which is not penalised.

    Returns:
        w₁, ``[1, F]``, and its intercept, ``[1]``: softmax of (−w₁ᵀx, w₁ᵀx) are the probabilities.
    """
    from sklearn.model_selection import StratifiedKFold  # here, since it takes a second that --help need not wait

    paths, accuracies = [], []
    for train, test in StratifiedKFold(folds).split(features, classes):
        path = _path(features[train], classes[train], CS, np.zeros((2, features.shape[1] + 1)), fit_intercept)
        paths.append(path)
        accuracies.append([np.mean(_scores(rows, features[test]).argmax(axis=1) == classes[test]) for rows in path])
    best = int(np.sum(accuracies, axis=0).argmax())
    start = np.mean([path[best] for path in paths], axis=0)
    rows = _path(features, classes, CS[best : best + 1], start, fit_intercept)[0]
    return rows[1:, :-1], rows[1:, -1]


def _path(
    features: Array, classes: ClassIds, cs: Sequence[float] | Array, start: Array, fit_intercept: bool
) -> list[Array]:
    """The rows ``[2, F + 1]``, intercepts last, for one C after the other, each fit starting where the last ended."""
    targets = np.eye(2)[classes]
    found = []
    for c in cs:
        strength = 1 / (c * len(features))

        def objective(flat: Array, strength: float = strength) -> tuple[float, Array]:
            rows = flat.reshape(2, -1, order="F")
            log_probabilities = log_softmax(_scores(rows, features), axis=1)
            weights = rows[:, :-1]
            loss = -np.mean((targets * log_probabilities).sum(axis=1)) + strength / 2 * (weights**2).sum()
            errors = (np.exp(log_probabilities) - targets) / len(features)
            intercepts = errors.sum(axis=0) * fit_intercept
            gradient = np.concatenate([errors.T @ features + strength * weights, intercepts[:, None]], axis=1)
            return float(loss), gradient.ravel(order="F")

        options = {"maxiter": MAX_ITERATIONS, "maxls": 50, "gtol": TOLERANCE, "ftol": 64 * np.finfo(float).eps}
        solution = minimize(objective, start.ravel(order="F"), method="L-BFGS-B", jac=True, options=options)
        start = solution.x.reshape(2, -1, order="F")
        found.append(start)
    return found


def _scores(rows: Array, features: Array) -> Array:
    return features @ rows[:, :-1].T + rows[:, -1]
