"""What single train examples do to the predictions of a saved run: leave-one-out, mislabels, influence.

Letters: E train examples, X examples of another split, C logits, G groups of train examples that leave together, by
default one for each example. Everything is exact for `lstsq`, see `lmntk.solvers.influence`.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from lmntk.analysis.least_squares import LeastSquaresRun, read_least_squares
from lmntk.analysis.saved_run import read_runs, task_of
from lmntk.analysis.scores import Ids
from lmntk.analysis.table_blocks import as_csv
from lmntk.data.text_files import open_text
from lmntk.errors import FileError, SettingError
from lmntk.solvers import problem as solver_problem
from lmntk.solvers.influence import influence
from lmntk.solvers.problem import Array, ClassIds, margins, predicted_classes
from lmntk.storage.atomic import write_text
from lmntk.storage.paths import RunPaths

NEARLY_SINGULAR = 1e8
"""From this condition number on, a remark says that λ should be larger."""

TIE = 1e-9
"""A margin below this, over the largest logit, is rounding: neither class is above the other."""

BY_LABEL = "label"
"""The groups of `read_groups` that are the classes."""


@dataclass(frozen=True)
class SplitInfluence:
    """What each group of train examples does to the predictions of a split.

    Attributes:
        split: The split.
        metric: The name of its score, ``"acc"``.
        labels: Class ids, ``[X]``.
        logits: The predictions with all train examples, ``[X, C]``.
        on_margins: What each group adds to the margin of each example, ``[G, X]``; see `lmntk.solvers.problem.margins`.
        loss_changes: The mean squared error without each group less that with it, ``[G]``: above 0, the group helps.
        score_changes: The score without each group less that with it, ``[G]``: below 0, the group helps.
    """

    split: str
    metric: str
    labels: ClassIds
    logits: Array
    on_margins: Array
    loss_changes: Array
    score_changes: Array

    @property
    def column(self) -> str:
        """What names the split in columns: a second test set has the name of its task."""
        return self.split.rpartition(":")[2]


@dataclass(frozen=True)
class RunInfluence:
    """What train examples do to the predictions of a run.

    Attributes:
        of_run: The run and its least-squares problem.
        groups: The number of each train example's group, ``[E]``.
        left_out: Each train example predicted from all other groups, ``[E, C]``.
        splits: The influence on each other split that has a kernel, by split.
    """

    of_run: LeastSquaresRun
    groups: Ids
    left_out: Array
    splits: Mapping[str, SplitInfluence]

    @property
    def classes(self) -> ClassIds:
        """The class ids of the train examples, ``[E]``."""
        return self.of_run.classes("train")

    @property
    def is_grouped(self) -> bool:
        """Whether examples leave in groups."""
        return len(np.unique(self.groups)) < len(self.groups)

    @functools.cached_property
    def condition(self) -> float:
        """The condition number of K + λ‖K‖₂ I; where it is large, the numbers say little."""
        problem = self.of_run.problem
        return problem.left_out.system.condition(problem.settings.regularization)

    @functools.cached_property
    def margins(self) -> Array:
        """The margin of each train example in its leave-one-out prediction, ``[E]``."""
        return margins(self.left_out, self.classes)

    @functools.cached_property
    def judged(self) -> NDArray[np.bool_]:
        """Whether leave-one-out can speak about each label, ``[E]``: its group does not take a whole class along."""
        judged = np.ones(len(self.classes), dtype=bool)
        for label in np.unique(self.classes):
            holders = np.unique(self.groups[self.classes == label])
            if len(holders) == 1:
                judged[self.groups == holders[0]] = False
        return judged

    @functools.cached_property
    def mislabelled(self) -> list[int]:
        """The judged train examples whose label leave-one-out contradicts, by margin, the most negative first."""
        is_below = self.margins < -TIE * np.abs(self.left_out).max()
        contradicted = np.flatnonzero(self.judged & is_below)
        order = np.argsort(self.margins[contradicted], kind="stable")
        return [int(index) for index in contradicted[order]]

    def by_helpfulness(self, split: str) -> list[int]:
        """Return the places of all groups, from the one without which the loss on a split rises most."""
        return [int(place) for place in np.argsort(-self.splits[split].loss_changes, kind="stable")]


@dataclass(frozen=True)
class QueryInfluence:
    """A prediction for a text that no split has, and what pushes it.

    Attributes:
        logits: The prediction, ``[C]``.
        predicted: The predicted class id.
        on_margin: What each group of train examples adds to the margin of the predicted class, ``[G]``.
    """

    logits: Array
    predicted: int
    on_margin: Array

    @property
    def margin(self) -> float:
        """How far the predicted class is above the next one."""
        return float(margins(self.logits[None], np.array([self.predicted]))[0])


def query_influence(
    of_run: LeastSquaresRun, x_kernel: Array, f0: Array | None, groups: ArrayLike | None = None
) -> QueryInfluence:
    """Predict one text from its kernel with the train examples, and say which of these push the prediction.

    Args:
        of_run: The run.
        x_kernel: The kernel of train and the samples of the text, ``[N, C, samples, C]`` or with a leading 2.
        f0: The untrained model's logits of these samples, ``[samples, C]``, where the run fits around them.
        groups: The number of each train example's group, ``[E]``; by default each example is a group.

    Raises:
        SolverError: K + λ‖K‖₂ I is singular; names a λ that would do.
    """
    problem, samples = of_run.problem, x_kernel.shape[-2]
    any_label = np.repeat(problem.labels[:1], samples)  # only a loss depends on it
    logits = problem.predict(x_kernel, any_label, f0, "query").logits.mean(axis=0)
    predicted = predicted_classes(logits[None])
    added = influence(problem, x_kernel, groups, samples)
    on_margin = margins(logits[None], predicted) - margins(logits - added, predicted)
    return QueryInfluence(logits, int(predicted[0]), on_margin[:, 0])


def run_influence(
    of_run: LeastSquaresRun,
    groups: ArrayLike | None = None,
    splits: Iterable[str] | None = None,
    show_progress: bool = False,
) -> RunInfluence:
    """Compute leave-one-out of the train examples and their influence on other splits.

    Args:
        of_run: The run, from `lmntk.analysis.least_squares.read_least_squares`.
        groups: The number of each train example's group, ``[E]``; by default each example is a group.
        splits: The other splits; by default all that have a kernel.
        show_progress: Whether to show a progress bar.

    Raises:
        SettingError: All examples are in one group.
        SolverError: K + λ‖K‖₂ I is singular; names a λ that would do.
        UsageError: A kernel is damaged, or of another run.
    """
    problem = of_run.problem
    numbers = np.arange(problem.num_examples) if groups is None else np.asarray(groups)
    if groups is not None and len(np.unique(numbers)) < 2:
        raise SettingError(
            "`groups` puts all train examples into one group, without which nothing is left to fit: give two groups or "
            "more",
            setting="groups",
        )
    left_out = problem.leave_one_out(numbers)
    chosen = of_run.x_splits if splits is None else list(splits)
    bar = tqdm(chosen, desc="influence", unit="split", disable=not show_progress, leave=False)
    return RunInfluence(of_run, numbers, left_out, {split: _on_split(of_run, split, numbers) for split in bar})


def _on_split(of_run: LeastSquaresRun, split: str, groups: Ids) -> SplitInfluence:
    kernel, classes, task = of_run.kernel(split), of_run.classes(split), task_of(split, of_run.run.task)
    logits = of_run.predict(split)
    added = influence(of_run.problem, kernel.values, groups, kernel.samples_per_example[1])
    without = logits - added
    wanted = solver_problem.targets(classes, logits.shape[1])
    loss = solver_problem.squared_error(logits, wanted)
    return SplitInfluence(
        split=split,
        metric=task.main_metrics[0] if task else "acc",
        labels=classes,
        logits=logits,
        on_margins=margins(logits, classes) - margins(without, classes),
        loss_changes=((without - wanted) ** 2).mean(axis=(1, 2)) - loss,
        score_changes=np.array([of_run.score(split, each) for each in without]) - of_run.score(split, logits),
    )


def read_groups(given: str, classes: ClassIds) -> Ids:
    """Read which train examples leave together.

    Args:
        given: A file with a whole number in each line, one for each train example; or ``"label"``, for the classes.
        classes: The class ids of the train examples, ``[E]``.

    Returns:
        The numbers, ``[E]``.

    Raises:
        FileError: The file cannot be read, or holds something else.
    """
    if given == BY_LABEL:
        return classes
    path = Path(given)
    with open_text(path, "groups") as file:
        words = [(number, word) for number, line in enumerate(file, 1) for word in line.split()]
    numbers = np.zeros(len(words), dtype=np.int64)
    for place, (number, word) in enumerate(words):
        try:
            numbers[place] = int(word)
        except (ValueError, OverflowError) as error:
            sentence = (
                f"`groups={given}` holds {word[:40]!r} in line {number}: give a whole number for each train example"
            )
            raise FileError(sentence, path=path) from error
    if len(numbers) != len(classes):
        raise FileError(
            f"`groups={given}` holds {len(numbers)} numbers for {len(classes)} train examples: give a number for each, "
            f"in the order of the train file, or `groups={BY_LABEL}`",
            path=path,
        )
    return numbers


def write_influence(found: RunInfluence, folder: Path | None = None) -> list[Path]:
    """Write a table for train and one for each other split, ``influence_<split>_<task>.csv``.

    Args:
        found: From `run_influence`.
        folder: Where to write; None: into the folder of the run.

    Returns:
        The files.
    """
    run = found.of_run.run
    paths = RunPaths(run.folder if folder is None else folder, run.key)
    tables = {"train": train_rows(found), **{split: _split_rows(found, one) for split, one in found.splits.items()}}
    for split, rows in tables.items():
        write_text(paths.influence(split), as_csv(rows))
    return [paths.influence(split) for split in tables]


def influence_of_folder(folder: Path, task_key: str) -> list[Path]:
    """Compute the influence of a run's train examples and write its tables into its folder; return the files.

    Args:
        folder: The folder of the run.
        task_key: The key of its task in file names.

    Raises:
        UsageError: As `read_least_squares` and `run_influence`.
    """
    run = next(run for run in read_runs(folder) if run.key == task_key)
    return write_influence(run_influence(read_least_squares(run, {})))


def train_rows(found: RunInfluence) -> list[dict[str, Any]]:
    """Return a row for each train example: leave-one-out, and what its group changes on the other splits.

    Args:
        found: From `run_influence`.
    """
    spelled = _spelled(found, "train")
    predicted = predicted_classes(found.left_out)
    ranks = {index: rank for rank, index in enumerate(found.mislabelled, start=1)}
    places = np.unique(found.groups, return_inverse=True)[1]
    rows = []
    for index, label in enumerate(found.classes):
        place = places[index]
        rows.append({
            "index": index,
            "label": spelled[label],
            **({"group": int(found.groups[index])} if found.is_grouped else {}),
            "loo_prediction": spelled[predicted[index]],
            "loo_margin": float(found.margins[index]),
            **dict(zip(_logit_columns(spelled, found.left_out), found.left_out[index].tolist(), strict=True)),
            "mislabel_rank": ranks.get(index),
            **{f"{one.column}_loss_change": float(one.loss_changes[place]) for one in found.splits.values()},
            **{f"{one.column}_{one.metric}_change": float(one.score_changes[place]) for one in found.splits.values()},
        })  # fmt: skip
    return rows


def _split_rows(found: RunInfluence, on: SplitInfluence) -> list[dict[str, Any]]:
    spelled, predicted = _spelled(found, on.split), predicted_classes(on.logits)
    of_labels = margins(on.logits, on.labels)
    name = "group" if found.is_grouped else "train"
    columns = [f"{name}_{number}" for number in np.unique(found.groups)]
    return [
        {
            "index": index,
            "label": spelled[label],
            "prediction": spelled[predicted[index]],
            "margin": float(of_labels[index]),
            **dict(zip(columns, on.on_margins[:, index].tolist(), strict=True)),
        }
        for index, label in enumerate(on.labels)
    ]


def _spelled(found: RunInfluence, split: str) -> Sequence[str]:
    """Return the labels as the files of a split have them."""
    task, count = task_of(split, found.of_run.run.task), max(2, found.left_out.shape[1])
    return task.labels if task is not None and len(task.labels) == count else [str(number) for number in range(count)]


def _logit_columns(spelled: Sequence[str], logits: Array) -> list[str]:
    return ["loo_logit"] if logits.shape[1] == 1 else [f"loo_logit_{label}" for label in spelled]
