"""The score of predictions, the main metric of their task, and how sure it is on a test set of limited size.

A score is a fraction: accuracy, or F1 for MRPC and QQP. Predictions and labels are class ids, [X].
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.analysis.saved_run import task_of
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task

Ids = NDArray[np.int64]
METRIC_NAMES = {"acc": "accuracy", "f1": "F1", "mcc": "Matthews correlation", "pearson": "Pearson correlation"}
"""The names of metrics in tables and pictures."""


def score(task: Task | None, split: str, predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the main metric of a split's own task, or the accuracy if the task is unknown.

    Args:
        task: The task of the run; a second test set has another one.
        split: The split, such as ``"test"``.
        predicted: Predicted class ids, or scores of a regression task, [X].
        labels: The labels, [X].
    """
    own = task_of(split, task)
    if own is None:
        return float(np.mean(np.asarray(predicted) == np.asarray(labels)))
    return compute_metrics(own, predicted, labels)[own.metric_prefix + own.main_metrics[0]]


def constant_score(task: Task | None, split: str, labels: Ids, num_classes: int) -> float:
    """Return the score of the best constant prediction: one class for all examples, the one that scores best.

    For accuracy it is the share of the largest class; for F1 it is 2π/(1 + π) with π the share of class 1.

    Args:
        task: The task of the run.
        split: The split.
        labels: Class ids, [X].
        num_classes: How many classes there are.
    """
    return max(score(task, split, np.full_like(labels, label), labels) for label in range(num_classes))


def standard_error(statistic: Callable[..., float], *columns: Ids) -> float:
    """Return the standard error of a number computed from examples: how much it would vary with other test examples.

    It is the jackknife's, from the number without each example in turn (Tukey 1958), with divisor X: for accuracy,
    exactly the binomial √(p(1 − p)/X), for a difference of two accuracies that of the paired differences.

    Args:
        statistic: Computes the number from the columns.
        *columns: What it takes of the examples, such as predictions and labels, [X] each.

    Returns:
        The standard error; NaN for a single example.

    Examples:
        >>> right = np.array([1, 1, 1, 0])
        >>> round(standard_error(lambda column: float(column.mean()), right) ** 2 * 4, 10)
        0.1875
    """
    examples = np.stack(columns, axis=1)
    if len(examples) < 2:
        return float("nan")
    # Equal examples are left out with equal results: each kind is tried once.
    _, kinds, counts = np.unique(examples, axis=0, return_index=True, return_counts=True)
    without = np.array([statistic(*np.delete(examples, kind, axis=0).T) for kind in kinds])
    mean = np.average(without, weights=counts)
    size = len(examples)
    return float((size - 1) / size * np.sqrt((counts * (without - mean) ** 2).sum()))


def score_error(task: Task | None, split: str, predicted: Ids, labels: Ids) -> float:
    """Return the standard error of a score."""
    return standard_error(lambda guess, label: score(task, split, guess, label), predicted, labels)


def gain_error(task: Task | None, split: str, better: Ids, worse: Ids, labels: Ids) -> float:
    """Return the standard error of the difference of two scores on the same examples."""
    return standard_error(
        lambda a, b, label: score(task, split, a, label) - score(task, split, b, label), better, worse, labels
    )


def recovery(linearised: float, finetuned: float, pretrained: float) -> float:
    """Return the share of fine-tuning's gain that the linearised model has, (acc_lin − acc_PT) / (acc_FT − acc_PT).

    Args:
        linearised: acc_lin.
        finetuned: acc_FT.
        pretrained: acc_PT.

    Returns:
        The share, which may be below 0 or above 1; NaN without a gain or loss.

    Examples:
        >>> recovery(0.75, 0.875, 0.5)
        0.6666666666666666
    """
    gain = finetuned - pretrained
    return (linearised - pretrained) / gain if gain else float("nan")


def logits_distance(finetuned: ArrayLike, linearised: ArrayLike, untrained: ArrayLike) -> float:
    """Return ‖f_FT − f_lin‖ / ‖f_FT − f₀‖ over all examples and logits: 0 for a training in the linear regime.

    Args:
        finetuned: f_FT, [X, C].
        linearised: f_lin, [X, C].
        untrained: f₀, [X, C].

    Returns:
        The distance; NaN if the logits have not changed at all.

    Examples:
        >>> logits_distance([[2.0]], [[1.5]], [[1.0]])
        0.5
    """
    f, linear, before = (np.asarray(logits, dtype=np.float64) for logits in (finetuned, linearised, untrained))
    change = float(np.linalg.norm(f - before))
    return float(np.linalg.norm(f - linear)) / change if change else float("nan")


def mean_residual(logits: ArrayLike, labels: Ids) -> float:
    """Return the mean of 1 − p_y, which is |χ_y| of the cross entropy: how little the model answers by itself.

    Args:
        logits: [X, C]; with C = 1 the difference f₁ − f₀.
        labels: Class ids, [X].

    Examples:
        >>> mean_residual([[0.0, 0.0], [0.0, 0.0]], np.array([0, 1])), mean_residual([[0.0]], np.array([1]))
        (0.5, 0.5)
    """
    values = np.asarray(logits, dtype=np.float64)
    if values.shape[1] == 1:
        values = np.concatenate([np.zeros_like(values), values], axis=1)
    powers = np.exp(values - values.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    return float(np.mean(1 - shares[np.arange(len(labels)), labels]))
