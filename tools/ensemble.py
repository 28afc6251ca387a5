#!/usr/bin/env python
"""Average the logits of several models, each seed's best trial of each, and score them on the test set.

Runs with --save_logit, --model_id 0, 1, ... and an --array_id of their own leave the logits that this reads. Numbers
are percentages; the standard deviation is the population's (divided by the number of seeds), as published.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from gather_result import Parser, as_numbers, counted, find_trials, note, percent, spread
from lmntk.config.tool_parser import exit_status
from lmntk.data.examples import read_examples, split_file
from lmntk.data.metrics import compute_metrics
from lmntk.data.tasks import Task, custom_task, find_task
from lmntk.errors import UsageError
from lmntk.prompts.prompt_files import read_mapping
from lmntk.runs.log import Run, Trial, best_trial, data_seed, keys_of, read_log
from lmntk.storage.readers import read_npy

DEFAULT_FOLDER = "ensemble_predict_results"
TOLERANCE = 1e-6  # of a score computed anew, in another number type


def task_of_run(run: Run, name: str) -> Task:
    """Look up a task by its name, or make it of what a run on a user's own data noted.

    Raises:
        UsageError: There is no such task, or the run noted no labels.
    """
    columns = run.get("custom_columns")
    if columns is None:
        return find_task(name)
    labels = tuple(read_mapping(str(run.get("mapping"))))
    if not labels:
        raise UsageError(
            f"the runs of {name} were without label words (--few_shot_type finetune), so that the log does not tell "
            "the order of its labels: ensembles of one's own data are made of runs with prompts"
        )
    return custom_task(columns, labels, name)


def choose(trials: Sequence[Trial], n_models: int) -> dict[str, list[Trial]]:
    """Choose by dev metric the trial of each model, data seed by data seed; notes what left no logits.

    Raises:
        UsageError: A model has no run for a seed, or the runs of a seed are on different data.
    """
    numbered = [trial for trial in trials if trial.run.get("model_id") in range(n_models) and "array_id" in trial.run]
    saved = [trial for trial in numbered if trial.run.get("save_logit", True)]  # older logs lack it
    if not saved:
        raise UsageError(
            f"none of the {len(trials)} matching runs has saved logits, an array_id and a model_id below --n_models "
            f"{n_models}: run with --save_logit --model_id 0 --array_id 0, and so on"
        )
    if len(saved) < len(numbered):
        note(f"{len(numbered) - len(saved)} of {len(numbered)} runs were without --save_logit: left out")
    by_seed: dict[str, dict[int, list[Trial]]] = {}
    for trial in saved:
        by_seed.setdefault(data_seed(trial.run), {}).setdefault(int(trial.run["model_id"]), []).append(trial)
    chosen = {}
    for seed in sorted(by_seed, key=as_numbers):
        for model in range(n_models):
            if model not in by_seed[seed]:
                raise UsageError(
                    f"seed {seed} has no run with model_id {model}: run it with --save_logit --model_id {model}, "
                    "lower --n_models, or leave the seed out by 'data_dir' in --condition"
                )
        chosen[seed] = [best_trial(by_seed[seed][model]).trial for model in range(n_models)]
        folders = sorted({str(trial.run.get("data_dir", "")).rstrip("/") for trial in chosen[seed]})
        if len(folders) > 1:
            raise UsageError(f"seed {seed} has runs on {' and '.join(folders)}: choose with 'data_dir' in --condition")
    return chosen


def logits_file(run: Run, task: Task, folder: str | None) -> Path:
    """Where a run's logits lie: in the folder asked for, or the one that the run noted."""
    name = f"{task.key}-{run['model_id']}-{run['array_id']}.npy"
    return Path(folder or run.get("save_logit_dir") or DEFAULT_FOLDER) / name


def load_logits(path: Path, task: Task, examples: int) -> np.ndarray:
    """Read the logits of one run.

    Args:
        path: From `logits_file`.
        task: Whose number of labels the columns must fit.
        examples: How many rows there must be.

    Returns:
        Float64 [X, C], C being 1 for a regression task or for two classes as one logit.

    Raises:
        UsageError: The file is missing, damaged, or holds anything else.
    """
    again = "run that model again with --save_logit, or give the right --save_logit_dir"
    try:
        logits = read_npy(path)
    except FileNotFoundError as error:
        raise UsageError(f"there are no logits {path}: {again}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is no file of logits: {again}") from error
    columns = {1} if task.regression else {len(task.labels), 1 if len(task.labels) == 2 else len(task.labels)}
    shape = list(logits.shape)
    if len(shape) != 2 or shape[0] != examples or shape[1] not in columns:
        wanted = " or ".join(str([examples, count]) for count in sorted(columns))
        raise UsageError(f"{path} holds an array of shape {shape}, where {wanted} is wanted: {again}")
    if logits.dtype.kind not in "fiu" or not np.isfinite(logits).all():
        raise UsageError(f"{path} holds what is no finite number: {again}")
    return logits.astype(np.float64)


def predict(logits: np.ndarray, task: Task) -> np.ndarray:
    """Turn logits [X, C] into class ids [X], or into scores for a regression task."""
    if task.regression:
        return logits[:, 0]
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(axis=1)


def read_labels(task: Task, data_dir: str) -> list[float]:
    """Read the class ids, or the scores, of the test examples."""
    examples = read_examples(task, split_file(task, data_dir, "test"))
    return [float(item.label) if task.regression else task.labels.index(item.label) for item in examples]


