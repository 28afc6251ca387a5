"""From a kernel and the training targets to predictions.

Letters: N training examples, X examples to predict, C logits. A kernel is float64 of shape [N, C, X, C], or
[2, N, C, X, C] for the asymmetric formula, whose second direction only `asym` uses. A single logit (C = 1, from
``--binary_classification``) has targets -1 and +1, more logits have one-hot targets.

Nothing here knows a model, a task or a file: `predict` is the one call, and `SOLVERS` says what each solver asks for.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_expit, log_softmax
from threadpoolctl import threadpool_limits

from lmntk.errors import UsageError, suggest

logger = logging.getLogger(__name__)

Array = NDArray[np.float64]
ClassIds = NDArray[np.int64]

MOST_FOLDS = 5


@dataclass(frozen=True)
class SolverSettings:
    """The numbers behind the solver flags.

    Attributes:
        regularization: ``--kernel_regularization``, in units of the training kernel's largest singular value.
        gamma: ``--kernel_gamma``, the weight of the errors in `asym`.
        lambda_: ``--kernel_lambda``, the weight of direction [0] in the predictions of `asym`.
        f0_scaling: ``--f0_scaling``: f0 is divided by it, 0 means no adjustment.

    Raises:
        UsageError: A value that gives no meaningful number.
    """

    regularization: float = 0.0
    gamma: float = 1.0
    lambda_: float = 0.5
    f0_scaling: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what would give numbers without a meaning."""
        for flag, value, fits, wanted in (
            ("--kernel_regularization", self.regularization, self.regularization >= 0, "a number of at least 0"),
            ("--kernel_gamma", self.gamma, self.gamma > 0, "a number above 0"),
            ("--kernel_lambda", self.lambda_, True, "a number"),
            ("--f0_scaling", self.f0_scaling, self.f0_scaling >= 0, "a number of at least 0 (0: no adjustment)"),
        ):
            if not (fits and math.isfinite(value)):
                raise UsageError(f"{flag} is {value}, but must be {wanted}")


@dataclass(frozen=True)
class Prediction:
    """What a solver predicts for the X examples.

    Attributes:
        logits: [X, C] float64; a single logit above 0 means class 1 (see `two_logits`).
        loss: The solver's own loss, a mean over the examples.
        metrics: Further numbers for the result file, e.g. ``{"rank0": 16}``.
    """

    logits: Array
    loss: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Problem:
    """A solver's input, checked.

    Attributes:
        train: [N, C, N, C], regularised; direction [0] of an asymmetric kernel, as [1] is its transpose.
        x: [D, N, C, X, C], where D is 2 with an asymmetric kernel, else 1.
        train_classes: Class ids, [N].
        x_classes: Class ids, [X].
        train_shift: What ``--adjust_for_init`` takes from the targets, [N, C]: f0 / s, or 0.
        x_shift: What it adds to the predictions, [X, C].
        settings: Of which `asym` reads gamma and lambda.
    """

    train: Array
    x: Array
    train_classes: ClassIds
    x_classes: ClassIds
    train_shift: Array
    x_shift: Array
    settings: SolverSettings

    @property
    def num_logits(self) -> int:
        """C."""
        return self.train.shape[1]

    def flat_train(self) -> Array:
        """The training kernel as [N·C, N·C]."""
        return _flat(self.train)

    def flat_x(self, direction: int = 0) -> Array:
        """One direction of the kernel with the X examples as [N·C, X·C]."""
        return _flat(self.x[direction])

    def flat_targets(self) -> Array:
        """The training targets less f0 / s, [N·C]."""
        return (_targets(self.train_classes, self.num_logits) - self.train_shift).reshape(-1)

    def regression(self, flat_predictions: Array, metrics: dict[str, float]) -> Prediction:
        """Finish the prediction of a solver that fits targets: [X·C] → logits, squared error."""
        logits = flat_predictions.reshape(self.x_shift.shape) + self.x_shift
        return Prediction(logits, _squared_error(logits, _targets(self.x_classes, self.num_logits)), metrics)


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
        decisions = SVC(kernel="precomputed").fit(train, _targets(problem.train_classes, 1)[:, 0]).predict(x)[:, None]
        return Prediction(decisions, _squared_error(decisions, _targets(problem.x_classes, 1)), {})
    values = np.empty((len(x), classes))
    for label in range(classes):
        model = SVC(kernel="precomputed").fit(train, problem.train_classes == label)
        values[:, label] = model.decision_function(x)
    loss = _squared_error(np.where(values > 0, 1.0, -1.0), 2 * _targets(problem.x_classes, classes) - 1)
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
    train, x = _fitting_kernels(train_kernel, x_kernel, x_split)
    _check_requirements(solver, asymmetric=len(train) == 2, num_logits=train.shape[2], f0=train_f0 is not None)
    check_finite(train, "train")
    check_finite(x, x_split)
    train_classes = _checked_class_ids(train_labels, train.shape[3:], "train")
    x_classes = _checked_class_ids(x_labels, x.shape[3:], x_split)
    train_shift = _shift(train_f0, train.shape[3:], settings.f0_scaling, "train")
    x_shift = _shift(x_f0, x.shape[3:], settings.f0_scaling, x_split)
    # On a busy machine the threads of so many small products wait for each other: measured, ten to forty times longer.
    with threadpool_limits(limits=1):
        regularised = _regularised(train[0], settings.regularization)
        return SOLVERS[solver].solve(Problem(regularised, x, train_classes, x_classes, train_shift, x_shift, settings))


