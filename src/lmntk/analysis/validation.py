"""Whether re-solving a kernel on subsets of the train examples predicts what really training on them gives."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lmntk.analysis.datamodelling import Agreement, Subsets, agreement, chance_agreement
from lmntk.analysis.least_squares import LeastSquaresRun
from lmntk.data.tasks import Task
from lmntk.errors import FileError, NotFiniteError, SolverError
from lmntk.solvers.influence import influence
from lmntk.solvers.problem import Array, ClassIds, margins, predicted_classes

RESOLVED, ADDED, RETRAINED, CHANCE = "re-solving", "leave-one-out", "another seed", "chance"
"""The kinds of predictions: the kernel solved again on each subset; the sum of the leave-one-out influences of the
examples that a subset lacks; a training with another seed, from which `Validation.ceilings` follow; and the re-solved
predictions in random orders."""


@dataclass(frozen=True)
class Trainings:
    """What was really trained on each subset.

    Attributes:
        subsets: Which train examples each keeps, ``[m, E]``.
        logits: Those of the trained models, ``[m, S, X, C]``, for S seeds.
        optimizer: The optimizer.
        rate: The learning rate.
        max_steps: The steps.
        rate_by_dev: Whether dev chose the learning rate.
    """

    subsets: Subsets
    logits: Array
    optimizer: str
    rate: str
    max_steps: int
    rate_by_dev: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of prediction.

    Attributes:
        of_outputs: How the outputs of each test example agree with the real ones: the linear datamodelling score.
        of_scores: How the scores of the subsets agree with the real ones; None for `CHANCE`.
        mean_score: The mean score over subsets.
        equal: The share of predicted classes that equal those of the trained models, mean over subsets and seeds.
    """

    of_outputs: Agreement
    of_scores: Agreement | None
    mean_score: float
    equal: float


@dataclass(frozen=True)
class Validation:
    """How well the outputs after training on subsets are predicted.

    Attributes:
        name: The name of the kernel's run.
        task: The key of the task.
        metric: The name of its main metric.
        split: The split whose outputs are predicted.
        trainings: What was trained.
        classes: The class ids of the split's examples, ``[X]``.
        real: The outputs (`margins`) of the trained models, mean over seeds, ``[m, X]``.
        real_scores: Their scores, ``[m]``.
        predicted: The predicted outputs by kind, ``[m, X]``.
        kinds: What comes of each kind of prediction.
        remarks: Sentences on what is left out.
    """

    name: str
    task: str
    metric: str
    split: str
    trainings: Trainings
    classes: ClassIds
    real: Array
    real_scores: Array
    predicted: Mapping[str, Array]
    kinds: Mapping[str, Kind]
    remarks: Sequence[str]

    @property
    def ceilings(self) -> tuple[float, float]:
        """What a prediction without error would reach, of outputs and of scores; NaN with one seed."""
        kind, seeds = self.kinds.get(RETRAINED), self.trainings.logits.shape[1]
        if kind is None or kind.of_scores is None:
            return float("nan"), float("nan")
        return attainable(kind.of_outputs.score, seeds), attainable(kind.of_scores.score, seeds)


def attainable(correlation: float, seeds: int) -> float:
    """Return what a prediction without error would reach against trainings that differ by their seeds.

    With the correlation r of two trainings, the mean of S of them has the reliability S r / (1 + (S − 1) r) (Spearman
    1910 and Brown 1910), whose root is its correlation with the mean over all seeds (Spearman 1904, the correction for
    attenuation). For ranks it is approximate.

    Args:
        correlation: r.
        seeds: S.

    Returns:
        The correlation; NaN where r is not above 0.

    Examples:
        >>> round(attainable(0.5, 1), 3), round(attainable(0.5, 2), 3)
        (0.707, 0.816)
    """
    if not correlation > 0:
        return float("nan")
    return float(np.sqrt(seeds * correlation / (1 + (seeds - 1) * correlation)))


