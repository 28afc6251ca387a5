"""The record of a finished run: metrics, predictions, logits for ensembles, and its line in the log."""

import csv
import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lmntk.config.arguments import DataArguments, ModelArguments, TrainingArguments
from lmntk.data.tasks import Task
from lmntk.experiment.experiment import Evaluation, RunInputs
from lmntk.experiment.provenance import versions
from lmntk.solvers.problem import predicted_classes, two_logits
from lmntk.storage import atomic, logits_files, run_results
from lmntk.storage.paths import RunPaths, Split

logger = logging.getLogger(__name__)


def record_run(
    inputs: RunInputs,
    evaluations: Mapping[str, Evaluation],
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    seconds: float,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the result files and the line in the log, and log where they are.

    Args:
        inputs: What was built from the arguments.
        evaluations: Those of each split that was predicted.
        model_args: The arguments of the model.
        data_args: The arguments of the data.
        training_args: The arguments of the run, as the trainer adapted them.
        seconds: How long the run took.
        facts: What the trainer has to say beyond its arguments, by keys of the record.
    """
    paths = RunPaths(training_args.output_dir, inputs.task.key)
    line = _settings(inputs, model_args, data_args, training_args)
    # A run that is killed from here on must not leave results of two runs side by side.
    for path in [*map(paths.predictions, evaluations), *map(paths.metrics, evaluations), paths.record()]:
        path.unlink(missing_ok=True)
    for split, evaluation in evaluations.items():
        _write_evaluation(paths, inputs, evaluation, training_args, split)
        parsed = Split.parse(split)
        task_key = parsed.other_task or inputs.task.key
        line |= {f"{task_key}_{parsed.mode}_{name}": value for name, value in evaluation.metrics.items()}
    line |= {
        **facts,
        "time": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    run_results.write_record(paths.record(), line)
    run_results.append_log(Path("log"), line)
    logger.info(
        f"results are in {training_args.output_dir}, and a line in {Path('log').resolve()}; {seconds:.0f} s in all"
    )


def _write_evaluation(
    paths: RunPaths, inputs: RunInputs, evaluation: Evaluation, training_args: TrainingArguments, split: str
) -> None:
    """Write the predictions and metrics of a split and, if asked for, the logits of a test split."""
    rows = prediction_rows(inputs.datasets[split].task, evaluation.logits, evaluation.labels.tolist())
    _write_predictions(paths.predictions(split), rows)
    run_results.write_metrics(paths.metrics(split), evaluation.metrics)
    metrics = ", ".join(f"{name} = {value:.6g}" for name, value in evaluation.metrics.items())
    logger.info("%s: %s → %s", split, metrics, paths.metrics(split))
    if training_args.save_logit and Split.parse(split).mode == "test":
        folder = RunPaths(str(training_args.save_logit_dir), inputs.task.key)
        pairs = training_args.save_logit_pairs and not inputs.task.regression
        logits_files.save_array(
            folder.ensemble(split, training_args.model_id, training_args.array_id),
            two_logits(evaluation.logits) if pairs else evaluation.logits,
        )


def prediction_rows(task: Task, averaged: np.ndarray, labels: Sequence[int | float]) -> list[list[str]]:
    """Return the table of a split's predictions: a header, then a row for each example in the order of the file.

    Args:
        task: The task of the split, which spells the labels.
        averaged: Logits ``[X, C]``, or scores ``[X, 1]`` of a regression task.
        labels: Class ids or scores, ``[X]``.
    """
    if task.regression:
        scores = [[str(label), str(value)] for label, value in zip(labels, averaged[:, 0], strict=True)]
        return [["index", "label", "prediction"], *([str(index), *row] for index, row in enumerate(scores))]
    names = ["logit"] if averaged.shape[1] == 1 else [f"logit_{label}" for label in task.labels]
    rows = [["index", "label", "prediction", *names]]
    predicted = predicted_classes(averaged)
    for index, logits in enumerate(averaged):
        spelled = task.labels[int(labels[index])], task.labels[predicted[index]]
        rows.append([str(index), *spelled, *map(str, logits)])
    return rows


def _write_predictions(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def _settings(
    inputs: RunInputs, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments
) -> dict[str, Any]:
    """Return all arguments, completed by the defaults of the task's row."""
    line: dict[str, Any] = {}
    for group in (model_args, data_args, training_args):
        settings = {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
        # The log is shared with others; the hub's token is a password.
        line |= {name: value for name, value in settings.items() if not name.endswith("_token")}
    templates = inputs.prompts.templates
    line |= vars(inputs.prompts.limits) | {
        "template": templates[0] if len(templates) == 1 else list(templates),
        "mapping": str(dict(inputs.prompts.mapping)),
    }
    if inputs.lora is not None:
        line |= {"lora_r": inputs.lora.rank, "lora_alpha": inputs.lora.alpha}
    if inputs.prompts.demonstrations is not None:
        line["num_sample"] = inputs.prompts.num_demonstration_samples
    return line
