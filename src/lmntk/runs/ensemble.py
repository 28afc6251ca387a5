"""Ensembles of several models: the mean of the logits that each seed's best trial of each model left for the test set.

Runs with `save_logit=True`, `model_id` 0, 1, … and a different `array_id` each leave these logits.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmntk.data.examples import read_examples, split_file
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task, custom_task, find_task
from lmntk.errors import DataError, FileError, SettingError
from lmntk.prompts.label_words import read_mapping
from lmntk.runs.gather import as_numbers
from lmntk.runs.log import LogEntry, MetricKeys, Trial, best_trial, data_seed, metric_keys
from lmntk.solvers.problem import predicted_classes
from lmntk.storage.paths import RunPaths
from lmntk.storage.readers import read_npy

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = "ensemble_predict_results"
TOLERANCE = 1e-6
"""How far a score may be from the noted one, which was computed in another number type."""

_REMEDY = "run that model again with `save_logit`, or give the right `save_logit_dir`"


class Ensemble(NamedTuple):
    """What several models reach alone and together, as fractions.

    Attributes:
        members: The chosen trials of each data seed, one for each model.
        scores: The test metric of each data seed's mean logits, and the second metric if the task has two.
    """

    members: dict[str, list[Trial]]
    scores: dict[str, list[float]]


def evaluate_ensemble(
    entries: Sequence[LogEntry],
    found: Mapping[str, Sequence[Trial]],
    num_models: int,
    keys: MetricKeys,
    folder: str | None = None,
) -> Ensemble:
    """Choose the trials, average their logits and score what these predict.

    Args:
        entries: All entries of the log; runs that do not match may have overwritten logits.
        found: The matching trials of one task, from `matching_trials`.
        num_models: The number of models, whose runs have the `model_id` 0 to ``num_models - 1``.
        keys: The keys of metrics that replace the task's own.
        folder: The folder of the logits; by default the one that each run noted.

    Raises:
        DataError: Runs of several tasks match, or a model has no run for a seed.
        FileError: A file of logits cannot be used, or is not the chosen run's.
        SettingError: There is no model, or the test key does not name a metric of the task.
    """
    if num_models < 1:
        sentence = f"`n_models={num_models}`: an ensemble needs at least one model"
        raise SettingError(sentence, setting="n_models", value=num_models)
    if len(found) > 1:
        sentence = f"the runs are of {', '.join(found)}: give one 'task_name' in `condition`"
        raise DataError(sentence, tasks=[*found])
    ((asked, trials),) = found.items()
    task = _task_of_run(trials[-1].entry, asked.partition("/")[0])
    members = _choose_members(trials, num_models)
    _check_writers(members, trials, entries, task, folder)
    usual = metric_keys(asked, task.key)
    test, second = keys.test or str(usual.test), keys.second or usual.second
    scores = {}
    for seed, chosen in members.items():
        metrics = _score_mean(chosen, [_logits_path(trial.entry, task, folder) for trial in chosen], task, test)
        scores[seed] = [_metric(key, metrics) for key in (test, second) if key]
    return Ensemble(members, scores)


def _task_of_run(entry: LogEntry, name: str) -> Task:
    """The task of that name, or one made of what a run on a user's data noted."""
    columns = entry.get("custom_columns")
    if columns is None:
        return find_task(name)
    labels = tuple(read_mapping(str(entry.get("mapping"))))
    if not labels:
        raise DataError(
            f"the runs of {name} had no label words (`few_shot_type=finetune`), so the log does not have the order of "
            "the labels: an ensemble on your own data needs runs with prompts",
            task=name,
        )
    return custom_task(columns, labels, name)


def _choose_members(trials: Sequence[Trial], num_models: int) -> dict[str, list[Trial]]:
    """Each model's best trial on dev, for each data seed."""
    models = range(num_models)
    numbered = [trial for trial in trials if trial.entry.get("model_id") in models and "array_id" in trial.entry]
    saved = [trial for trial in numbered if trial.entry.get("save_logit", True)]  # older logs lack it
    if not saved:
        raise DataError(
            f"none of the {len(trials)} matching runs has saved logits, an array_id and a model_id below "
            f"`n_models={num_models}`: run with `save_logit`, `model_id=0`, `array_id=0`, and so on",
            n_models=num_models,
        )
    if len(saved) < len(numbered):
        without = len(numbered) - len(saved)
        logger.warning("%d of %d runs were without `save_logit`: left out", without, len(numbered))
    by_seed: dict[str, dict[int, list[Trial]]] = {}
    for trial in saved:
        by_seed.setdefault(data_seed(trial.entry), {}).setdefault(int(trial.entry["model_id"]), []).append(trial)
    members = {}
    for seed in sorted(by_seed, key=as_numbers):
        missing = next((model for model in models if model not in by_seed[seed]), None)
        if missing is not None:
            remedy = f"run it with `save_logit` and `model_id={missing}`, lower `n_models`, or exclude the seed"
            sentence = f"seed {seed} has no run with model_id {missing}: {remedy} by 'data_dir' in `condition`"
            raise DataError(sentence, seed=seed, model_id=missing)
        members[seed] = [best_trial(by_seed[seed][model]).trial for model in models]
        folders = sorted({str(trial.entry.get("data_dir", "")).rstrip("/") for trial in members[seed]})
        if len(folders) > 1:
            sentence = f"seed {seed} has runs on {' and '.join(folders)}: choose with 'data_dir' in `condition`"
            raise DataError(sentence, seed=seed, folders=folders)
    return members


