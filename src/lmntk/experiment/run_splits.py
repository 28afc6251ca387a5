"""Which splits a run reads, where their examples are, and whether a model is asked about them."""

import logging
from collections.abc import Iterable
from pathlib import Path

from lmntk.config.arguments import ActiveTrainer, TrainingArguments
from lmntk.data.examples import find_user_file, split_file
from lmntk.data.tasks import Task, find_task
from lmntk.storage.kernel_metadata import read_description
from lmntk.storage.paths import RunPaths, Split

logger = logging.getLogger(__name__)


def splits_of(task: Task, training_args: TrainingArguments, data_dir: str) -> list[str]:
    """Return the splits that a run reads; a kernel always has the train examples along its first axis."""
    wanted = {
        "train": training_args.active_trainer != ActiveTrainer.ZERO_SHOT,
        "dev": training_args.do_eval,
        "test": training_args.do_predict,
    }
    splits = [split for split, needed in wanted.items() if needed]
    if training_args.do_predict and task.second_test_set:
        second = find_task(task.second_test_set)
        split = str(Split("test", second.key))
        loaded = training_args.load_kernels  # published kernels belong to the first test set
        needed = (
            Path(data_dir) / second.file_name("test") if loaded is None else RunPaths(loaded, task.key).kernel(split)
        )
        if needed.is_file():
            splits.append(split)
        else:
            logger.warning("there is no %s: the second test set, %s, is left out", needed, second.name)
    return splits


def file_of(task: Task, data_dir: str, split: str) -> Path:
    """Return the file of a split.

    Raises:
        MissingSplitError: There is no such file.
    """
    mode, own = mode_and_task_of(split, task)
    return split_file(own, data_dir, mode)


def place_of(task: Task, data_dir: str, split: str) -> Path:
    """Return the file of a split, whether it exists or not."""
    mode, own = mode_and_task_of(split, task)
    if own.columns:
        return find_user_file(Path(data_dir), mode) or Path(data_dir) / f"{mode}.*"
    return Path(data_dir) / own.file_name(mode)


def mode_and_task_of(split: str, task: Task) -> tuple[str, Task]:
    """Return the mode and the task of a data set: a second test set is the test split of another task."""
    parsed = Split.parse(split)
    return parsed.mode, find_task(parsed.other_task) if parsed.other_task else task


def needs_model(training_args: TrainingArguments, task: Task, splits: Iterable[str]) -> bool:
    """Return whether a model is asked: loaded kernels need none, unless f₀ is needed and is not beside them."""
    folder = training_args.load_kernels
    if folder is None:
        return True
    paths = RunPaths(folder, task.key)
    return training_args.adjust_for_init and not all(paths.logits(split).exists() for split in splits)


def are_described(folder: str | Path, task: Task, splits: Iterable[str]) -> bool:
    """Return whether any of the kernels to load has a description."""
    paths = RunPaths(folder, task.key)
    return any(read_description(paths.kernel(split)) is not None for split in splits)


def stored_splits(folder: str | Path, task: Task, splits: Iterable[str]) -> list[str]:
    """Return some splits, and the others whose kernels are in a folder, in the order in which runs read them."""
    second = [str(Split("test", find_task(task.second_test_set).key))] if task.second_test_set else []
    wanted, paths = set(splits), RunPaths(folder, task.key)
    return [split for split in ("train", "dev", "test", *second) if split in wanted or paths.kernel(split).is_file()]
