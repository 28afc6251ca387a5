"""Tables of whether the kernel describes fine-tuning: text, Markdown, LaTeX, CSV and JSON."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from lmntk.analysis.behaviour import BehaviourRow, SeedBehaviour, Thresholds
from lmntk.analysis.kernel_distances import KernelDistances
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.table_blocks import (
    FORMS,
    Block,
    Cells,
    as_csv,
    as_json,
    format_blocks,
    number,
    percent,
    with_deviation,
)

__all__ = ["FORMS", "format_rows"]

SCORES = {"pretrained": "PT", "kernel": "K", "kernel_with_f0": "K + f₀", "linearised": "lin", "finetuned": "FT"}
"""The columns of the scores: the pre-trained model, the kernel, the linearised and the fine-tuned model."""
VERDICTS = {"solves": "K solves it", "linear": "linearised", "fixed": "fixed features", "whole": "K describes it"}
"""The columns of the verdicts by their attributes."""
NEAR_ZERO = "near zero"
_SHARES = ("logits_distance", "equal_predictions", "agreement", "chi")
_NUMBERS = (*SCORES, "constant", *_SHARES)


def format_rows(rows: Sequence[BehaviourRow], form: str, thresholds: Thresholds) -> str:
    """Write rows as a table with their thresholds.

    Args:
        rows: From `lmntk.analysis.behaviour.behaviour_row`.
        form: One of `FORMS`. CSV and JSON hold all digits, each seed, and fractions instead of percent.
        thresholds: What decided the verdicts.

    Returns:
        The table, which ends with a line break.
    """
    if form == "csv":
        return as_csv([line for row in rows for line in _lines(row, thresholds)])
    if form == "json":
        return as_json({"thresholds": vars(thresholds), "rows": [_as_object(row) for row in rows]})
    return format_blocks(blocks_of_rows(rows, thresholds), notes_of_rows(rows, thresholds), form)


def blocks_of_rows(rows: Sequence[BehaviourRow], thresholds: Thresholds) -> list[Block]:
    """Return the tables of scores, distances and verdicts, numbers as readers want them."""
    left_out = {"kernel_with_f0"} if not any(row.values("kernel_with_f0") for row in rows) else set()
    return [
        Block([_score_cells(row, thresholds, left_out) for row in rows], ("task",)),
        Block([_distance_cells(row, thresholds) for row in rows], ("task",)),
        Block([_verdict_cells(row) for row in rows], ("task", *VERDICTS.values())),
    ]


def _score_cells(row: BehaviourRow, thresholds: Thresholds, left_out: Collection[str]) -> Cells:
    scores = {
        column: with_deviation(percent(row.mean(name)), percent(row.deviation(name))) + _count(row, name)
        for name, column in SCORES.items()
        if name not in left_out
    }
    recoveries = row.recoveries
    return {
        "task": row.name,
        "seeds": str(len(row.seeds)),
        **scores,
        "constant": percent(row.mean("constant")),
        f"K/FT (≥ {thresholds.ratio:g})": number(row.ratio),
        f"recovery (≥ {thresholds.recovery:g})": number(row.recovery, ".2f"),
        "by seed": with_deviation(
            number(sum(recoveries) / len(recoveries) if recoveries else None, ".2f"),
            number(row.recovery_deviation, ".2f"),
        ),
        "undefined": str(len(row.seeds) - len(recoveries)),
    }


def _count(row: BehaviourRow, name: str) -> str:
    """Say how many of the row's seeds a mean is of, if it is not of all."""
    count = len(row.values(name))
    return "" if count in (0, len(row.seeds)) else f" [{count} of {len(row.seeds)}]"


def _distance_cells(row: BehaviourRow, thresholds: Thresholds) -> Cells:
    return {
        "task": row.name,
        "logits distance": number(row.mean("logits_distance")),
        "lin = FT": percent(row.mean("equal_predictions")),
        "K = FT": percent(row.mean("agreement")),
        "χ": number(row.mean("chi")),
        **distance_cells(row.distances, f" (< {thresholds.distance:g})"),
    }