def _check_writers(
    members: Mapping[str, Sequence[Trial]],
    trials: Sequence[Trial],
    entries: Sequence[LogEntry],
    task: Task,
    folder: str | None,
) -> None:
    """Check that no later run wrote a chosen run's file: its numbers would pass for those of the chosen run."""
    matching = {id(trial.entry) for trial in trials}
    writers: dict[Path, LogEntry] = {}
    for entry in entries:
        matches = id(entry) in matching
        # Older logs do not say whether logits were saved. A run of mnli saves those of mnli-mm too.
        saved = entry.get("save_logit", matches) and {"model_id", "array_id"} <= entry.keys()
        if saved and (matches or any(key.startswith(f"{task.key}_test_eval_") for key in entry)):
            # Only the matching runs' logits are all in the folder that is given.
            writers[_logits_path(entry, task, folder if matches else None).absolute()] = entry
    for seed, chosen in members.items():
        for trial in chosen:
            path = _logits_path(trial.entry, task, folder)
            writer = writers[path.absolute()]
            if writer is not trial.entry:
                later, remedy = writer.get("output_dir"), "give every run a different `array_id` or `save_logit_dir`"
                run = f"the chosen run of seed {seed} ({trial.entry.get('output_dir')})"
                raise FileError(f"{path} was written again after {run}, by {later}: {remedy}", path=path, writer=later)


def _logits_path(entry: LogEntry, task: Task, folder: str | None) -> Path:
    """The file of a run's logits: in the folder given, or in the one that the run noted."""
    where = folder or entry.get("save_logit_dir") or DEFAULT_FOLDER
    return RunPaths(where, task.key).ensemble("test", entry["model_id"], entry["array_id"])


def _score_mean(members: Sequence[Trial], files: Sequence[Path], task: Task, key: str) -> dict[str, float]:
    """The metrics of what the mean of the logits predicts, after a check that each file scores what its run noted."""
    data_dir = str(members[0].entry.get("data_dir", ""))
    examples = read_examples(task, split_file(task, data_dir, "test"))
    labels = [float(item.label) if task.regression else task.labels.index(item.label) for item in examples]
    logits = [_load_logits(file, task, len(labels)) for file in files]
    if len({array.shape for array in logits}) > 1:
        columns = ", ".join(f"{file} {array.shape[1]}" for file, array in zip(files, logits, strict=True))
        sentence = f"logits with different numbers of columns cannot be averaged ({columns}): choose runs of one kind"
        raise DataError(sentence, files=[*files])
    for trial, file, array in zip(members, files, logits, strict=True):
        score = _metric(key, compute_metrics(task, _predictions(array, task), labels))
        same = math.isclose(score, trial.test, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if not same and not (math.isnan(score) and math.isnan(trial.test)):
            raise FileError(
                f"{file} scores {score:.7g}, but its run ({trial.entry.get('output_dir')}) noted {trial.test:.7g} as "
                f"{key}: the logits are another run's, or the test set has changed; {_REMEDY}",
                path=file,
                score=score,
                noted=trial.test,
            )
    return compute_metrics(task, _predictions(np.mean(logits, axis=0), task), labels)


def _predictions(logits: np.ndarray, task: Task) -> np.ndarray:
    """The class ids [X] of logits [X, C], or the scores of a regression task."""
    return logits[:, 0] if task.regression else predicted_classes(logits)


def _load_logits(path: Path, task: Task, num_examples: int) -> np.ndarray:
    """The logits of one run, float64 [X, C]; C is 1 for a regression task or for two classes as one logit."""
    try:
        logits = read_npy(path)
    except FileNotFoundError as error:
        raise FileError(f"there are no logits {path}: {_REMEDY}", path=path) from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is not a file of logits: {_REMEDY}", path=path) from error
    columns = {1} if task.regression else {len(task.labels), 1 if len(task.labels) == 2 else len(task.labels)}
    shape = list(logits.shape)
    if len(shape) != 2 or shape[0] != num_examples or shape[1] not in columns:
        wanted = " or ".join(str([num_examples, count]) for count in sorted(columns))
        sentence = f"{path} holds an array of shape {shape}, but it must be {wanted}: {_REMEDY}"
        raise FileError(sentence, path=path, shape=shape)
    if logits.dtype.kind not in "fiu" or not np.isfinite(logits).all():
        raise FileError(f"{path} holds values that are not finite numbers: {_REMEDY}", path=path)
    return logits.astype(np.float64)


def _metric(key: str, metrics: Mapping[str, float]) -> float:
    """The metric that a key of the log names."""
    name = key.rpartition("_test_eval_")[2]
    if name not in metrics:
        sentence = f"`test_key={key}` is not a metric of an ensemble: it has {', '.join(metrics)}"
        raise SettingError(sentence, setting="test_key", value=key)
    return metrics[name]
