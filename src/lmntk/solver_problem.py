"""What a solver is given, checked, and what it gives: kernels that fit their labels, targets, shifts, predictions.

Letters: N training examples, X examples to predict, C logits. A kernel is float64 of shape [N, C, X, C], or
[2, N, C, X, C] for the asymmetric formula, whose second direction only `asym` uses. A single logit (C = 1, from
``--binary_classification``) has targets -1 and +1, more logits have one-hot targets.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.errors import UsageError

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
        return (targets(self.train_classes, self.num_logits) - self.train_shift).reshape(-1)

    def regression(self, flat_predictions: Array, metrics: dict[str, float]) -> Prediction:
        """Finish the prediction of a solver that fits targets: [X·C] → logits, squared error."""
        logits = flat_predictions.reshape(self.x_shift.shape) + self.x_shift
        return Prediction(logits, squared_error(logits, targets(self.x_classes, self.num_logits)), metrics)


def fitting_kernels(train_kernel: ArrayLike, x_kernel: ArrayLike, x_split: str) -> tuple[Array, Array]:
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


def checked_problem(
    kernels: tuple[Array, Array],
    labels: tuple[ArrayLike, ArrayLike],
    f0: tuple[ArrayLike | None, ArrayLike | None],
    settings: SolverSettings,
    x_split: str,
) -> Problem:
    """See that labels and logits fit their kernels, and regularise.

    Args:
        kernels: What `fitting_kernels` returns.
        labels: [N] and [X], class ids, or -1 and +1 when C = 1.
        f0: [N, C] and [X, C], logits of the untrained model, for --adjust_for_init; None without.
        settings: Regularisation and the like.
        x_split: What error messages call the X examples.

    Raises:
        UsageError: Arrays that do not fit each other, NaN or infinity in a kernel.
    """
    (train, x), (train_labels, x_labels), (train_f0, x_f0) = kernels, labels, f0
    check_finite(train, "train")
    check_finite(x, x_split)
    train_shape, x_shape = train.shape[3:], x.shape[3:]
    return Problem(
        train=_regularised(train[0], settings.regularization),
        x=x,
        train_classes=_checked_class_ids(train_labels, train_shape, "train"),
        x_classes=_checked_class_ids(x_labels, x_shape, x_split),
        train_shift=_shift(train_f0, train_shape, settings.f0_scaling, "train"),
        x_shift=_shift(x_f0, x_shape, settings.f0_scaling, x_split),
        settings=settings,
    )


def two_logits(predictions: Array) -> Array:
    """Give a single logit p of shape [X, 1] as the two logits (-p, p), whose argmax is the class; [X, C] else as is."""
    return np.concatenate([-predictions, predictions], axis=1) if predictions.shape[1] == 1 else predictions


def class_ids(labels: ArrayLike, num_logits: int) -> ClassIds:
    """Turn a kernel's labels (-1 and +1 with a single logit, else class ids) into class ids, [X] int64."""
    values = np.asarray(labels)
    return (values > 0 if num_logits == 1 else values).astype(np.int64)


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
