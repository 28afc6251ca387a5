"""What a run leaves when it is over: result files, predictions, logits for ensembles, and its line in the log."""

import csv
import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.data.tasks import Task
from lmntk.experiment import provenance
from lmntk.experiment.build import Experiment
from lmntk.solvers.problem import two_logits
from lmntk.storage import atomic, logits_files, run_files
from lmntk.storage.paths import RunPaths, Split

logger = logging.getLogger(__name__)


def record_run(
    run: Experiment,
    metrics: Mapping[str, Mapping[str, float]],
    averaged: Mapping[str, np.ndarray],
    labels: Mapping[str, np.ndarray],
    arguments: Sequence[Any],
    seconds: float,
) -> None:
    """Write the result files and the line in the log, and say where they are.

    Args:
        run: What was built.
        metrics: Those of each split that was predicted.
        averaged: Logits or scores of each, ``[X, C]``, a mean over each example's samples.
        labels: Class ids or scores of each, ``[X]``.
        arguments: The three groups of flags.
        seconds: How long the run took.
    """
    training_args, task_key = arguments[-1], run.task.key
    line = _flags(run, arguments)
    # A run that is killed here must not leave results of two runs side by side.
    paths = RunPaths(training_args.output_dir, task_key)
    for path in [*map(paths.predictions, metrics), *map(paths.metrics, metrics), paths.record()]:
        path.unlink(missing_ok=True)
    for split, values in metrics.items():
        rows = prediction_rows(run.datasets[split].task, averaged[split], labels[split].tolist())
        _write_predictions(paths.predictions(split), rows)
        path = paths.metrics(split)
        run_files.write_metrics(path, values)
        logger.info("%s: %s → %s", split, ", ".join(f"{name} = {value:.6g}" for name, value in values.items()), path)
        mode, task = Split.parse(split).mode, Split.parse(split).other_task or task_key
        line |= {f"{task}_{mode}_{name}": value for name, value in values.items()}
        if training_args.save_logit and mode == "test":
            numbers = training_args.model_id, training_args.array_id
            path = RunPaths(training_args.save_logit_dir, task_key).ensemble(split, *numbers)
            pairs = training_args.save_logit_pairs and not run.task.regression
            logits_files.save_array(path, two_logits(averaged[split]) if pairs else averaged[split])
    line |= {
        "time": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": provenance.versions(),
    }
    run_files.write_record(paths.record(), line)
    run_files.append_log(Path("log"), line)
    logger.info(
        "results are in %s, and a line in %s; %.0f s in all",
        *(training_args.output_dir, Path("log").resolve(), seconds),
    )


def prediction_rows(task: Task, averaged: np.ndarray, labels: Sequence[int | float]) -> list[list[str]]:
    """Lay out the table of a split's predictions, its header first: an example a row, in the order of the file.

    Args:
        task: Whose spelling labels have.
        averaged: Logits ``[X, C]``, or scores ``[X, 1]`` of a regression task, which have no logits beside them.
        labels: Class ids or scores, ``[X]``.
    """
    if task.regression:
        scores = [[str(label), str(value)] for label, value in zip(labels, averaged[:, 0], strict=True)]
        return [["index", "label", "prediction"], *([str(index), *row] for index, row in enumerate(scores))]
    names = ["logit"] if averaged.shape[1] == 1 else [f"logit_{label}" for label in task.labels]
    rows = [["index", "label", "prediction", *names]]
    predicted = two_logits(averaged).argmax(axis=1)
    for index, logits in enumerate(averaged):
        spelled = task.labels[int(labels[index])], task.labels[predicted[index]]
        rows.append([str(index), *spelled, *map(str, logits)])
    return rows


def _write_predictions(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _flags(run: Experiment, arguments: Sequence[Any]) -> dict[str, Any]:
    """All flags, with what the task's row made of those that were not given."""
    line: dict[str, Any] = {}
    for group in arguments:
        flags = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
        # A log is passed on to others; the hub's token is a password.
        line |= {name: value for name, value in flags.items() if not name.endswith("_token")}
    templates = run.prompts.templates
    line |= vars(run.prompts.limits) | {
        "template": templates[0] if len(templates) == 1 else list(templates),
        "mapping": str(dict(run.prompts.mapping)),
    }
    if run.lora is not None:
        line |= {"lora_r": run.lora.rank, "lora_alpha": run.lora.alpha}
    if run.prompts.demonstrations is not None:
        line["num_sample"] = run.prompts.num_demonstration_samples
    return line
