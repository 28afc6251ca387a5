"""The table of whether the kernel describes fine-tuning in some runs, in all its formats."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lmntk.analysis.behaviour import BehaviourRow, SeedBehaviour, Thresholds, behaviour_row, seed_behaviour
from lmntk.analysis.behaviour_tables import format_rows
from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.errors import UsageError
from lmntk.report.behaviour import behaviour_figure
from lmntk.storage.atomic import prepare_output_dir, write_atomically, write_text

ENDINGS = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "json": "json"}
"""The formats, and the endings of their files."""

PICTURE = "behaviour.png"


@dataclass(frozen=True)
class SeedRuns:
    """The runs of one seed.

    Attributes:
        row: The name of the row that the seed belongs to.
        task: The key of the task.
        training: The folder of a training with snapshots.
        kernel: The folder of a run that predicted from the kernel.
        with_f0: The same around f₀; None without such a run.
    """

    row: str
    task: str
    training: Path
    kernel: Path
    with_f0: Path | None = None


def make_rows(
    runs: Sequence[SeedRuns], thresholds: Thresholds, split: str
) -> tuple[list[BehaviourRow], dict[Path, UsageError]]:
    """Compute the rows of a table, in the order in which the runs first name them.

    Args:
        runs: The runs of each seed.
        thresholds: What decides the verdicts.
        split: The split that is predicted.

    Returns:
        The rows, and why some trainings are missing in them.
    """
    seeds, problems = {run.row: list[SeedBehaviour]() for run in runs}, dict[Path, UsageError]()
    for run in runs:
        try:
            training, kernel = (_read(folder, run.task) for folder in (run.training, run.kernel))
            with_f0 = None if run.with_f0 is None else _read(run.with_f0, run.task)
            seeds[run.row].append(seed_behaviour(training, kernel, with_f0, split))
        except UsageError as error:
            problems[run.training] = error
    return [behaviour_row(name, found, thresholds) for name, found in seeds.items() if found], problems


def _read(folder: Path, task: str) -> SavedRun:
    found = read_runs(folder)
    return next((run for run in found if run.key == task), found[0])


def write_table(rows: Sequence[BehaviourRow], thresholds: Thresholds, output: Path) -> dict[str, str]:
    """Write a table in every format, and its picture.

    Args:
        rows: From `make_rows`.
        thresholds: What decided the verdicts.
        output: The folder to write to; it is made if necessary.

    Returns:
        The table in each format.
    """
    output = prepare_output_dir(output)
    tables = {form: format_rows(rows, form, thresholds) for form in ENDINGS}
    for form, ending in ENDINGS.items():
        write_text(output / f"behaviour.{ending}", tables[form])
    write_atomically(output / PICTURE, operator.methodcaller("write", behaviour_figure(rows)), durable=False)
    return tables
