"""From a kernel and the training targets to predictions.

Nothing here knows a model, a task or a file: `fit` is the one call, what it returns predicts any number of splits,
`SOLVERS` says what each solver asks for, and `lmntk.solvers.problem` what it is given.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lstsq as lstsq_of_scipy
from scipy.special import log_expit, log_softmax
from threadpoolctl import threadpool_limits

from lmntk.errors import UsageError, suggest
from lmntk.solvers import flattened, lbfgs
from lmntk.solvers.logistic import cross_validation_folds, fit_rows
from lmntk.solvers.problem import (
    Array,
    FitInputs,
    Predict,
    PredictInputs,
    Prediction,
    SolverSettings,
    squared_error,
    targets,
    train_directions,
    validate_fit_inputs,
    validate_predict_inputs,
)
from lmntk.solvers.svm import classification, regression

logger = logging.getLogger(__name__)


def lstsq(train: FitInputs) -> Predict:
    """Minimum-norm least squares on the flattened kernel.

    The driver is LAPACK's gelsy with its default cut-off, as in the published program: rank0 is the rank it finds.
    """
    alpha, rank = _least_squares(train.flat(), train.flat_targets())
    return lambda x: x.regression(x.flat().T @ alpha, {"rank0": rank})


def _logistic(train: FitInputs) -> Predict:
    """Logistic regression on the rows of the kernel, its C chosen by cross-validation; loss: cross entropy.

    The logit of a single-logit kernel is log p(1) - log p(0); more logits are log-probabilities.
    """
    if train.is_flattened:
        return flattened.logistic(train)
    folds = cross_validation_folds(train.classes, max(2, train.num_logits))
    # Row i of a symmetric kernel, [C_i, N, C_n], and column j of the other, [N, C_n, C_j], in one order: n, C_n, own C.
    features = train.kernel.transpose(0, 2, 3, 1).reshape(len(train.kernel), -1)
    fit = lbfgs.fit_rows if train.settings.plain_lbfgs else fit_rows
    weights, intercepts = fit(features, train.classes, folds)

    def predict(x: PredictInputs) -> Prediction:
        scores = x.kernel[0].transpose(2, 0, 1, 3).reshape(len(x.classes), -1) @ weights.T + intercepts
        # From the scores, not from the probabilities: those round to 0 and 1, whose logarithm is lost.
        if scores.shape[1] == 1:
            log_probabilities = np.concatenate([log_expit(-scores), log_expit(scores)], axis=1)
        else:
            log_probabilities = log_softmax(scores, axis=1)
        loss = -float(np.mean(log_probabilities[np.arange(len(scores)), x.classes]))
        return Prediction(scores if train.num_logits == 1 else log_probabilities, loss, {})

    return predict


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
        return flattened.svc(train)
    classes = max(2, train.num_logits)
    counts = np.bincount(train.classes, minlength=classes)
    if not counts.all():
        raise UsageError(
            f"class {int(counts.argmin())} has no training example, but --kernel_solver svc needs one of each: "
            "make the k-shot data again, or take --kernel_solver lstsq"
        )
    kernel = np.einsum("icjc->ij", train.kernel)
    # A single logit: class 1 from class 0.
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


@dataclass(frozen=True)
class Solver:
    """A row of the table: a solver, and what a command line must bring along for it.

    Attributes:
        fit: The solver itself: what it is fitted to → how it predicts.
        summary: A few words for help texts.
        needs_binary: Works with a single logit only: --binary_classification.
        needs_asymmetric: Works with an asymmetric kernel only.
        allows_f0: Can start from the untrained model's logits: --adjust_for_init.
    """

    fit: Callable[[FitInputs], Predict]
    summary: str
    needs_binary: bool = False
    needs_asymmetric: bool = False
    allows_f0: bool = False


SOLVERS: dict[str, Solver] = {
    "lstsq": Solver(lstsq, "minimum-norm least squares", allows_f0=True),
    "logistic": Solver(_logistic, "cross-validated logistic regression on the kernel's rows"),
    "svr": Solver(svr, "support vector regression", allows_f0=True),
    "svc": Solver(svc, "support vector classification, one versus the rest"),
    "asym": Solver(asym, "asymmetric least-squares SVM", needs_binary=True, needs_asymmetric=True, allows_f0=True),
}


@dataclass(frozen=True)
class FittedSolver:
    """A solver fitted to the training examples; `fit` makes it.

    Attributes:
        solve: How it predicts.
        train: What it was fitted to.
        adjusted: Whether with the untrained model's logits, so that `predict` needs them too.
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
            x_f0: [X, C], logits of the untrained model, if `fit` had those of the training examples.
            x_split: What error messages call the X examples: ``"dev"``, ``"test"``.

        Returns:
            Logits [X, C] in float64, the loss and further metrics.

        Raises:
            UsageError: Arrays that do not fit each other, NaN or infinity in the kernel or in what comes out.
        """
        if (x_f0 is not None) != self.adjusted:
            raise ValueError("train_f0 and x_f0 go together")
        with threadpool_limits(limits=1), np.errstate(over="ignore", invalid="ignore"):
            found = self.solve(validate_predict_inputs(self.train, x_kernel, x_labels, x_f0, x_split))
        if not (np.isfinite(found.logits).all() and np.isfinite(found.loss)):
            raise UsageError(
                f"the predictions for {x_split} are too large for float64: the values of its kernel and of the train "
                "kernel, or --kernel_regularization, --kernel_gamma and --f0_scaling, are too far apart"
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
        settings: Regularisation and the like.
        train_f0: [N, C], logits of the untrained model, for --adjust_for_init.

    Raises:
        UsageError: An unknown solver, one that does not go with the kernel, arrays that do not fit each other, NaN or
            infinity in the kernel, or too few training examples of a class.
    """
    if solver not in SOLVERS:
        raise UsageError(suggest(solver, SOLVERS, "kernel solver"))
    kernel = train_directions(train_kernel)
    check_requirements(solver, asymmetric=len(kernel) == 2, num_logits=kernel.shape[2], f0=train_f0 is not None)
    # On a busy machine the threads of so many small products wait for each other: measured, ten to forty times longer.
    with threadpool_limits(limits=1):
        train = validate_fit_inputs(kernel, train_labels, train_f0, settings)
        fitted = FittedSolver(SOLVERS[solver].fit(train), train, adjusted=train_f0 is not None)
    # The solvers that cannot work with one class have stopped by now.
    if (train.classes == train.classes[0]).all():
        logger.warning(
            "all train examples are of class %d: %s learns nothing about other classes from them; look at the labels "
            "of the train data",
            *(train.classes[0], solver),
        )
    return fitted


