"""How well estimated kernels predict what exact kernels predict: a row of a table, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmntk.kernels.projection import Projection

NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Predictions:
    """What one kernel predicts for the test examples of a split.

    Attributes:
        projection: None for the exact kernel.
        seconds: What the processor spent on train × train and train × test.
        entries: ‖K̂ − K‖ / ‖K‖ of train × test.
        logits: ‖f̂ − f‖ / ‖f‖ by λ, as the flag spells it.
        classes: The predicted class of each test example, by λ.
    """

    projection: Projection | None
    seconds: float
    entries: float
    logits: dict[str, float]
    classes: dict[str, list[int]]


@dataclass(frozen=True)
class Split:
    """What was measured on a split.

    Attributes:
        folder: The k-shot folder.
        n: Its train examples.
        chosen: The λ that leave-one-out chooses; None if no such one is wanted.
        labels: The classes of its test examples.
        exact: What the exact kernel predicts.
        projected: What the projected ones predict.
    """

    folder: str
    n: int
    chosen: float | None
    labels: list[int]
    exact: Predictions
    projected: list[Predictions]


def summarise(splits: Sequence[Split], width: int, regularization: str) -> dict[str, str]:
    """Return a row of the table: the mean over splits and seeds of one width and λ.

    Args:
        splits: All splits, which have the same number of test examples and the same seeds.
        width: The width.
        regularization: λ, a key of `Predictions.classes`.
    """
    labels = np.array([split.labels for split in splits])
    exact = np.array([split.exact.classes[regularization] for split in splits])
    of_width = [
        [one for one in split.projected if one.projection and one.projection.width == width] for split in splits
    ]
    found = np.array([[one.classes[regularization] for one in row] for row in of_width])  # [S, P, X]
    equal = found == exact[:, None]
    gained = (found == labels[:, None]).astype(float) - (exact == labels)[:, None]
    flat = [one for row in of_width for one in row]
    shares = equal.mean(axis=2)
    low, high = interval(gained)
    least, most = interval(equal)
    common = np.mean([max(np.bincount(row)) / len(row) for row in labels])
    return {
        "λ": regularization,
        "width": str(width),
        "N": " ".join(sorted({str(split.n) for split in splits})),
        "X": str(labels.shape[1]),
        "splits × seeds": f"{len(splits)} × {found.shape[1]}",
        "majority %": f"{100 * common:.1f}",
        "exact %": f"{100 * np.mean(exact == labels):.1f}",
        "projected less exact, points": f"{100 * gained.mean():+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
        "equal classes %": f"{100 * equal.mean():.1f} ({100 * least:.1f} to {100 * most:.1f})",
        "of single seeds %": f"{100 * shares.min():.1f} to {100 * shares.max():.1f}",
        "entries %": f"{100 * np.mean([one.entries for one in flat]):.2g}",
        "logits %": f"{100 * np.mean([one.logits[regularization] for one in flat]):.2g}",
        "exact s": f"{np.mean([split.exact.seconds for split in splits]):.1f}",
        "projected s": f"{np.mean([one.seconds for one in flat]):.1f}",
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over resampled seeds and test examples, the splits as they are.

    Args:
        values: ``[S, P, X]``, of each split, seed of the projection and test example.
    """
    generator = np.random.default_rng(0)
    of_pairs = values.mean(axis=0)
    weights = [generator.multinomial(size, np.full(size, 1 / size), NUM_RESAMPLES) / size for size in of_pairs.shape]
    means = np.einsum("rp,rp->r", weights[0], weights[1] @ of_pairs.T)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