def two_logits(predictions: Array) -> Array:
    """Give a single logit p of shape [X, 1] as the two logits (-p, p), whose argmax is the class; [X, C] else as is."""
    return np.concatenate([-predictions, predictions], axis=1) if predictions.shape[1] == 1 else predictions


def class_ids(labels: ArrayLike, num_logits: int) -> ClassIds:
    """Turn a kernel's labels (-1 and +1 with a single logit, else class ids) into class ids, [X] int64."""
    values = np.asarray(labels)
    return (values > 0 if num_logits == 1 else values).astype(np.int64)


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


def check_finite(kernel: Array, x_split: str) -> None:
    """Stop at NaN or infinity in the kernel between the training examples and `x_split`.

    The kernel is [N, C, X, C] or [2, N, C, X, C].

    Raises:
        UsageError: Names the first X example with nothing but such values, else the first pair with any.
    """
    finite = np.isfinite(kernel)
    if finite.all():
        return
    pairs = ~finite.reshape(-1, *kernel.shape[-4:]).all(axis=(0, 2, 4))
    columns = pairs.all(axis=0)
    if columns.any():
        culprit = f"{x_split} example {int(columns.argmax())}"
    else:
        train_index, x_index = np.argwhere(pairs)[0]
        culprit = f"{x_split} example {x_index} with train example {train_index}"
    raise UsageError(
        f"the kernel of train and {x_split} holds NaN or infinity, first at {culprit} (counted from 0): look at that "
        "text, or compute the kernel again with --kernel_dtype float64 --overwrite_kernels"
    )


def _fitting_kernels(train_kernel: ArrayLike, x_kernel: ArrayLike, x_split: str) -> tuple[Array, Array]:
    """Both kernels as [D, N, C, ·, C], with the same D, N and C."""
    given = [np.asarray(kernel, dtype=np.float64) for kernel in (train_kernel, x_kernel)]
    train, x = (kernel[None] if kernel.ndim == 4 else kernel for kernel in given)
    sizes = train.shape[:3]
    if not (
        train.ndim == x.ndim == 5
        and len(train) in (1, 2)
        and train.shape == (*sizes, *sizes[1:])
        and x.shape == (*sizes, x.shape[3], sizes[2])
        and x.size
    ):
        raise UsageError(
            f"the train kernel {list(given[0].shape)} and the {x_split} kernel {list(given[1].shape)} do not go "
            "together: they must be [N, C, N, C] and [N, C, X, C], or both with a leading 2; are they from one run?"
        )
    return train, x


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


def _checked_class_ids(labels: ArrayLike, shape: tuple[int, ...], split: str) -> ClassIds:
    """`class_ids` after a check that the labels are what a kernel of so many examples and logits has."""
    (examples, num_logits), values = shape, np.asarray(labels)
    if values.shape != (examples,):
        raise UsageError(f"the kernel has {examples} {split} examples, but labels of shape {list(values.shape)}")
    allowed = [-1, 1] if num_logits == 1 else range(num_logits)
    unknown = ~np.isin(values, allowed)
    if unknown.any():
        raise UsageError(
            f"{split} example {int(unknown.argmax())} (counted from 0) has the label {values[unknown][0]}, but those "
            f"of a kernel with {num_logits} logit{'' if num_logits == 1 else 's'} are {', '.join(map(str, allowed))}"
        )
    return class_ids(values, num_logits)


def _shift(f0: ArrayLike | None, shape: tuple[int, ...], scaling: float, split: str) -> Array:
    """f0 / s as [X, C]; zeros without f0 and with s = 0."""
    if f0 is None or scaling == 0:
        return np.zeros(shape)
    array = np.asarray(f0, dtype=np.float64)
    if array.shape != shape:
        raise UsageError(f"the {split} logits have shape {list(array.shape)}, but its kernel wants {list(shape)}")
    return array / scaling


def _targets(classes: ClassIds, num_logits: int) -> Array:
    """One-hot targets [X, C], or -1 and +1 as [X, 1] for a single logit."""
    return np.array([[-1.0], [1.0]] if num_logits == 1 else np.eye(num_logits))[classes]


def _flat(kernel: Array) -> Array:
    """[N, C, X, C] as the matrix [N·C, X·C]."""
    return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)


def _regularised(kernel: Array, regularization: float) -> Array:
    """K + λ ‖K‖₂ I of a training kernel [N, C, N, C], with the norm of the flattened one."""
    if regularization == 0:
        return kernel
    flat = _flat(kernel)
    return (flat + regularization * float(np.linalg.norm(flat, 2)) * np.eye(len(flat))).reshape(kernel.shape)


def _least_squares(matrix: Array, right_side: Array) -> tuple[Array, int]:
    """The minimum-norm least-squares solution, and the rank found."""
    solution = torch.linalg.lstsq(torch.tensor(matrix), torch.tensor(right_side)[:, None], driver="gelsy")
    return solution.solution[:, 0].numpy(), int(solution.rank)


def _squared_error(predictions: Array, targets: Array) -> float:
    """Mean over examples and logits."""
    return float(np.mean((predictions - targets) ** 2))
