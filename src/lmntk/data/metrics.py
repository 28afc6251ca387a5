"""Metrics of predictions against labels, as fractions and under LM-BFF's names."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from lmntk.data.tasks import Task

Array = NDArray[np.generic]


def compute_metrics(task: Task, predictions: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Judge predictions by the task's metric.

    Args:
        task: Whose `metric` is looked up in `METRICS`, and whose `metric_prefix` stands before each name.
        predictions: [X], class ids, or numbers for a regression task.
        labels: [X], alike.

    Returns:
        Plain floats under names without ``eval_``, e.g. ``{"mnli/acc": 0.5}``.

    Raises:
        ValueError: Shapes that differ or are not [X] with X > 0.
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
    """F1 is that of class 1, and 0 where no example is or is thought to be of it."""
    accuracy = np.mean(predictions == labels)
    f1 = f1_score(labels, predictions, zero_division=0)
    return {"acc": accuracy, "f1": f1, "acc_and_f1": (accuracy + f1) / 2}


def _matthews(predictions: Array, labels: Array) -> dict[str, float]:
    """Matthews' correlation, 0 where predictions or labels are all of one class."""
    return {"mcc": 0.0 if _is_constant(predictions) or _is_constant(labels) else matthews_corrcoef(labels, predictions)}


def _correlations(predictions: Array, labels: Array) -> dict[str, float]:
    """Pearson's and Spearman's correlation and their mean: NaN, as scipy has it, where one side is constant."""
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
