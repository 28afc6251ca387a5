"""Metrics of predictions against labels, as fractions and under LM-BFF's names."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmntk.data.tasks import Task

Array = NDArray[np.generic]


def compute_metrics(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Compute the task's metrics.

    Args:
        task: The task, whose `metric` is a key of `METRICS` and whose `metric_prefix` begins each name.
        predictions: Predicted class ids, or predicted scores for a regression task, `[X]`.
        labels: True class ids or scores, `[X]`.

    Returns:
        The metrics, by names without ``eval_``.

    Raises:
        ValueError: The shapes differ, or are not `[X]` with X > 0.

    Examples:
        >>> from lmntk.data.tasks import TASKS
        >>> compute_metrics(TASKS["MNLI"], predictions=[0, 1], labels=[0, 2])
        {'mnli/acc': 0.5}
    """
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    if predicted.ndim != 1 or predicted.shape != wanted.shape or not len(predicted):
        raise ValueError(f"predictions {predicted.shape} and labels {wanted.shape} must be vectors of one length")
    metrics = METRICS[task.metric](predicted, wanted)
    return {task.metric_prefix + name: float(value) for name, value in metrics.items()}


def mean_over_samples(predictions: NDArray[np.float64], num_examples: int) -> NDArray[np.float64]:
    """Average predictions over the samples of each example: one sample for each template and demonstration draw.

    Args:
        predictions: [samples · X, C], all examples of one sample after those of another.
        num_examples: X.

    Returns:
        The means, [X, C].

    Examples:
        >>> mean_over_samples(np.array([[1.0], [2.0], [3.0], [4.0]]), 2).tolist()
        [[2.0], [3.0]]
    """
    return predictions.reshape(-1, num_examples, predictions.shape[1]).mean(axis=0)


def _accuracy(predictions: Array, labels: Array) -> dict[str, float]:
    return {"acc": np.mean(predictions == labels)}


def _accuracy_and_f1(predictions: Array, labels: Array) -> dict[str, float]:
    """Compute accuracy and the F1 of class 1, which is 0 if no example has or is predicted to have class 1."""
    from sklearn.metrics import f1_score  # here, since scikit-learn and scipy.stats take a second to load

    accuracy = np.mean(predictions == labels)
    f1 = f1_score(labels, predictions, zero_division=0)
    return {"acc": accuracy, "f1": f1, "acc_and_f1": (accuracy + f1) / 2}


def _matthews(predictions: Array, labels: Array) -> dict[str, float]:
    """Compute Matthews' correlation, which is 0 if all predictions or all labels have one class."""
    from sklearn.metrics import matthews_corrcoef

    return {"mcc": 0.0 if _is_constant(predictions) or _is_constant(labels) else matthews_corrcoef(labels, predictions)}


def _correlations(predictions: Array, labels: Array) -> dict[str, float]:
    """Compute Pearson's and Spearman's correlation and their mean: NaN, as in scipy, if one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if _is_constant(predictions) or _is_constant(labels):
        return dict.fromkeys(("pearson", "spearmanr", "corr"), float("nan"))
    pearson, spearman = pearsonr(predictions, labels)[0], spearmanr(predictions, labels)[0]
    return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}


def _is_constant(values: Array) -> bool:
    return bool(np.all(values == values[0]))


METRICS: dict[str, Callable[[Array, Array], dict[str, float]]] = {
    "acc": _accuracy,
    "acc_and_f1": _accuracy_and_f1,
    "mcc": _matthews,
    "pearson_and_spearman": _correlations,
}