def distance_cells(found: KernelDistances | None, threshold: str = "") -> Cells:
    """Return the cells of how far a kernel has moved; dashes without kernels."""
    columns = (f"relative distance{threshold}", "median", NEAR_ZERO, "Frobenius", "CKA")
    if found is None:
        return dict.fromkeys(columns, number(None))
    sizes = [number(value, ".3g") for value in (found.mean, found.median, found.frobenius)]
    cells = (*sizes[:2], f"{found.near_zero} of {found.entries}", sizes[2], number(found.cka, ".4f"))
    return dict(zip(columns, cells, strict=True))


def _verdict_cells(row: BehaviourRow) -> Cells:
    return {"task": row.name} | {column: getattr(row, name).answer for name, column in VERDICTS.items()}


def notes_of_rows(rows: Sequence[BehaviourRow], thresholds: Thresholds) -> list[str]:
    """Explain the columns, and why verdicts are undecided."""
    seeds = [seed for row in rows for seed in row.seeds]
    splits = " and ".join(dict.fromkeys(seed.split for seed in seeds))
    metrics = " or ".join(dict.fromkeys(METRIC_NAMES.get(seed.metric, seed.metric) for seed in seeds))
    deviations = "mean (sd) over seeds" if any(len(row.seeds) > 1 for row in rows) else "of one seed"
    notes = [
        f"PT, K, lin, FT: {metrics} of the pre-trained model, the kernel, the linearised and the fine-tuned model on "
        f"{splits}, in percent, {deviations}.",
        f"constant: the best constant prediction; a score is above another by {thresholds.standard_errors:g} standard "
        "errors of the test set.",
        "recovery: (lin − PT) / (FT − PT) of the means, then of the seeds; undefined: seeds where FT is not above PT.",
        "logits distance: ‖FT − lin‖ / ‖FT − PT‖; lin = FT, K = FT: equal predictions in percent; χ: the mean of "
        "1 − p(label) on train at θ₀.",
        "relative distance: the mean of |K(θ_T) − K(θ₀)| / |K(θ₀)| over train × train, and its median; Frobenius: the "
        "same of the norms.",
    ]
    reasons = {
        f"{row.name}, {column}: {verdict.answer}, since {verdict.reason}."
        for row in rows
        for name, column in VERDICTS.items()
        if (verdict := getattr(row, name)).reason and name != "whole"
    }
    return notes + sorted(reasons)


def _lines(row: BehaviourRow, thresholds: Thresholds) -> list[dict[str, Any]]:
    """Return a line for each seed, and one of the means with the verdicts."""
    lines = [_line(row, seed) for seed in row.seeds]
    means = {name: row.mean(name) for name in _NUMBERS} | {f"{name}_sd": row.deviation(name) for name in SCORES}
    mean = _line(row, row.seeds[0]) | {"seed": "mean", **means} | _of_distances(row.distances)
    mean |= {f"error_{name}": row.mean_error(name) for name in row.seeds[0].errors}
    mean |= {"ratio": row.ratio, "recovery": row.recovery, "recoveries_defined": len(row.recoveries)}
    mean |= {name: str(getattr(row, name)) for name in VERDICTS}
    return [*lines, mean | {f"threshold_{name}": value for name, value in vars(thresholds).items()}]


def _line(row: BehaviourRow, seed: SeedBehaviour) -> dict[str, Any]:
    names = ("task", "metric", "split", "examples", "seed", "formula", "optimizer", "last_step", *_NUMBERS)
    line = {"name": row.name} | {name: getattr(seed, name) for name in (*names, "ratio", "recovery")}
    line |= {f"error_{name}": value for name, value in seed.errors.items()}
    return line | _of_distances(seed.distances)


def _of_distances(found: KernelDistances | None) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(KernelDistances)]
    return {f"distance_{name}": getattr(found, name, None) for name in names}


def _as_object(row: BehaviourRow) -> dict[str, Any]:
    """Return a row as JSON has it."""
    distances = row.distances
    return {
        "name": row.name,
        "verdicts": {name: dataclasses.asdict(getattr(row, name)) for name in VERDICTS},
        "mean": {name: row.mean(name) for name in _NUMBERS},
        "standard_deviation": {name: row.deviation(name) for name in _NUMBERS},
        "errors": {name: row.mean_error(name) for name in row.seeds[0].errors},
        "ratio": row.ratio,
        "recovery": row.recovery,
        "recoveries": row.recoveries,
        "distances": distances and dataclasses.asdict(distances),
        "seeds": [dataclasses.asdict(seed) | {"ratio": seed.ratio, "recovery": seed.recovery} for seed in row.seeds],
    }
