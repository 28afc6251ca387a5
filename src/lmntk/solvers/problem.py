"""What a solver is given, checked, and what it gives: kernels that fit their labels, targets, shifts, predictions.

Letters: N training examples, X examples to predict, C logits. A kernel is float64 of shape [N, C, X, C], or
[2, N, C, X, C] for the asymmetric formula, whose second direction only `asym` uses. A single logit (C = 1, from
``--binary_classification``) has targets -1 and +1, more logits have one-hot targets.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.errors import UsageError, check_numbers
from lmntk.solvers.bounds import LARGEST_IN_KERNEL, MOST_OF_F0, SOLVER_BOUNDS

Array = NDArray[np.float64]
ClassIds = NDArray[np.int64]


@dataclass(frozen=True)
class SolverSettings:
    """The numbers behind the solver flags.

    Attributes:
        regularization: ``--kernel_regularization``, in units of the training kernel's largest singular value.
        gamma: ``--kernel_gamma``, the weight of the errors in `asym`.
        lambda_: ``--kernel_lambda``, the weight of direction [0] in the predictions of `asym`.
        f0_scaling: ``--f0_scaling``: f0 is divided by it, 0 means no adjustment.
        flattened_targets: ``--flattened_targets``: `logistic` and `svc` fit one model of two classes to the flattened
            kernel.
        plain_lbfgs: ``--plain_lbfgs``: `logistic` takes the weights at which L-BFGS ends.

    Raises:
        UsageError: A value that gives no meaningful number.
    """

    regularization: float = 0.0
    gamma: float = 1.0
    lambda_: float = 0.5
    f0_scaling: float = 1.0
    flattened_targets: bool = False
    plain_lbfgs: bool = False

    def __post_init__(self) -> None:
        """Refuse what would give numbers without a meaning."""
        check_numbers(SOLVER_BOUNDS.values(), {row.setting: getattr(self, name) for name, row in SOLVER_BOUNDS.items()})


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
class FitInputs:
    """What a solver is fitted to, checked.

    Attributes:
        kernel: [N, C, N, C], regularised; direction [0] of an asymmetric kernel, as [1] is its transpose.
        directions: D, which is 2 with an asymmetric kernel, else 1.
        classes: Class ids, [N].
        shift: What ``--adjust_for_init`` takes from the targets, [N, C]: f0 / s, or 0.
        settings: Of which `asym` reads gamma and lambda.
    """

    kernel: Array
    directions: int
    classes: ClassIds
    shift: Array
    settings: SolverSettings

    @property
    def num_logits(self) -> int:
        """C."""
        return self.kernel.shape[1]

    @property
    def is_flattened(self) -> bool:
        """Whether ``--flattened_targets`` makes a difference: there are several logits."""
        return self.settings.flattened_targets and self.num_logits > 1

    def flat(self) -> Array:
        """The kernel as [N·C, N·C]."""
        return _flat(self.kernel)

    def flat_targets(self) -> Array:
        """The targets less f0 / s, [N·C]."""
        return (targets(self.classes, self.num_logits) - self.shift).reshape(-1)


@dataclass(frozen=True)
class PredictInputs:
    """What a fitted solver predicts from, checked.

    Attributes:
        kernel: [D, N, C, X, C].
        classes: Class ids, [X]; only the loss depends on them.
        shift: What ``--adjust_for_init`` adds to the predictions, [X, C]: f0 / s, or 0.
    """

    kernel: Array
    classes: ClassIds
    shift: Array

    def flat(self, direction: int = 0) -> Array:
        """One direction of the kernel as [N·C, X·C]."""
        return _flat(self.kernel[direction])

    def regression(self, flat_predictions: Array, metrics: dict[str, float]) -> Prediction:
        """Finish the prediction of a solver that fits targets: [X·C] → logits, squared error."""
        logits = flat_predictions.reshape(self.shift.shape) + self.shift
        return Prediction(logits, squared_error(logits, targets(self.classes, logits.shape[1])), metrics)


Predict = Callable[[PredictInputs], Prediction]
"""What a solver returns: from one split to its predictions."""


def train_directions(kernel: ArrayLike) -> Array:
    """The train kernel as [D, N, C, N, C].

    Raises:
        UsageError: An array that is no train kernel.
    """
    given = np.asarray(kernel, dtype=np.float64)
    train = given[None] if given.ndim == 4 else given
    if not (train.ndim == 5 and len(train) in (1, 2) and train.shape[1:3] == train.shape[3:] and train.size):
        raise UsageError(
            f"the train kernel {list(given.shape)} does not go together with itself: it must be [N, C, N, C], or have "
            "a leading 2; is it the kernel of train and train?"
        )
    return train


def validate_fit_inputs(kernel: Array, labels: ArrayLike, f0: ArrayLike | None, settings: SolverSettings) -> FitInputs:
    """See that labels and logits fit the train kernel, and regularise.

    Args:
        kernel: What `train_directions` returns, [D, N, C, N, C].
        labels: [N], class ids, or -1 and +1 when C = 1.
        f0: [N, C], logits of the untrained model, for --adjust_for_init; None without.
        settings: Regularisation and the like.

    Raises:
        UsageError: Arrays that do not fit each other, NaN, infinity or too large values in the kernel.
    """
    check_values(kernel, "train")
    shape = kernel.shape[3:]
    return FitInputs(
        kernel=_regularised(kernel[0], settings.regularization),
        directions=len(kernel),
        classes=_checked_class_ids(labels, shape, "train"),
        shift=_shift(f0, shape, settings.f0_scaling, "train"),
        settings=settings,
    )


def validate_predict_inputs(
    train: FitInputs, kernel: ArrayLike, labels: ArrayLike, f0: ArrayLike | None, split: str
) -> PredictInputs:
    """See that the kernel of the X examples fits the train kernel, and labels and logits fit it.

    Args:
        train: What the solver was fitted to.
        kernel: [N, C, X, C] or [2, N, C, X, C], like the train kernel.
        labels: [X], class ids, or -1 and +1 when C = 1.
        f0: [X, C], logits of the untrained model, for --adjust_for_init; None without.
        split: What error messages call the X examples.

    Raises:
        UsageError: Arrays that do not fit each other, NaN, infinity or too large values in the kernel.
    """
    given = np.asarray(kernel, dtype=np.float64)
    x = given[None] if given.ndim == 4 else given
    sizes = (train.directions, *train.kernel.shape[:2])
    if not (x.ndim == 5 and x.shape == (*sizes, x.shape[3], train.num_logits) and x.size):
        train_shape = [*sizes[train.directions == 1 :], *sizes[1:]]
        raise UsageError(
            f"the train kernel {train_shape} and the {split} kernel {list(given.shape)} do not go "
            "together: they must be [N, C, N, C] and [N, C, X, C], or both with a leading 2; are they from one run?"
        )
    check_values(x, split)
    shape = x.shape[3:]
    return PredictInputs(
        kernel=x,
        classes=_checked_class_ids(labels, shape, split),
        shift=_shift(f0, shape, train.settings.f0_scaling, split),
    )


def two_logits(predictions: Array) -> Array:
    """Give a single logit p of shape [X, 1] as the two logits (-p, p), whose argmax is the class; [X, C] else as is."""
    return np.concatenate([-predictions, predictions], axis=1) if predictions.shape[1] == 1 else predictions


def class_ids(labels: ArrayLike, num_logits: int) -> ClassIds:
    """Turn a kernel's labels (-1 and +1 with a single logit, else class ids) into class ids, [X] int64."""
    values = np.asarray(labels)
    return (values > 0 if num_logits == 1 else values).astype(np.int64)


