"""From a kernel and the training targets to predictions.

Nothing here knows a model, a task or a file: `predict` is the one call, `SOLVERS` says what each solver asks for, and
`lmntk.solver_problem` what it is given.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.special import log_expit, log_softmax
from threadpoolctl import threadpool_limits

from lmntk.errors import UsageError, suggest
from lmntk.solver_problem import (
    Array,
    ClassIds,
    Prediction,
    Problem,
    SolverSettings,
    checked_problem,
    fitting_kernels,
    squared_error,
    targets,
)

logger = logging.getLogger(__name__)

MOST_FOLDS = 5


def lstsq(problem: Problem) -> Prediction:
    """Minimum-norm least squares on the flattened kernel.

    The driver is LAPACK's gelsy with its default cut-off, as in the published program: rank0 is the rank it finds.
    """
    alpha, rank = _least_squares(problem.flat_train(), problem.flat_targets())
    return problem.regression(problem.flat_x().T @ alpha, {"rank0": rank})


def logistic(problem: Problem) -> Prediction:
    """Logistic regression on the rows of the kernel, its C chosen by cross-validation; loss: cross entropy.

    The logit of a single-logit kernel is log p(1) - log p(0); more logits are log-probabilities.
    """
    from sklearn.linear_model import LogisticRegressionCV  # here, since it takes a second that --help need not wait

    train, x = problem.train, problem.x[0]
    # Row i of a symmetric kernel, [C_i, N, C_n], and column j of the other, [N, C_n, C_j], in one order: n, C_n, own C.
    train_features = train.transpose(0, 2, 3, 1).reshape(len(train), -1)
    x_features = x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1)
    model = LogisticRegressionCV(
        max_iter=10000,
        random_state=0,
        cv=cross_validation_folds(problem.train_classes, max(2, problem.num_logits)),
        # What the defaults have always been (L2, accuracy), spelled out because scikit-learn is about to change them.
        l1_ratios=(0.0,),
        scoring="accuracy",
        use_legacy_attributes=False,
    )
    scores = model.fit(train_features, problem.train_classes).decision_function(x_features)
    # From the scores, not from the probabilities: those round to 0 and 1, whose logarithm is lost.
    if scores.ndim == 1:
        log_probabilities = np.stack([log_expit(-scores), log_expit(scores)], axis=1)
    else:
        log_probabilities = log_softmax(scores, axis=1)
    loss = -float(np.mean(log_probabilities[np.arange(len(scores)), problem.x_classes]))
    return Prediction(scores[:, None] if problem.num_logits == 1 else log_probabilities, loss, {})


def svr(problem: Problem) -> Prediction:
    """Support vector regression with the flattened kernel on the flattened targets."""
    from sklearn.svm import SVR

    model = SVR(kernel="precomputed").fit(problem.flat_train(), problem.flat_targets())
    return problem.regression(model.predict(problem.flat_x().T), {})


def svc(problem: Problem) -> Prediction:
    """Support vector classification; loss: squared error of the decisions, -1 or +1, against targets -1 and +1.

    A single logit is the decision itself. With more, one classifier per class separates it from the rest on the kernel
    summed over equal logits, Σ_c K[i, c, j, c]; the logits are the decision values, and the loss, a mean over examples
    and classes, takes each classifier's decision.
    """
    from sklearn.svm import SVC

    classes = max(2, problem.num_logits)
    counts = np.bincount(problem.train_classes, minlength=classes)
    if not counts.all():
        raise UsageError(
            f"class {int(counts.argmin())} has no training example, but --kernel_solver svc needs one of each: "
            "make the k-shot data again, or take --kernel_solver lstsq"
        )
    train = np.einsum("icjc->ij", problem.train)
    x = np.einsum("icjc->ji", problem.x[0])
    if problem.num_logits == 1:
        decisions = SVC(kernel="precomputed").fit(train, targets(problem.train_classes, 1)[:, 0]).predict(x)[:, None]
        return Prediction(decisions, squared_error(decisions, targets(problem.x_classes, 1)), {})
    values = np.empty((len(x), classes))
    for label in range(classes):
        model = SVC(kernel="precomputed").fit(train, problem.train_classes == label)
        values[:, label] = model.decision_function(x)
    loss = squared_error(np.where(values > 0, 1.0, -1.0), 2 * targets(problem.x_classes, classes) - 1)
    return Prediction(values, loss, {})


def asym(problem: Problem) -> Prediction:
    """Asymmetric least-squares SVM without bias (He et al. 2022, arXiv 2202.01397).

    With H_ij = y_i K[0]_ij y_j it solves [I/γ H; Hᵀ I/γ] [α; β] = 1 and predicts λ K[0]ᵀ(α∘y) + (1-λ) K[1]ᵀ(β∘y).
    """
    y = problem.flat_targets()
    h = y[:, None] * problem.flat_train() * y
    ridge = np.eye(len(y)) / problem.settings.gamma
    solution, rank = _least_squares(np.block([[ridge, h], [h.T, ridge]]), np.ones(2 * len(y)))
    alpha, beta = np.split(solution, 2)
    weight = problem.settings.lambda_
    predictions = weight * problem.flat_x(0).T @ (alpha * y) + (1 - weight) * problem.flat_x(1).T @ (beta * y)
    return problem.regression(predictions, {"rank0": rank})


@dataclass(frozen=True)
class Solver:
    """A row of the table: a solver, and what a command line must bring along for it.

    Attributes:
        solve: The solver itself.
        summary: A few words for help texts.
        needs_binary: Works with a single logit only: --binary_classification.
        needs_asymmetric: Works with an asymmetric kernel only.
        allows_f0: Can start from the untrained model's logits: --adjust_for_init.
    """

    solve: Callable[[Problem], Prediction]
    summary: str
    needs_binary: bool = False
    needs_asymmetric: bool = False
    allows_f0: bool = False


SOLVERS: dict[str, Solver] = {
    "lstsq": Solver(lstsq, "minimum-norm least squares", allows_f0=True),
    "logistic": Solver(logistic, "cross-validated logistic regression on the kernel's rows"),
    "svr": Solver(svr, "support vector regression", allows_f0=True),
    "svc": Solver(svc, "support vector classification, one versus the rest"),
    "asym": Solver(asym, "asymmetric least-squares SVM", needs_binary=True, needs_asymmetric=True, allows_f0=True),
}


def predict(
    solver: str,
    train_kernel: ArrayLike,
    train_labels: ArrayLike,
    x_kernel: ArrayLike,
    x_labels: ArrayLike,
    settings: SolverSettings,
    train_f0: ArrayLike | None = None,
    x_f0: ArrayLike | None = None,
    x_split: str = "X",
) -> Prediction:
    """Predict the X examples from the kernel between the training examples and them.

    Args:
        solver: A key of `SOLVERS`.
        train_kernel: [N, C, N, C] or [2, N, C, N, C].
        train_labels: [N], class ids, or -1 and +1 when C = 1.
        x_kernel: [N, C, X, C] or [2, N, C, X, C].
        x_labels: [X], alike; only the loss depends on them.
        settings: Regularisation and the like.
        train_f0: [N, C], logits of the untrained model, for --adjust_for_init.
        x_f0: [X, C], alike; both or neither.
        x_split: What error messages call the X examples: ``"dev"``, ``"test"``.

    Returns:
        Logits [X, C] in float64, the loss and further metrics.

    Raises:
        UsageError: An unknown solver, one that does not go with the kernel, arrays that do not fit each other, NaN or
            infinity in a kernel, or too few training examples of a class.
    """
    if solver not in SOLVERS:
        raise UsageError(suggest(solver, SOLVERS, "kernel solver"))
    if (train_f0 is None) != (x_f0 is None):
        raise ValueError("train_f0 and x_f0 go together")
    kernels = fitting_kernels(train_kernel, x_kernel, x_split)
    directions, _, num_logits = kernels[0].shape[:3]
    _check_requirements(solver, asymmetric=directions == 2, num_logits=num_logits, f0=train_f0 is not None)
    # On a busy machine the threads of so many small products wait for each other: measured, ten to forty times longer.
    with threadpool_limits(limits=1):
        problem = checked_problem(kernels, (train_labels, x_labels), (train_f0, x_f0), settings, x_split)
        return SOLVERS[solver].solve(problem)


def cross_validation_folds(train_classes: ClassIds, num_classes: int) -> int:
    """Choose the folds of cross-validation: five, or as many as the smallest class has examples.

    Raises:
        UsageError: A class with fewer than two examples, which no split can both train and test on.
    """
    counts = np.bincount(train_classes, minlength=num_classes)
    label, smallest = int(counts.argmin()), int(counts.min())
    if smallest < 2:
        raise UsageError(
            f"class {label} has {smallest} training example{'' if smallest else 's'}, but logistic regression is "
            "cross-validated and needs two of each: raise K, or take --kernel_solver lstsq"
        )
    if smallest < MOST_FOLDS:
        logger.warning("class %d has %d training examples: %d folds instead of %d", label, *[smallest] * 2, MOST_FOLDS)
    return min(MOST_FOLDS, smallest)


def _check_requirements(solver: str, *, asymmetric: bool, num_logits: int, f0: bool) -> None:
    """The solver's row in the table against the kernel at hand."""
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
    """The minimum-norm least-squares solution, and the rank found."""
    solution = torch.linalg.lstsq(torch.tensor(matrix), torch.tensor(right_side)[:, None], driver="gelsy")
    return solution.solution[:, 0].numpy(), int(solution.rank)
