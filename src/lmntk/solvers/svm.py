"""Support vector machines, `svr` and `svc`, by libsvm, or by an interior-point method if libsvm does not converge.

libsvm changes two coefficients a step, which takes too many steps if a kernel is singular and has large values.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmntk.errors import SolverError
from lmntk.solvers.interior_point import BoxProgram
from lmntk.solvers.problem import (
    Array,
    FitInputs,
    Predict,
    PredictInputs,
    Prediction,
    one_hot_rows,
    signed,
    squared_error,
    targets,
)

logger = logging.getLogger(__name__)

LIBSVM_STEPS, LIBSVM_STEPS_A_SAMPLE = 100_000, 100
MOST_SAMPLES = 3000  # of the interior-point method, whose steps take n³ operations
LIBSVM_STEPS_OF_MORE_SAMPLES = 1_000_000
LIBSVM_TOLERANCE = 1e-3  # of the optimality conditions: scikit-learn's default

Values = Callable[[Array], Array]
"""A fitted machine: from the kernel of other samples and its own, [X, n], to their values, [X]."""


def svr(train: FitInputs) -> Predict:
    """Support vector regression with the flattened kernel on the flattened targets."""
    values = regression(train.flat(), train.flat_targets())
    return lambda x: x.regression(values(x.flat().T), {})


def svc(train: FitInputs) -> Predict:
    """Support vector classification; loss: squared error of the decisions, -1 or +1, against targets -1 and +1.

    A single logit is the decision itself. With more, one classifier per class separates it from the rest on the kernel
    summed over equal logits, Σ_c K[i, c, j, c]; the logits are the decision values, and the loss, a mean over examples
    and classes, takes each classifier's decision.
    """
    if train.is_flattened:
        return _flattened_svc(train)
    classes = max(2, train.num_logits)
    counts = np.bincount(train.classes, minlength=classes)
    if not counts.all():
        label = int(counts.argmin())
        raise SolverError(
            f"class {label} has no training example, but `kernel_solver=svc` needs one of each: make the k-shot data "
            "again, or take `kernel_solver=lstsq`",
            solver="svc",
            label=label,
        )
    kernel = np.einsum("icjc->ij", train.kernel)
    # With a single logit, one machine separates class 1 from class 0.
    labels = range(classes) if train.num_logits > 1 else [1]
    machines = [classification(kernel, train.classes == label) for label in labels]

    def predict(x: PredictInputs) -> Prediction:
        rows = np.einsum("icjc->ji", x.kernel[0])
        if train.num_logits == 1:
            # libsvm decides for class 1 at 0.
            decisions = np.where(machines[0](rows) >= 0, 1.0, -1.0)[:, None]
            return Prediction(decisions, squared_error(decisions, targets(x.classes, 1)), {})
        values = np.stack([values(rows) for values in machines], axis=1)
        loss = squared_error(np.where(values > 0, 1.0, -1.0), 2 * targets(x.classes, classes) - 1)
        return Prediction(values, loss, {})

    return predict


def _flattened_svc(train: FitInputs) -> Predict:
    """Support vector classification of the rows; logits: decisions, -1 or +1, of which the first largest predicts.

    The loss is the published one too: the mean squared difference between the decisions and the targets 0 and 1.
    """
    values = classification(train.flat(), one_hot_rows(train.classes, train.num_logits) == 1)

    def predict(x: PredictInputs) -> Prediction:
        # libsvm decides for class 1 at 0.
        decisions = np.where(values(x.flat().T) >= 0, 1.0, -1.0)
        loss = squared_error(decisions, targets(x.classes, train.num_logits).reshape(-1))
        return Prediction(decisions.reshape(-1, train.num_logits), loss, {})

    return predict


def regression(kernel: Array, targets: Array) -> Values:
    """Fit scikit-learn's SVR, with its C = 1 and ε = 0.1, to a kernel [n, n] and targets [n]."""
    from sklearn.svm import SVR  # importing scikit-learn takes a second, which the help need not wait for

    model = _fit_libsvm(SVR, kernel, targets)
    # Smola & Schölkopf 2004, eq. 10.
    signs = np.outer([1.0, -1.0], np.ones(len(targets)))
    return _exact(model, kernel, signs, 0.1 - signs * targets) or model.predict


def classification(kernel: Array, positive: NDArray[np.bool_]) -> Values:
    """Fit scikit-learn's SVC, with its C = 1, to a kernel [n, n] and whether samples are of the class, [n]."""
    from sklearn.svm import SVC

    model = _fit_libsvm(SVC, kernel, positive)
    signs = signed(positive)[None]
    return _exact(model, kernel, signs, -np.ones_like(signs)) or model.decision_function


def _fit_libsvm(machine: Any, kernel: Array, targets: Any) -> Any:
    """Fit by libsvm in a bounded number of steps; `fit_status_` is 0 if it found the solution."""
    from sklearn.exceptions import ConvergenceWarning

    steps = max(LIBSVM_STEPS, LIBSVM_STEPS_A_SAMPLE * len(kernel))
    if len(kernel) > MOST_SAMPLES:
        steps = LIBSVM_STEPS_OF_MORE_SAMPLES
    model = machine(kernel="precomputed", max_iter=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return model.fit(kernel, targets)
        except ValueError as error:  # coefficients that are not numbers
            raise SolverError(
                f"libsvm finds no numbers for a kernel with values up to {np.abs(kernel).max():.1e}: take "
                "`kernel_solver=lstsq`, or scale the kernel",
                solver=machine.__name__.lower(),
            ) from error


def _exact(model: Any, kernel: Array, signs: Array, linear: Array) -> Values | None:
    """The interior-point method's machine, if libsvm has not converged and it has."""
    if not model.fit_status_:
        return None
    if len(kernel) <= MOST_SAMPLES:
        solution = BoxProgram.of(kernel, signs, linear).solve()
        if solution.residual <= LIBSVM_TOLERANCE:
            logger.info(
                "libsvm did not converge in %d steps: an interior-point method solved its problem", model.max_iter
            )
            return lambda rows: rows @ solution.coefficients + solution.bias
    logger.warning(
        "libsvm did not converge in %d steps, as the kernel's values are large (up to %.1e): do not trust the "
        "predictions, take `kernel_solver=lstsq` or `kernel_solver=logistic`",
        model.max_iter,
        np.abs(kernel).max(),
    )
    return None