def check_requirements(solver: str, *, asymmetric: bool, num_logits: int, f0: bool) -> None:
    """See that a solver can work with a kernel, before that is computed.

    Args:
        solver: A key of `SOLVERS`.
        asymmetric: Whether the kernel has two directions.
        num_logits: C.
        f0: Whether the untrained model's logits are taken into account.

    Raises:
        UsageError: It cannot.
    """
    row = SOLVERS[solver]
    lacking = [
        what
        for what, missing in (
            ("an asymmetric kernel (--kernel_formula asymmetric_signgd)", row.needs_asymmetric and not asymmetric),
            ("a single logit (--binary_classification)", row.needs_binary and num_logits > 1),
            ("a command without --adjust_for_init", f0 and not row.allows_f0),
        )
        if missing
    ]
    if lacking:
        raise UsageError(f"--kernel_solver {solver} needs {' and '.join(lacking)}: change that, or take another solver")


def _least_squares(matrix: Array, right_side: Array) -> tuple[Array, int]:
    """The minimum-norm least-squares solution, and the rank found.

    Through scipy, with torch's cut-off: torch 2.13 calls gelsy with pivots that it never set (pytorch issue 187411), so
    that on singular matrices its rank and solution are whatever memory happens to hold.
    """
    cut_off = float(np.finfo(np.float64).eps) * max(matrix.shape)
    solution, _, rank, _ = lstsq_of_scipy(matrix, right_side, cond=cut_off, lapack_driver="gelsy")
    return solution, int(rank)
