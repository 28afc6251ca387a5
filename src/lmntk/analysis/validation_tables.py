"""Tables of a validation: text, Markdown, LaTeX, CSV and JSON."""

from typing import Any

import numpy as np

from lmntk.analysis.datamodelling import CONFIDENCE, PERMUTATIONS, RESAMPLES, Agreement
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.table_blocks import Block, Cells, as_csv, as_json, format_blocks, number, percent, with_deviation
from lmntk.analysis.validation import ADDED, CHANCE, RESOLVED, RETRAINED, Kind, Validation
from lmntk.storage.wording import quantity

WHAT = {
    RESOLVED: "kernel solved on each subset",
    ADDED: "leave-one-out influences added",
    RETRAINED: "another seed of the training",
    CHANCE: "random order of the subsets",
}
"""The rows by the kind of the prediction."""
TRAINED = "trained"
CEILING = "ceiling of any prediction"
"""The row of `Validation.ceilings`."""


def format_validation(found: Validation, form: str) -> str:
    """Write a validation as a table.

    Args:
        found: From `lmntk.analysis.validation.validate`.
        form: One of `lmntk.analysis.table_blocks.FORMS`. CSV has a row for each example; JSON has everything, the
            outputs of each subset too.

    Returns:
        The table, which ends with a line break.
    """
    if form == "csv":
        return as_csv(_lines(found))
    if form == "json":
        return as_json(_object(found))
    return format_blocks([_block(found)], notes_of(found), form)


def _block(found: Validation) -> Block:
    rows: list[Cells] = []
    for name in (name for name in WHAT if name in found.kinds):
        rows.append(_row(WHAT[name], found.kinds[name]))
        if name == RETRAINED:
            outputs, scores = found.ceilings
            rows.append({"prediction": CEILING, "LDS": number(outputs), "of scores": number(scores)})
    mean, deviation = found.real_scores.mean(), found.real_scores.std(ddof=1) if len(found.real_scores) > 1 else np.nan
    trained = with_deviation(percent(mean), percent(deviation))
    return Block([*rows, {"prediction": "trained on each subset", "mean score": trained}], ("prediction",))


def _row(what: str, kind: Kind) -> Cells:
    cells = {
        "prediction": what,
        "LDS": number(kind.of_outputs.score),
        f"{CONFIDENCE:.0%} interval": _interval(kind.of_outputs),
    }
    if kind.of_scores is not None:
        cells |= {"of scores": f"{number(kind.of_scores.score)} {_interval(kind.of_scores)}"}
    return cells | {"mean score": percent(kind.mean_score), "equal": percent(kind.equal)}


def _interval(found: Agreement) -> str:
    return f"[{number(found.low)}, {number(found.high)}]"


def notes_of(found: Validation) -> list[str]:
    """Explain the table and its columns."""
    trainings = found.trainings
    count, examples = trainings.subsets.shape
    kept = trainings.subsets.sum(axis=1)
    metric = METRIC_NAMES.get(found.metric, found.metric)
    seeds = trainings.logits.shape[1]
    several = f", {seeds} seeds each, whose outputs are averaged" if seeds > 1 else ""
    return [
        f"{found.name}: {quantity(count, 'random subset')} of {kept[0]} of {examples} train examples, half of each "
        f"class; {trainings.optimizer}, learning rate {trainings.rate}, {trainings.max_steps} steps{several}.",
        f"LDS: the linear datamodelling score (Park et al. 2023): Spearman's correlation over the subsets of predicted "
        f"and trained margin of the correct class, mean over the examples of {found.split}; interval: bootstrap over "
        f"subsets ({RESAMPLES} resamples); in the row of random orders the range of {CONFIDENCE:.0%} of "
        f"{PERMUTATIONS} permutations.",
        f"of scores: Spearman's correlation of predicted and trained {metric} on {found.split}, with its interval; "
        f"mean score: mean {metric} over subsets in percent, for trained models with its standard deviation; equal: "
        "the share of predicted classes that are those of the trained models, in percent.",
        *_about_ceiling(found),
        *found.remarks,
    ]


def _about_ceiling(found: Validation) -> list[str]:
    if RETRAINED not in found.kinds:
        return []
    return [
        f"{WHAT[RETRAINED]}: one training against one other, r; {CEILING}: what a prediction without error would reach "
        "against the mean of S seeds, √(S r / (1 + (S − 1) r)) (Spearman 1904; Spearman 1910, Brown 1910), "
        "approximately."
    ]


def _lines(found: Validation) -> list[dict[str, Any]]:
    """A row for each example."""
    lines = []
    for index, label in enumerate(found.classes):
        line: dict[str, Any] = {"run": found.name, "split": found.split, "index": index, "class": int(label)}
        line |= {f"correlation {name}": float(kind.of_outputs.correlations[index])
                 for name, kind in found.kinds.items() if name != RETRAINED}  # fmt: skip
        for name, outputs in ((TRAINED, found.real), *found.predicted.items()):
            line |= {f"mean {name}": float(outputs[:, index].mean()), f"sd {name}": float(outputs[:, index].std())}
        lines.append(line)
    return lines


def _object(found: Validation) -> dict[str, Any]:
    trainings = found.trainings
    return {
        "name": found.name, "task": found.task, "metric": found.metric, "split": found.split,
        "optimizer": trainings.optimizer, "learning_rate": trainings.rate, "max_steps": trainings.max_steps,
        "train_seeds": trainings.logits.shape[1], "remarks": list(found.remarks),
        "ceilings": dict(zip(("of_outputs", "of_scores"), found.ceilings, strict=True)),
        "predictions": {name: _kind(kind) for name, kind in found.kinds.items()},
        "subsets": [np.flatnonzero(kept).tolist() for kept in trainings.subsets],
        "classes": found.classes.tolist(),
        "trained_scores": found.real_scores.tolist(),
        "outputs": {TRAINED: found.real.tolist()} | {name: rows.tolist() for name, rows in found.predicted.items()},
    }  # fmt: skip


def _kind(kind: Kind) -> dict[str, Any]:
    agreements = {"of_outputs": kind.of_outputs, "of_scores": kind.of_scores}
    return {
        "mean_score": kind.mean_score,
        "equal_predictions": kind.equal,
        **{name: found and {"score": found.score, "low": found.low, "high": found.high}
           for name, found in agreements.items()},
        "correlations": kind.of_outputs.correlations.tolist(),
    }  # fmt: skip
