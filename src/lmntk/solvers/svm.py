"""Support vector machines of a precomputed kernel: libsvm's, or an interior-point method's where libsvm does not end.

libsvm changes two coefficients a step: where a kernel is singular and has large values, that takes too many steps.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmntk.errors import UsageError
from lmntk.solvers.interior_point import BoxProgram
from lmntk.solvers.problem import Array

logger = logging.getLogger(__name__)

LIBSVM_STEPS, LIBSVM_STEPS_A_SAMPLE = 100_000, 100
MOST_SAMPLES = 3000  # of the interior-point method, whose steps take n³ operations
LIBSVM_STEPS_OF_MORE_SAMPLES = 1_000_000
LIBSVM_TOLERANCE = 1e-3  # of the optimality conditions: scikit-learn's default

Values = Callable[[Array], Array]
"""A fitted machine: from the kernel of other samples and its own, [X, n], to their values, [X]."""


def regression(kernel: Array, targets: Array) -> Values:
    """Fit scikit-learn's SVR, with its C = 1 and ε = 0.1, to a kernel [n, n] and targets [n]."""
    from sklearn.svm import SVR  # here, as all of scikit-learn, since it takes a second that --help need not wait

    model = _fit_libsvm(SVR, kernel, targets)
    # Smola & Schölkopf 2004, eq. 10.
    signs = np.outer([1.0, -1.0], np.ones(len(targets)))
    return _exact(model, kernel, signs, 0.1 - signs * targets) or model.predict


def classification(kernel: Array, positive: NDArray[np.bool_]) -> Values:
    """Fit scikit-learn's SVC, with its C = 1, to a kernel [n, n] and whether samples are of the class, [n]."""
    from sklearn.svm import SVC

    model = _fit_libsvm(SVC, kernel, positive)
    signs = np.where(positive, 1.0, -1.0)[None]
    return _exact(model, kernel, signs, -np.ones_like(signs)) or model.decision_function


def _fit_libsvm(machine: Any, kernel: Array, targets: Any) -> Any:
    """What libsvm finds in a bounded number of steps; its `fit_status_` tells whether that is the solution."""
    from sklearn.exceptions import ConvergenceWarning

    steps = max(LIBSVM_STEPS, LIBSVM_STEPS_A_SAMPLE * len(kernel))
    if len(kernel) > MOST_SAMPLES:
        steps = LIBSVM_STEPS_OF_MORE_SAMPLES
    model = machine(kernel="precomputed", max_iter=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            return model.fit(kernel, targets)
        except ValueError as error:  # coefficients that are no numbers
            raise UsageError(
                f"libsvm finds no numbers for a kernel with values up to {np.abs(kernel).max():.1e}: take "
                "--kernel_solver lstsq, or scale the kernel"
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
        "predictions, take --kernel_solver lstsq or logistic",
        *(model.max_iter, np.abs(kernel).max()),
    )
    return None
