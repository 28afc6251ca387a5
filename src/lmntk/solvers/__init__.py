"""From a kernel and the training targets to predictions.

Nothing here knows a model, a task or a file. `fit` is the only call; its result predicts any number of splits.
`SOLVERS` lists the solvers and their requirements, `lmntk.solvers.problem` their inputs.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from lmntk.errors import NotFiniteError, SolverError, UnknownNameError, suggest
from lmntk.solvers.problem import (
    Array,
    FitInputs,
    Predict,
    Prediction,
    SolverSettings,
    check_fit_inputs,
    train_directions,
    validate_predict_inputs,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solver:
    """A solver and its requirements.

    Attributes:
        function: The function that fits the solver, with its module in this folder: ``"svm.svr"``.
        summary: A few words for help texts.
        family: The function that fits it with many settings at once, from inputs whose kernel is not regularised yet,
            where that costs less than fitting each.
        needs_binary: Works with a single logit only: `binary_classification`.
        needs_asymmetric: Works with an asymmetric kernel only.
        allows_f0: Can start from the untrained model's logits: `adjust_for_init`.
    """

    function: str
    summary: str
    family: str = ""
    needs_binary: bool = False
    needs_asymmetric: bool = False
    allows_f0: bool = False

    def fit(self, train: FitInputs) -> Predict:
        """Fit the solver, whose module is imported now: scipy and scikit-learn take a second to load."""
        fit: Callable[[FitInputs], Predict] = _imported(self.function)
        return fit(train)

    def fit_family(self, trains: Sequence[FitInputs]) -> list[Predict]:
        """Fit the solver with many settings of one kernel."""
        fit: Callable[[Sequence[FitInputs]], list[Predict]] = _imported(self.family)
        return fit(trains)


def _imported(function: str) -> Any:
    module, name = function.split(".")
    return getattr(import_module(f"lmntk.solvers.{module}"), name)


SOLVERS: dict[str, Solver] = {
    "lstsq": Solver(
        "least_squares.lstsq", "minimum-norm least squares", "least_squares.lstsq_family", allows_f0=True
    ),
    "logistic": Solver("logistic.logistic", "cross-validated logistic regression on the kernel's rows"),
    "svr": Solver("svm.svr", "support vector regression", allows_f0=True),
    "svc": Solver("svm.svc", "support vector classification, one versus the rest"),
    "asym": Solver(
        "least_squares.asym", "asymmetric least-squares SVM", "least_squares.asym_family",
        needs_binary=True, needs_asymmetric=True, allows_f0=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FittedSolver:
    """A solver fitted to the training examples; `fit` makes it.

    Attributes:
        solve: The predicting function of the solver.
        train: The inputs it was fitted to, `without_kernel`: one solver for each layer would keep as many kernels.
        adjusted: Whether it was fitted with the untrained model's logits, which `predict` then needs too.
    """

    solve: Predict
    train: FitInputs
    adjusted: bool

    def predict(
        self, x_kernel: ArrayLike, x_labels: ArrayLike, x_f0: ArrayLike | None = None, x_split: str = "X"
    ) -> Prediction:
        """Predict the X examples from the kernel between the training examples and them.

        Args:
            x_kernel: [N, C, X, C] or [2, N, C, X, C], like the train kernel.
            x_labels: [X], class ids, or -1 and +1 when C = 1; only the loss depends on them.
            x_f0: [X, C], logits of the untrained model, if `fit` got those of the training examples.
            x_split: The name of the X examples in errors: ``"dev"``, ``"test"``.

        Returns:
            Logits [X, C] in float64, the loss and further metrics.

        Raises:
            KernelMismatchError: Arrays that do not match each other.
            NotFiniteError: NaN or infinity in the kernel or in the predictions.
            ValueError: `fit` got f0 and `x_f0` is missing, or the reverse.
        """
        if (x_f0 is not None) != self.adjusted:
            raise ValueError("train_f0 and x_f0 go together")
        with threadpool_limits(limits=1), np.errstate(over="ignore", invalid="ignore"):
            found = self.solve(validate_predict_inputs(self.train, x_kernel, x_labels, x_f0, x_split))
        if not (np.isfinite(found.logits).all() and np.isfinite(found.loss)):
            raise NotFiniteError(
                f"the predictions for {x_split} are too large for float64: the values of its kernel and of the train "
                "kernel, or `kernel_regularization`, `kernel_gamma` and `f0_scaling`, are too far apart",
                split=x_split,
            )
        return found


def fit(
    solver: str,
    train_kernel: ArrayLike,
    train_labels: ArrayLike,
    settings: SolverSettings,
    train_f0: ArrayLike | None = None,
) -> FittedSolver:
    """Fit a solver to the kernel of the training examples.

    Args:
        solver: A key of `SOLVERS`.
        train_kernel: [N, C, N, C] or [2, N, C, N, C].
        train_labels: [N], class ids, or -1 and +1 when C = 1.
        settings: The settings of the solver.
        train_f0: [N, C], logits of the untrained model for `adjust_for_init`.

    Raises:
        UnknownNameError: There is no such solver.
        SolverError: The solver cannot work with this kernel, or has too few training examples of a class.
        KernelMismatchError: Arrays that do not match each other.
        NotFiniteError: NaN or infinity in the kernel.

    >>> fitted = fit("lstsq", np.eye(2).reshape(2, 1, 2, 1), [-1, 1], SolverSettings())
    >>> fitted.predict(np.array([0.5, 1.5]).reshape(2, 1, 1, 1), [1]).logits
    array([[1.]])
    """
    kernel = checked_kernel(solver, train_kernel, f0=train_f0 is not None)
    import_module("scipy.linalg")  # the limit holds for libraries that are loaded by then
    with limited_threads(settings):
        train = check_fit_inputs(kernel, train_labels, train_f0, settings).regularised()
        fitted = FittedSolver(SOLVERS[solver].fit(train), train.without_kernel(), adjusted=train_f0 is not None)
    # The solvers that cannot work with one class have stopped by now.
    warn_of_one_class(solver, train)
    return fitted


def limited_threads(settings: SolverSettings) -> contextlib.AbstractContextManager[Any]:
    """Return a block in which solvers in memory have one thread, and a blocked one, whose products are large, has all.

    On a busy machine many threads for small products wait for each other: measured, ten to forty times longer.
    """
    return contextlib.nullcontext() if settings.blocked is not None else threadpool_limits(limits=1)


def checked_kernel(solver: str, train_kernel: ArrayLike, *, f0: bool) -> Array:
    """Return the train kernel as [D, N, C, N, C] after checking that a solver can work with it.

    Args:
        solver: A key of `SOLVERS`.
        train_kernel: [N, C, N, C] or [2, N, C, N, C].
        f0: Whether the untrained model's logits are taken into account.

    Raises:
        UnknownNameError: There is no such solver.
        SolverError: The solver cannot work with this kernel.
        KernelMismatchError: The array is not a train kernel.
    """
    if solver not in SOLVERS:
        message = suggest(solver, SOLVERS, "kernel solver")
        raise UnknownNameError(message, name=solver, kind="kernel solver", options=list(SOLVERS))
    kernel = train_directions(train_kernel)
    check_requirements(solver, asymmetric=len(kernel) == 2, num_logits=kernel.shape[2], f0=f0)
    return kernel


def warn_of_one_class(solver: str, train: FitInputs) -> None:
    """Warn if all train examples are of one class."""
    if (train.classes == train.classes[0]).all():
        logger.warning(
            "all train examples are of class %d: %s learns nothing about other classes from them; look at the labels "
            "of the train data",
            train.classes[0],
            solver,
        )


def check_requirements(solver: str, *, asymmetric: bool, num_logits: int, f0: bool) -> None:
    """Check that a solver can work with a kernel, before it is computed.

    Args:
        solver: A key of `SOLVERS`.
        asymmetric: Whether the kernel has two directions.
        num_logits: The number of logits, C.
        f0: Whether the untrained model's logits are taken into account.

    Raises:
        SolverError: It cannot; ``needs`` lists what is missing.
    """
    row = SOLVERS[solver]
    lacking = [
        what
        for what, missing in (
            (
                "an asymmetric kernel (`kernel_formula=asymmetric_signgd`)",
                row.needs_asymmetric and not asymmetric,
            ),
            ("a single logit (`binary_classification`)", row.needs_binary and num_logits > 1),
            ("a command without `adjust_for_init`", f0 and not row.allows_f0),
        )
        if missing
    ]
    if lacking:
        message = f"`kernel_solver={solver}` needs {' and '.join(lacking)}: change that, or take another solver"
        raise SolverError(message, solver=solver, needs=lacking)