def ensemble(chosen: Sequence[Trial], files: Sequence[Path], task: Task, key: str) -> dict[str, float]:
    """Average the logits of the chosen trials and judge what they predict together.

    Args:
        chosen: One of each model, all on the same data.
        files: Their logits.
        task: Theirs.
        key: Under which name each has its test metric in the log.

    Raises:
        UsageError: A file cannot be used, or alone does not reach what its run noted.
    """
    labels = read_labels(task, str(chosen[0].run.get("data_dir", "")))
    logits = [load_logits(file, task, len(labels)) for file in files]
    if len({array.shape for array in logits}) > 1:
        told = ", ".join(f"{file} {array.shape[1]}" for file, array in zip(files, logits, strict=True))
        raise UsageError(f"logits of different numbers of columns cannot be averaged ({told}): choose runs of one kind")
    for trial, file, array in zip(chosen, files, logits, strict=True):
        scored = metric_of(key, compute_metrics(task, predict(array, task), labels))
        same = math.isclose(scored, trial.test, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        if not same and not (math.isnan(scored) and math.isnan(trial.test)):
            raise UsageError(
                f"{file} scores {scored:.7g}, but its run ({trial.run.get('output_dir')}) noted {trial.test:.7g} as "
                f"{key}: the logits are another run's, or the test set is another; run that model again with "
                "--save_logit, or give the right --save_logit_dir"
            )
    return compute_metrics(task, predict(np.mean(logits, axis=0), task), labels)


def check_owners(
    chosen: dict[str, list[Trial]], trials: Sequence[Trial], runs: Sequence[Run], task: Task, folder: str | None
) -> None:
    """Make sure that the logits which lie in a chosen run's file are that run's.

    Args:
        chosen: From `choose`.
        trials: The matching ones, whose logits all lie in `folder` where one is given.
        runs: All of the log: others have written where they noted.
        task: Theirs.
        folder: As in `logits_file`.

    Raises:
        UsageError: A later run has written the same file: its numbers would pass for the chosen run's.
    """
    matching = {id(trial.run) for trial in trials}
    last: dict[Path, Run] = {}
    for run in runs:
        is_matching = id(run) in matching
        # Older logs do not say whether logits were saved. A run of mnli leaves those of mnli-mm too.
        has_written = run.get("save_logit", is_matching) and {"model_id", "array_id"} <= run.keys()
        if has_written and (is_matching or any(key.startswith(f"{task.key}_test_eval_") for key in run)):
            last[logits_file(run, task, folder if is_matching else None).absolute()] = run
    for seed, best in chosen.items():
        for trial in best:
            path = logits_file(trial.run, task, folder)
            writer = last[path.absolute()]
            if writer is not trial.run:
                raise UsageError(
                    f"{path} was written again after the chosen run of seed {seed} "
                    f"({trial.run.get('output_dir')}), by {writer.get('output_dir')}: give every run its own "
                    "--array_id or --save_logit_dir"
                )


def metric_of(key: str, metrics: dict[str, float]) -> float:
    """Return the metric that a key of the log names.

    Raises:
        UsageError: The task has none of that name.
    """
    name = key.rpartition("_test_eval_")[2]
    if name not in metrics:
        raise UsageError(f"--test_key {key}: an ensemble is judged by {', '.join(metrics)}")
    return metrics[name]


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--n_models", type=int, required=True, metavar="N", help="models, with model_id 0 to N - 1")
    parser.add_argument(
        "--save_logit_dir", help=f"where the logits lie (where the run put them, else {DEFAULT_FOLDER})"
    )
    arguments = parser.read(argv)
    if arguments.n_models < 1:
        raise UsageError(f"--n_models {arguments.n_models}: an ensemble needs at least one model")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Print what each model reaches alone, and what they reach together."""
    arguments = read_arguments(argv)
    runs = read_log(arguments.log)
    found = find_trials(runs, arguments)
    if len(found) > 1:
        raise UsageError(f"the runs are of {', '.join(found)}: give one 'task_name' in --condition")
    ((asked, trials),) = found.items()
    task = task_of_run(trials[-1].run, asked.partition("/")[0])
    chosen = choose(trials, arguments.n_models)
    check_owners(chosen, trials, runs, task, arguments.save_logit_dir)
    usual = keys_of(asked, task.key)
    test_key = arguments.test_key or usual.test
    keys = [test_key, arguments.test_key2 or usual.second]
    results = []
    for best in chosen.values():
        files = [logits_file(trial.run, task, arguments.save_logit_dir) for trial in best]
        metrics = ensemble(best, files, task, test_key)
        results.append([metric_of(key, metrics) for key in keys if key])
    for model in range(arguments.n_models):
        models = [best[model] for best in chosen.values()]
        second = "" if models[0].second is None else f"; second metric {spread([trial.second for trial in models])}"
        dev, test = spread([trial.dev for trial in models]), spread([trial.test for trial in models])
        print(f"model {model}: dev {dev}; test {test}{second}")
    for seed, values in zip(chosen, results, strict=True):
        second = f", second metric {percent(values[1])}" if len(values) > 1 else ""
        print(f"seed {seed}: test {percent(values[0])}{second}")
    size = f"{counted(len(chosen), 'seed')}, {counted(arguments.n_models, 'model')}"
    for name, values in zip(("", "second metric "), zip(*results, strict=True), strict=False):
        print(f"ensemble: {name}{spread(values)}, {size}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
