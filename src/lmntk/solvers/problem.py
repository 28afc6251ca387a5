"""The inputs of a solver, checked, and its predictions; the only home of the single-logit convention.

Letters: N training examples, X examples to predict, C logits. A kernel is float64 of shape [N, C, X, C], or
[2, N, C, X, C] for the asymmetric formula, whose second direction only `asym` uses. A single logit (C = 1, from
`binary_classification`) has labels and targets -1 and +1 and predicts class 1 above 0; more logits have class ids as
labels, one-hot targets, and predict the class of the largest.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.errors import KernelMismatchError, NotFiniteError, SettingError, check_numbers
from lmntk.solvers.blocked import Blocked
from lmntk.solvers.bounds import LARGEST_IN_KERNEL, MOST_OF_F0, SOLVER_BOUNDS

Array = NDArray[np.float64]
ClassIds = NDArray[np.int64]


@dataclass(frozen=True)
class SolverSettings:
    """The settings of the solvers and their defaults.

    >>> SolverSettings(lambda_=2)
    Traceback (most recent call last):
    ...
    lmntk.errors.SettingError: `kernel_lambda` is 2, but it must be from 0 to 1

    Attributes:
        regularization: `kernel_regularization`, in units of the training kernel's largest singular value.
        gamma: `kernel_gamma`, the weight of the errors in `asym`.
        lambda_: `kernel_lambda`, the weight of direction [0] in the predictions of `asym`.
        f0_scaling: The divisor of f0; 0 means no adjustment.
        flattened_targets: `logistic` and `svc` fit one model of two classes to the flattened kernel, see
            `one_hot_rows`.
        plain_lbfgs: `logistic` takes the weights at which L-BFGS stops.
        blocked: How `lstsq` solves a system that is not held in memory; None for one that is.

    Raises:
        SettingError: A value gives no meaningful number.
    """

    regularization: float = 0.0
    gamma: float = 1.0
    lambda_: float = 0.5
    f0_scaling: float = 1.0
    flattened_targets: bool = False
    plain_lbfgs: bool = False
    blocked: Blocked | None = None

    def __post_init__(self) -> None:
        """Check the bounds of the numbers."""
        check_numbers(SOLVER_BOUNDS.values(), {row.setting: getattr(self, name) for name, row in SOLVER_BOUNDS.items()})


@dataclass(frozen=True)
class Prediction:
    """The predictions of a solver for the X examples.

    Attributes:
        logits: [X, C] float64; see `predicted_classes`.
        loss: The solver's own loss, averaged over the examples.
        metrics: Further numbers for the result file, e.g. ``{"rank0": 16}``.
    """

    logits: Array
    loss: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class FitInputs:
    """The checked inputs that a solver is fitted to.

    Attributes:
        kernel: [N, C, N, C], direction [0] of an asymmetric kernel, as [1] is its transpose; see `regularised`.
        directions: D, which is 2 with an asymmetric kernel, else 1.
        classes: Class ids, [N].
        f0_offset: What `adjust_for_init` subtracts from the targets, [N, C]: f0 / s, or 0.
        settings: The settings of the solver.
    """

    kernel: Array
    directions: int
    classes: ClassIds
    f0_offset: Array
    settings: SolverSettings

    @property
    def num_logits(self) -> int:
        """C."""
        return self.kernel.shape[1]

    @property
    def is_flattened(self) -> bool:
        """Whether `flattened_targets` applies: there are several logits."""
        return self.settings.flattened_targets and self.num_logits > 1

    def flat(self) -> Array:
        """The kernel as [N·C, N·C]."""
        return _flat(self.kernel)

    def regularised(self) -> "FitInputs":
        """The same with K + λ ‖K‖₂ I as the kernel, λ of the settings, with the norm of the flattened kernel K.

        A blocked solver adds the term itself, so that the kernel stays in its file.
        """
        if self.settings.regularization == 0 or self.settings.blocked is not None:
            return self
        flat = self.flat()
        ridge = self.settings.regularization * float(np.linalg.norm(flat, 2)) * np.eye(len(flat))
        return dataclasses.replace(self, kernel=(flat + ridge).reshape(self.kernel.shape))

    def without_kernel(self) -> "FitInputs":
        """The same with zeros for the kernel that take no memory: predictions are checked against its shape alone."""
        return dataclasses.replace(self, kernel=np.broadcast_to(np.zeros(()), self.kernel.shape))

    def flat_targets(self) -> Array:
        """The targets less f0 / s, [N·C]."""
        return (targets(self.classes, self.num_logits) - self.f0_offset).reshape(-1)


@dataclass(frozen=True)
class PredictInputs:
    """The checked inputs that a fitted solver predicts from.

    Attributes:
        kernel: [D, N, C, X, C].
        classes: Class ids, [X]; only the loss depends on them.
        f0_offset: What `adjust_for_init` adds to the predictions, [X, C]: f0 / s, or 0.
    """

    kernel: Array
    classes: ClassIds
    f0_offset: Array

    def flat(self, direction: int = 0) -> Array:
        """One direction of the kernel as [N·C, X·C]."""
        return _flat(self.kernel[direction])

    def regression(self, flat_predictions: Array, metrics: dict[str, float]) -> Prediction:
        """Finish the prediction of a solver that fits targets: [X·C] → logits, squared error."""
        logits = flat_predictions.reshape(self.f0_offset.shape) + self.f0_offset
        return Prediction(logits, squared_error(logits, targets(self.classes, logits.shape[1])), metrics)


Predict = Callable[[PredictInputs], Prediction]
"""A fitted solver: a function from the inputs of a split to its predictions."""


def train_directions(kernel: ArrayLike) -> Array:
    """Return the train kernel as [D, N, C, N, C].

    Args:
        kernel: [N, C, N, C] or [2, N, C, N, C].

    Raises:
        KernelMismatchError: The array is not a train kernel.
    """
    given = np.asarray(kernel, dtype=np.float64)
    train = given[None] if given.ndim == 4 else given
    if not (train.ndim == 5 and len(train) in (1, 2) and train.shape[1:3] == train.shape[3:] and train.size):
        raise KernelMismatchError(
            f"the train kernel {list(given.shape)} does not go together with itself: it must be [N, C, N, C], or have "
            "a leading 2; is it the kernel of train and train?",
            shapes=[given.shape],
        )
    return train


def check_fit_inputs(kernel: Array, labels: ArrayLike, f0: ArrayLike | None, settings: SolverSettings) -> FitInputs:
    """Check that labels and logits match the train kernel, which is not regularised yet.

    Args:
        kernel: The result of `train_directions`, [D, N, C, N, C].
        labels: [N], class ids, or -1 and +1 when C = 1.
        f0: [N, C], logits of the untrained model for `adjust_for_init`, or None.
        settings: The settings of the solver.

    Raises:
        KernelMismatchError: Arrays that do not match each other.
        NotFiniteError: NaN, infinity or too large values.
    """
    check_values(kernel, "train")
    shape = kernel.shape[3:]
    return FitInputs(
        kernel=kernel[0],
        directions=len(kernel),
        classes=_check_labels(labels, shape, "train"),
        f0_offset=divided_f0(f0, shape, settings.f0_scaling, "train"),
        settings=settings,
    )


def validate_predict_inputs(
    train: FitInputs, kernel: ArrayLike, labels: ArrayLike, f0: ArrayLike | None, split: str
) -> PredictInputs:
    """Check that the kernel of the X examples matches the train kernel, and labels and logits match it.

    Args:
        train: The inputs that the solver was fitted to.
        kernel: [N, C, X, C] or [2, N, C, X, C], like the train kernel.
        labels: [X], class ids, or -1 and +1 when C = 1.
        f0: [X, C], logits of the untrained model for `adjust_for_init`, or None.
        split: The name of the X examples in errors.

    Raises:
        KernelMismatchError: Arrays that do not match each other.
        NotFiniteError: NaN, infinity or too large values.
    """
    given = np.asarray(kernel, dtype=np.float64)
    x = given[None] if given.ndim == 4 else given
    rows = train.kernel.shape[:2]
    if not (x.ndim == 5 and x.shape == (train.directions, *rows, x.shape[3], train.num_logits) and x.size):
        train_shape = [*rows, *rows] if train.directions == 1 else [2, *rows, *rows]
        raise KernelMismatchError(
            f"the train kernel {train_shape} and the {split} kernel {list(given.shape)} do not go "
            "together: they must be [N, C, N, C] and [N, C, X, C], or both with a leading 2; are they from one run?",
            shapes=[tuple(train_shape), given.shape],
        )
    check_values(x, split)
    shape = x.shape[3:]
    return PredictInputs(
        kernel=x,
        classes=_check_labels(labels, shape, split),
        f0_offset=divided_f0(f0, shape, train.settings.f0_scaling, split),
    )


def two_logits(predictions: Array) -> Array:
    """Return a single logit p of shape [X, 1] as the two logits (-p, p), whose argmax is the class; [X, C] as it is."""
    return np.concatenate([-predictions, predictions], axis=1) if predictions.shape[1] == 1 else predictions


def class_ids(labels: ArrayLike, num_logits: int) -> ClassIds:
    """Turn a kernel's labels (-1 and +1 with a single logit, else class ids) into class ids, [X] int64.

    >>> class_ids([-1.0, 1.0], num_logits=1).tolist(), class_ids([2, 0], num_logits=3).tolist()
    ([0, 1], [2, 0])
    """
    values = np.asarray(labels)
    return (values > 0 if num_logits == 1 else values).astype(np.int64)


def signed(classes: ArrayLike) -> Array:
    """Turn class ids 0 and 1 into the labels -1 and +1 of a single logit, float64 of the same shape.

    >>> signed([0, 1]).tolist()
    [-1.0, 1.0]
    """
    return np.asarray(classes, dtype=np.float64) * 2 - 1


def predicted_classes(logits: Array) -> ClassIds:
    """Return the class ids that logits [X, C] predict: the largest of several, or whether a single one is above 0.

    >>> predicted_classes(np.array([[0.5], [-2.0], [0.0]])).tolist()
    [1, 0, 0]
    """
    return two_logits(logits).argmax(axis=1)


def margins(logits: Array, classes: ClassIds) -> Array:
    """Return how far the logit of each example's class is above the largest other one, in units of logits.

    A single logit f stands for the difference of the logits of class 1 and class 0: its margin is f or -f.

    Args:
        logits: ``[..., X, C]``.
        classes: Class ids, ``[X]``: the labels, or what is predicted.

    Returns:
        ``[..., X]``, below 0 where another class is predicted.

    Examples:
        >>> margins(np.array([[1.0, 3.0, 2.5]]), np.array([2])).tolist()
        [-0.5]
        >>> margins(np.array([[0.25], [0.25]]), np.array([1, 0])).tolist()
        [0.25, -0.25]
    """
    if logits.shape[-1] == 1:
        return np.asarray(signed(classes) * logits[..., 0])
    is_own = np.arange(logits.shape[-1]) == classes[:, None]
    return np.asarray(np.where(is_own, logits, 0).sum(axis=-1) - np.where(is_own, -np.inf, logits).max(axis=-1))


def check_values(kernel: Array, x_split: str) -> None:
    """Refuse NaN, infinity and values whose squares float64 cannot hold.

    Args:
        kernel: [N, C, X, C] or [D, N, C, X, C].
        x_split: The name of the X examples in errors.

    Raises:
        NotFiniteError: Names the first X example that has only NaN or infinity, or else the first pair with any.
    """
    largest = float(np.maximum(kernel.max(), -kernel.min()))  # NaN if there is one; no copy of a large kernel
    if np.isfinite(largest):
        if not LARGEST_IN_KERNEL.contains(largest):
            raise NotFiniteError(
                f"the largest value of the kernel of train and {x_split} is {largest:.1e}, but it must be "
                f"{LARGEST_IN_KERNEL}: scale the kernel, or look at the model's weights",
                largest=largest,
            )
        return
    finite = np.isfinite(kernel)
    pairs = ~finite.reshape(-1, *kernel.shape[-4:]).all(axis=(0, 2, 4))
    columns = pairs.all(axis=0)
    if columns.any():
        example, partner = int(columns.argmax()), ""
    else:
        train_index, example = map(int, np.argwhere(pairs)[0])
        partner = f" with train example {train_index}"
    raise NotFiniteError(
        f"the kernel of train and {x_split} holds NaN or infinity, first at {x_split} example {example}{partner} "
        "(counted from 0): look at that text, or compute the kernel again with `kernel_dtype=float64` "
        "`overwrite_kernels=True`",
        example=example,
    )


def _check_labels(labels: ArrayLike, shape: tuple[int, ...], split: str) -> ClassIds:
    """Return the class ids after checking that the labels match a kernel of shape [examples, logits]."""
    (examples, num_logits), values = shape, np.asarray(labels)
    if values.shape != (examples,):
        message = f"the kernel has {examples} {split} examples, but labels of shape {list(values.shape)}"
        raise KernelMismatchError(message, shapes=[shape, values.shape])
    allowed = [-1, 1] if num_logits == 1 else range(num_logits)
    unknown = ~np.isin(values, allowed)
    if unknown.any():
        example = int(unknown.argmax())
        raise KernelMismatchError(
            f"{split} example {example} (counted from 0) has the label {values[unknown][0]}, but those of a kernel "
            f"with {num_logits} logit{'' if num_logits == 1 else 's'} are {', '.join(map(str, allowed))}",
            example=example,
        )
    return class_ids(values, num_logits)


def divided_f0(f0: ArrayLike | None, shape: tuple[int, ...], scaling: float, split: str) -> Array:
    """Return f0 / s as [X, C]: zeros if there is no f0, or s = 0."""
    if f0 is None or scaling == 0:
        return np.zeros(shape)
    array = np.asarray(f0, dtype=np.float64)
    if array.shape != shape:
        message = f"the {split} logits have shape {list(array.shape)}, but its kernel needs {list(shape)}"
        raise KernelMismatchError(message, shapes=[shape, array.shape])
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        example = int(broken.argmax())
        raise NotFiniteError(
            f"the {split} logits of the untrained model hold NaN or infinity, first at example {example} (counted from "
            "0): compute them again, or leave out `adjust_for_init`",
            example=example,
        )
    if np.abs(array).max() > MOST_OF_F0 * scaling:
        raise SettingError(
            f"the {split} logits of the untrained model, up to {np.abs(array).max():.1e}, are more than {MOST_OF_F0:g} "
            f"times `f0_scaling`, which is {scaling:g}: raise it, or leave out `adjust_for_init`",
            setting="f0_scaling",
            value=scaling,
        )
    return array / scaling


def targets(classes: ClassIds, num_logits: int) -> Array:
    """Return one-hot targets [X, C], or -1 and +1 as [X, 1] for a single logit."""
    return signed(classes)[:, None] if num_logits == 1 else np.eye(num_logits)[classes]


def one_hot_rows(classes: ClassIds, num_logits: int) -> ClassIds:
    """Turn class ids [N] into the classes, 0 or 1, of the rows of a flattened kernel, [N·C].

    The published program fits one model of two classes to these rows: a row belongs to class 1 if it is the logit of
    its example's class. All rows count alike; nothing says that only one logit of an example is of class 1.
    """
    return np.eye(num_logits, dtype=np.int64)[classes].reshape(-1)


def _flat(kernel: Array) -> Array:
    """[N, C, X, C] as the matrix [N·C, X·C]."""
    return kernel.reshape(kernel.shape[0] * kernel.shape[1], -1)


def squared_error(predictions: Array, targets: Array) -> float:
    """Return the mean squared difference over examples and logits."""
    return float(np.mean((predictions - targets) ** 2))