def read_logits(path: Path, task: Task, classes: ClassIds) -> Array:
    """Read the logits that a run wrote beside its predictions.

    Args:
        path: The table.
        task: The task, which spells the labels.
        classes: The class ids that its examples must have, ``[X]``.

    Returns:
        float64 ``[X, C]``.

    Raises:
        FileError: It cannot be read, or is of other examples.
        NotFiniteError: The training has diverged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            _, *rows = csv.reader(file)
        labels = [task.labels.index(row[1]) for row in rows]
        logits = np.array([row[3:] for row in rows], dtype=np.float64)
        if not logits.size:
            raise ValueError("no logits")
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise FileError(f"{path} is not a table of predictions with logits: repeat the run", path=path) from error
    if not np.array_equal(labels, classes):
        raise FileError(f"{path} has other examples or labels than the kernel: are both of one data folder?", path=path)
    if not np.isfinite(logits).all():
        raise NotFiniteError(f"{path} holds NaN or infinity: take a smaller `learning_rate`", path=path)
    return logits


def resolved_logits(found: LeastSquaresRun, subsets: Subsets, split: str, *, show_progress: bool = False) -> Array:
    """Predict a split by `lstsq` on each subset: the sub-matrix of the kernel, whose own norm scales λ.

    Args:
        found: The run.
        subsets: Which train examples each subset keeps, ``[m, E]``.
        split: A split that has a kernel.
        show_progress: Whether to show a progress bar.

    Returns:
        float64 ``[m, X, C]``.
    """
    kernel, logits = found.kernel(split).values, []
    for kept in tqdm(subsets, desc="solving subsets", unit="subset", disable=not show_progress, leave=False):
        examples = np.flatnonzero(kept)
        problem = found.problem.restricted_to(examples)
        logits.append(found.predict(split, problem, found.problem.restrict(kernel, examples)))
    return np.stack(logits)


def added_logits(found: LeastSquaresRun, subsets: Subsets, split: str) -> Array:
    """Predict a split on each subset by adding up influences: f(x) − Σ (f(x) − f₋ᵢ(x)) over the examples i left out.

    Args:
        found: The run.
        subsets: Which train examples each subset keeps, ``[m, E]``.
        split: A split that has a kernel.

    Returns:
        float64 ``[m, X, C]``.

    Raises:
        SolverError: The regularised kernel is singular.
    """
    kernel = found.kernel(split)
    added = influence(found.problem, kernel.values, x_samples=kernel.samples_per_example[1])
    return found.predict(split) - np.tensordot((~subsets).astype(np.float64), added, axes=1)


def validate(
    found: LeastSquaresRun, trainings: Trainings, split: str, name: str, seed: int, *, show_progress: bool = False
) -> Validation:
    """Compare predicted outputs with those of trained models.

    Args:
        found: The run of the kernel.
        trainings: What was trained on subsets of its train examples.
        split: The split, ``"dev"`` or ``"test"``.
        name: The name of the run.
        seed: The seed of the bootstrap and the permutations.
        show_progress: Whether to show progress bars.
    """
    classes, subsets = found.classes(split), trainings.subsets
    real = margins(trainings.logits, classes)
    real_scores = _scores(found, split, trainings.logits)
    outputs, remarks = real.mean(axis=1), list[str]()
    predicted = {RESOLVED: resolved_logits(found, subsets, split, show_progress=show_progress)}
    try:
        predicted[ADDED] = added_logits(found, subsets, split)
    except SolverError as error:
        remarks.append(f"There is no prediction by leave-one-out: {error}")
    kinds = {}
    for kind in tqdm(predicted, desc="bootstrap", unit="prediction", disable=not show_progress, leave=False):
        logits = predicted[kind]
        scores = _scores(found, split, logits[:, None])
        equal = predicted_class_share(logits[:, None], trainings.logits)
        of_scores = agreement(real_scores.mean(axis=1)[:, None], scores, seed)
        of_outputs = agreement(outputs, margins(logits, classes), seed)
        kinds[kind] = Kind(of_outputs, of_scores, float(scores.mean()), equal)
    if (seeds := real.shape[1]) > 1:
        first, second = np.triu_indices(seeds, 1)
        of_outputs, of_scores = (
            agreement(_side_by_side(values, first), _side_by_side(values, second), seed)
            for values in (real, real_scores[:, :, None])
        )
        pairs = [(trainings.logits[:, [a]], trainings.logits[:, [b]]) for a, b in zip(first, second, strict=True)]
        equal = float(np.mean([predicted_class_share(*pair) for pair in pairs]))
        kinds[RETRAINED] = Kind(of_outputs, of_scores, float(real_scores.mean()), equal)
    by_chance = chance_agreement(outputs, margins(predicted[RESOLVED], classes), seed)
    kinds[CHANCE] = Kind(by_chance, None, float("nan"), float("nan"))
    if still := int(np.isnan(kinds[RESOLVED].of_outputs.correlations).sum()):
        remarks.append(
            f"{still} of {len(classes)} examples are left out, since their trained or predicted output is the same for "
            "all subsets."
        )
    if np.isnan(kinds[RESOLVED].of_outputs.low):
        remarks.append(f"{len(subsets)} subsets are too few for an interval: some resamples have one subset alone.")
    if split == "dev" and trainings.rate_by_dev:
        remarks.append("dev chose the learning rate of the trainings: test is the split that nothing was chosen by.")
    metric = found.run.task.main_metrics[0] if found.run.task is not None else "acc"
    return Validation(
        name, found.run.key, metric, split, trainings, classes, outputs, real_scores.mean(axis=1),
        {kind: margins(logits, classes) for kind, logits in predicted.items()}, kinds, remarks,
    )  # fmt: skip


def predicted_class_share(first: Array, second: Array) -> float:
    """Return the share of equal predicted classes of logits ``[m, 1 or S, X, C]``."""
    classes = [predicted_classes(part.reshape(-1, part.shape[-1])).reshape(part.shape[:-1]) for part in (first, second)]
    return float(np.mean(classes[0] == classes[1]))


def _scores(found: LeastSquaresRun, split: str, logits: Array) -> Array:
    """The score of each model, ``[m, S, X, C]`` → ``[m, S]``."""
    return np.array([[found.score(split, of_seed) for of_seed in of_subset] for of_subset in logits])


def _side_by_side(values: Array, seeds: NDArray[np.int64]) -> Array:
    """The outputs of several seeds as columns of one table, ``[m, S, X]`` → ``[m, len(seeds) · X]``."""
    return values[:, seeds].reshape(len(values), -1)
