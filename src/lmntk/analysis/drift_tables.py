"""Tables of the drift of a training: text, Markdown, LaTeX, CSV and JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lmntk.analysis.behaviour_tables import NEAR_ZERO, distance_cells
from lmntk.analysis.drift import NUMBERS, Drift, DriftStep, mean_drift
from lmntk.analysis.kernel_distances import KernelDistances
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.table_blocks import Block, Cells, as_csv, as_json, format_blocks, number, percent


def format_drift(drifts: Sequence[Drift], form: str) -> str:
    """Write the drift of trainings as a table of their mean.

    Args:
        drifts: From `lmntk.analysis.drift.drift_of_runs`.
        form: One of `lmntk.analysis.table_blocks.FORMS`. CSV and JSON hold all digits, each training, and fractions
            instead of percent.

    Returns:
        The table, which ends with a line break.
    """
    mean = mean_drift(drifts)
    if form == "csv":
        shown = drifts if len(drifts) == 1 else [*drifts, mean]
        return as_csv([_line(drift, step) for drift in shown for step in drift.steps])
    if form == "json":
        trainings = [{"name": drift.name, "steps": [_as_object(step) for step in drift.steps]} for drift in drifts]
        facts = {"task": mean.task, "metric": mean.metric, "split": mean.split, "remarks": list(mean.remarks)}
        return as_json(facts | {"mean": [_as_object(step) for step in mean.steps], "trainings": trainings})
    return format_blocks(blocks_of_drift(mean), notes_of_drift(mean), form)


def blocks_of_drift(drift: Drift) -> list[Block]:
    """Return the tables of scores and, where there are kernels, of their distances, numbers as readers want them."""
    blocks = [Block([_score_cells(step) for step in drift.steps], ())]
    if not all(math.isnan(step.effective_rank) and step.distances is None for step in drift.steps):
        blocks.append(Block([_kernel_cells(step) for step in drift.steps], ()))
    return blocks


def _score_cells(step: DriftStep) -> Cells:
    """Return the cells of a step's scores and logits."""
    cells = {"step": str(step.step), "train loss": number(step.train_loss, ".3g")}
    for split in step.scores:
        cells |= {f"f {split}": percent(step.scores[split]), f"lin {split}": percent(step.linearised_scores[split])}
    return cells | {
        "recovery": number(step.recovery, ".2f"),
        "logits distance": number(step.logits_distance),
        "lin = f": percent(step.equal_predictions),
        "signs": number(step.sign_share),
    }


def _kernel_cells(step: DriftStep) -> Cells:
    """Return the cells of a step's kernel."""
    distances = distance_cells(step.distances)
    return {
        "step": str(step.step),
        **{column: cell for column, cell in distances.items() if column != NEAR_ZERO},
        "alignment": number(step.alignment),
        "effective rank": number(step.effective_rank, ".2f"),
    }


def notes_of_drift(drift: Drift) -> list[str]:
    """Explain the columns."""
    remarks = [f"{remark[0].upper()}{remark[1:]}." for remark in drift.remarks]
    if found := next((step.distances for step in drift.steps if step.distances), None):
        remarks.insert(0, f"{found.near_zero} of {found.entries} entries of K(θ₀) are near zero.")
    metric = METRIC_NAMES.get(drift.metric, drift.metric)
    return [
        f"{drift.name}: f, lin: {metric} of the model and of its linearisation at θ₀, in percent.",
        f"On {drift.split}: recovery: (lin − PT) / (f − PT); logits distance: ‖f − lin‖ / ‖f − f₀‖; lin = f: equal "
        "predictions in percent.",
        "signs: the share of trained parameters whose step has the sign opposite to their gradient's.",
        "relative distance: the mean of |K(θ) − K(θ₀)| / |K(θ₀)| over train × train, and its median; Frobenius: the "
        "same of the norms; alignment: with the labels.",
        *remarks,
    ]


def _line(drift: Drift, step: DriftStep) -> dict[str, Any]:
    line: dict[str, Any] = {"training": drift.name, "task": drift.task, "split": drift.split, "step": step.step}
    line |= {f"score_{split}": value for split, value in step.scores.items()}
    line |= {f"linearised_{split}": value for split, value in step.linearised_scores.items()}
    line |= {"recovery": step.recovery} | {name: getattr(step, name) for name in NUMBERS}
    names = [field.name for field in dataclasses.fields(KernelDistances)]
    return line | {f"distance_{name}": getattr(step.distances, name, None) for name in names}


def _as_object(step: DriftStep) -> dict[str, Any]:
    distances = step.distances and dataclasses.asdict(step.distances)
    return vars(step) | {"distances": distances}
