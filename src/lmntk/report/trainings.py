"""The section of a report on trainings with snapshots: whether the kernel describes them."""

from collections.abc import Sequence
from dataclasses import dataclass

from pandas import DataFrame

from lmntk.analysis.behaviour import BehaviourRow, Thresholds, behaviour_row, seed_behaviour
from lmntk.analysis.behaviour_tables import blocks_of_rows, notes_of_rows
from lmntk.analysis.drift import Drift, training_drift
from lmntk.analysis.drift_tables import blocks_of_drift, notes_of_drift
from lmntk.analysis.summary import RunSummary
from lmntk.analysis.table_blocks import Block, number
from lmntk.analysis.trainings import Training
from lmntk.errors import KernelMismatchError, UsageError
from lmntk.report.drift import drift_figure
from lmntk.report.elements import Picture, html_figure, html_table
from lmntk.report.formatting import escaped
from lmntk.storage.training_snapshots import find_snapshots

TITLE = "Does the kernel describe this training?"


@dataclass(frozen=True)
class TrainingView:
    """A training with snapshots, and the kernels beside it.

    Attributes:
        name: What to call the run.
        drift: Its numbers by step; None where there is one step only.
        rows: A row for each kernel run that belongs to it, by the name of that run.
        remarks: Sentences on what is missing.
    """

    name: str
    drift: Drift | None
    rows: Sequence[BehaviourRow]
    remarks: Sequence[str]


def view_trainings(summaries: Sequence[RunSummary]) -> list[TrainingView]:
    """Compute the drift of each training with snapshots, and compare it with the kernel runs beside it.

    Args:
        summaries: The runs of one task.

    Raises:
        UsageError: A snapshot is damaged.
    """
    kernels = [summary for summary in summaries if summary.run.record.get("trainer") == "kernel"]
    return [_view(summary, kernels) for summary in summaries if find_snapshots(summary.run.paths)]


def _view(summary: RunSummary, kernels: Sequence[RunSummary]) -> TrainingView:
    """Compute the numbers of a training; what a stopped training lacks is remarked."""
    steps = [path.name for path in find_snapshots(summary.run.paths)]
    if len(steps) < 2 or summary.run.paths.snapshot(0).name not in steps:
        missing = f"{summary.run.folder} does not hold snapshots of step 0 and of another step."
        return TrainingView(summary.name, None, (), [missing])
    split = next((name for name in ("test", "dev") if name in Training.of_run(summary.run).first.splits), "train")
    drift = training_drift(summary.run, summary.name, split)
    rows, mismatches, others = [], [], []
    for kernel in kernels:
        try:
            seed = seed_behaviour(summary.run, kernel.run, split=split)
            rows.append(behaviour_row(kernel.name, [seed], Thresholds()))
        except KernelMismatchError as error:
            mismatches.append(f"{kernel.name} is not compared: {error}.")
        except UsageError as error:
            others.append(f"{kernel.name} is not compared: {error}.")
    # Among runs of several seeds or formulas, most kernels belong to another training.
    return TrainingView(summary.name, drift, rows, [*others, *([] if rows else mismatches)])


def training_section(view: TrainingView, named: bool) -> tuple[str, bytes | None]:
    """Write the section of a training.

    Args:
        view: From `view_trainings`.
        named: Whether the page has several runs.

    Returns:
        The HTML and the bytes of the picture; None without a drift.
    """
    heading = f"{TITLE} ({escaped(view.name)})" if named else TITLE
    parts, png = [f"<h3>{heading}</h3>"], None
    notes = list(view.remarks)
    if view.rows:
        parts += [_table(block) for block in blocks_of_rows(view.rows, Thresholds())]
        notes += notes_of_rows(view.rows, Thresholds())
    if view.drift is not None:
        parts += [_table(block) for block in blocks_of_drift(view.drift)]
        notes += notes_of_drift(view.drift)
        png = drift_figure(view.drift)
        last = view.drift.steps[-1]
        recovered = f"after {last.step} steps the recovery is {number(last.recovery, '.2f')}"
        caption = f"{recovered} and the distance of the logits {number(last.logits_distance, '.2f')}"
        alt = "Scores, distances of the linearisation and of the kernel, alignment and rank against the step"
        parts.append(html_figure(Picture(png, alt, caption), view.name if named else "", wide=True))
    parts.append('<ul class="note">' + "".join(f"<li>{escaped(note)}</li>" for note in notes) + "</ul>")
    return f"<section>{''.join(parts)}</section>", png


def _table(block: Block) -> str:
    rows = [{escaped(name): escaped(cell) for name, cell in row.items()} for row in block.rows]
    return html_table(DataFrame(rows), words=[escaped(name) for name in block.words])