def check_values(kernel: Array, x_split: str) -> None:
    """Stop at NaN, infinity and values of a size beyond float64's squares in the kernel of train and `x_split`.

    The kernel is [N, C, X, C] or [D, N, C, X, C].

    Raises:
        UsageError: Names the first X example with nothing but NaN or infinity, else the first pair with any.
    """
    finite = np.isfinite(kernel)
    if finite.all():
        if not LARGEST_IN_KERNEL.contains(largest := float(np.abs(kernel).max())):
            raise UsageError(
                f"the largest value of the kernel of train and {x_split} is {largest:.1e}, but it must be "
                f"{LARGEST_IN_KERNEL}: scale the kernel, or look at the model's weights"
            )
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
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        raise UsageError(
            f"the {split} logits of the untrained model hold NaN or infinity, first at example {int(broken.argmax())} "
            "(counted from 0): compute them again, or leave out --adjust_for_init"
        )
    if np.abs(array).max() > MOST_OF_F0 * scaling:
        raise UsageError(
            f"the {split} logits of the untrained model, up to {np.abs(array).max():.1e}, are more than {MOST_OF_F0:g} "
            f"times --f0_scaling, which is {scaling:g}: raise that, or leave out --adjust_for_init"
        )
    return array / scaling


def targets(classes: ClassIds, num_logits: int) -> Array:
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


def squared_error(predictions: Array, targets: Array) -> float:
    """Mean over examples and logits."""
    return float(np.mean((predictions - targets) ** 2))
