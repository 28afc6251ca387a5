"""A finished run, read from the folder that it left: its arguments, metrics, predictions, kernels and sentences."""

import ast
import csv
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis.saved_kernel import SavedKernel
from lmntk.data.examples import read_examples
from lmntk.data.tasks import TASKS, Task, custom_task, described_task, find_task
from lmntk.errors import FileError
from lmntk.solvers.problem import Array
from lmntk.storage import diagonal_files, kernel_files, kernel_metadata, kernel_slices, logits_files
from lmntk.storage.paths import RunPaths, Split
from lmntk.storage.readers import read_json

MODES = ("train", "dev", "test")
_KERNEL = re.compile(r"(train|dev|test)_kernels_(.+)\.pt")
_OTHERS = (
    *(r"()run_(.+)\.json", r"(dev|test)_predictions_(.+)\.csv", r"(eval|test)_results_(.+)\.txt"),
    r"(step)-\d+_(.+)\.safetensors",
)
REPEAT = "repeat the run's command"


class TextsUnavailableError(FileError):
    """The sentences of a kernel's examples cannot be shown; data: ``path``."""


@dataclass(frozen=True)
class Predictions:
    """A run's predictions of a split.

    Attributes:
        labels: Class ids, or scores of a regression task, [X].
        predicted: The predicted class ids or scores, [X].
    """

    labels: Array
    predicted: Array


@dataclass(frozen=True)
class SavedRun:
    """The files of one task in the folder of a run; each is read when it is asked for.

    Attributes:
        folder: The folder.
        key: The task in file names.
        record: The arguments and metrics of the run; empty if the folder has no record.
        metrics: The metrics of each split, as in the result files.
    """

    folder: Path
    key: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]

    @property
    def paths(self) -> RunPaths:
        """The names of the run's files, which may be missing."""
        return RunPaths(self.folder, self.key)

    @property
    def kernel_paths(self) -> RunPaths:
        """The names of the files in `kernel_folder`."""
        return RunPaths(self.kernel_folder, self.key)

    @functools.cached_property
    def kernel_folder(self) -> Path:
        """The folder of the kernels: the run's own, or the one that the run loaded them from."""
        own = any(_KERNEL.fullmatch(path.name) for path in self.folder.glob(f"*_kernels_{self.key}.pt"))
        loaded = self.record.get("load_kernels")
        if own or not loaded:
            return self.folder
        # A relative path counts from the run's working directory: this one, or a folder above the run's.
        places = (Path(), *self.folder.absolute().parents)
        return next((place / str(loaded) for place in places if (place / str(loaded)).is_dir()), Path(str(loaded)))

    @functools.cached_property
    def kernel_splits(self) -> list[str]:
        """The splits that have a kernel, train first and a second test set last; empty without any kernel.

        Raises:
            FileError: There are kernels, but not that of train.
        """
        wanted = [*MODES, *map(str, second_splits(self.key))]
        found = [split for split in wanted if self.kernel_paths.kernel(split).is_file()]
        if found and found[0] != "train":
            train = self.kernel_paths.kernel("train")
            raise FileError(
                f"{self.kernel_folder} holds the kernel of {found[0]}, but no {train.name}, without which nothing can "
                "be predicted: repeat the command that made it",
                path=train,
            )
        return found

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """The description of the train kernel; empty without the kernel or without a description."""
        if not self.kernel_splits:
            return {}
        return kernel_metadata.read_description(self.kernel_paths.kernel("train")) or {}

    @functools.cached_property
    def task(self) -> Task | None:
        """The task from the table of tasks, or that of the user's own data; None if the folder does not describe it."""
        known = next((task for task in TASKS.values() if task.key == self.key), None)
        if known is not None:
            return known
        if "custom_columns" in self.description:
            return described_task(self.description)
        columns, labels = self.record.get("custom_columns"), self._labels_of_user_data()
        return custom_task(columns, labels, self.record["task_name"]) if columns and labels else None

    def _labels_of_user_data(self) -> list[str]:
        """The labels in the order of the logits, from the label words or from the columns of predictions."""
        if self.label_words:
            return list(self.label_words)
        files = map(self.paths.predictions, MODES)
        header = next((_read_csv(file)[0] for file in files if file.is_file()), [])
        return [name.removeprefix("logit_") for name in header if name.startswith("logit_")]

    @functools.cached_property
    def label_words(self) -> dict[str, str]:
        """The label words by label, in the order of the logits; empty if there are none, or none are recorded."""
        words = self.description.get("mapping")
        if words is None:
            try:
                words = ast.literal_eval(self.record.get("mapping", "{}"))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                words = {}
        return {str(label): str(word) for label, word in words.items()} if isinstance(words, dict) else {}

    def kernel(self, split: str) -> SavedKernel:
        """Read the kernel of one of `kernel_splits`, which must match its description and the train kernel."""
        path = self.kernel_paths.kernel(split)
        kernel_metadata.check_one_run(self.kernel_paths.kernel("train"), path)
        return SavedKernel.read(path)

    def diagonal(self, split: str, kernel: SavedKernel | None = None) -> Array | None:
        """Read K(x, x) of the examples of one of `kernel_splits`: of train from its kernel, else from its own file.

        Args:
            split: The split.
            kernel: Its kernel, if it was read before.

        Returns:
            float64 [X, C, C], or [2, X, C, C] of an asymmetric formula; None where there is no file.

        Raises:
            FileError: The file is damaged.
            KernelMismatchError: The file belongs to another kernel.
        """
        kernel = kernel or self.kernel(split)
        if split == "train":
            return np.moveaxis(np.diagonal(kernel.values, axis1=-4, axis2=-2), -1, -3)
        path = self.kernel_paths.diagonal(split)
        found = diagonal_files.load_diagonal(path, kernel.path, kernel.values.shape)
        return None if found is None else found.numpy()

    def untrained_logits(self, split: str) -> Array:
        """Read the untrained model's logits for one of `kernel_splits`, float64 [X, C]; they must match the kernel."""
        places = [paths.logits(split) for paths in (self.paths, self.kernel_paths)]
        path = next(filter(Path.is_file, places), places[-1])
        logits, targets = logits_files.load_logits(path)
        kernel = self.kernel_paths.kernel(split)
        # Logits in the folder of a run that loaded its kernels are that run's own.
        beside = kernel if path.parent == kernel.parent else path.with_name(kernel.name)
        logits_files.check_logits(path, targets, beside, kernel_files.load_kernel(kernel)[1])
        return logits.double().numpy()

    def layer_shares(self) -> dict[str, float]:
        """Return each layer's share of the train kernel's trace, from the input on; empty if layers were not kept."""
        path = self.kernel_paths.layer_kernels("train")
        return kernel_files.trace_shares(kernel_files.load_layer_kernels(path)) if path.is_file() else {}

    def part_names(self, split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return what the parts of a split's kernel are told apart by, and their names; empty if there are none."""
        keys, parts = kernel_slices.open_parts(self.kernel_paths, split, self.description_of(split))
        return keys, tuple(parts)

    def part_kernels(self, split: str) -> dict[str, Array]:
        """Return the parts of a split's kernel by name, read from disk where they are used; empty if none were kept."""
        _, parts = kernel_slices.open_parts(self.kernel_paths, split, self.description_of(split))
        return {name: part.numpy() for name, part in parts.items()}

    def lora_kernels(self, split: str) -> dict[str, Array]:
        """Return the kernels of adapters by the names of their weights, read where they are used; empty if none."""
        adapters = kernel_slices.open_lora(self.kernel_paths, split, self.description_of(split))
        return {name: kernel.numpy() for name, kernel in adapters.items()}

    def description_of(self, split: str) -> Mapping[str, Any]:
        """Return the description of a split's kernel; empty without one."""
        return kernel_metadata.read_description(self.kernel_paths.kernel(split)) or {}

    def layer_results(self) -> list[list[str]]:
        """Return the run's table of what each layer predicts alone, header first; empty if there is none."""
        path = self.paths.layer_results()
        rows = _read_csv(path) if path.is_file() else []
        if any(len(row) != len(rows[0]) for row in rows):
            raise FileError(f"{path} has rows of another length than its header: {REPEAT}", path=path)
        return rows

    def predictions(self, split: str) -> Predictions | None:
        """Read the predictions that the run wrote of a split; None if there are none."""
        path = self.paths.predictions(split)
        task = task_of(split, self.task)
        if task is None or not path.is_file():
            return None
        rows = _read_csv(path)
        try:
            if rows[0][:3] != ["index", "label", "prediction"]:
                raise ValueError("another header")
            pairs = [(row[1], row[2]) for row in rows[1:]]
            convert = float if task.regression else task.labels.index
            numbers = np.array([[convert(text) for text in pair] for pair in pairs], dtype=np.float64).reshape(-1, 2)
        except (ValueError, IndexError) as error:
            raise FileError(f"{path} holds no labels and predictions of {task.name}: {REPEAT}", path=path) from error
        return Predictions(numbers[:, 0], numbers[:, 1]) if len(numbers) else None

    def texts(self, split: str, data_dir: Path | None = None) -> list[tuple[str, ...]]:
        """Read the sentences of the examples of a kernel.

        Args:
            split: ``"train"``, ``"dev"`` or ``"test"``.
            data_dir: The folder that has the data files now; None: where the kernel's description records them.

        Returns:
            One tuple of sentences for each example.

        Raises:
            TextsUnavailableError: The description does not name the file, or the file is missing or has changed.
        """
        try:
            path = self.data_file(split, data_dir)
        except FileError as error:
            raise TextsUnavailableError(f"The sentences are not shown: {error}.", **error.data) from error
        task = task_of(split, self.task)
        assert task is not None  # else there is no file
        return [example.texts for example in read_examples(task, path)]

    def data_file(self, split: str, data_dir: Path | None = None) -> Path:
        """Return the file that the examples of a kernel were read from; arguments as for `texts`.

        Raises:
            FileError: The description does not name it, or it is missing or has changed.
        """
        mode = Split.parse(split).mode
        description = self.kernel(split).description
        name, wanted = (description.get(key, {}).get(mode) for key in ("data_files", "data_sha256"))
        path = data_dir / Path(name).name if data_dir and name else Path(name or "")
        if name is None or wanted is None:
            cause = "the kernel has no description that records them"
        elif task_of(split, self.task) is None:
            cause = f"the files of the task {self.key} cannot be read"
        elif not path.is_file():
            cause = f"{path} is missing: give `data_dir`, the folder that has the data files now"
        elif kernel_metadata.file_hash(path) != wanted:
            cause = f"{path} has changed since the kernel was computed"
        else:
            return path
        raise FileError(cause, path=path)


def read_runs(folder: Path) -> list[SavedRun]:
    """Find the runs in a folder, one for each task.

    Args:
        folder: The output folder of a run, or a folder with kernels of that layout.

    Raises:
        FileError: It is not a folder, or holds neither kernels nor results.
    """
    if not folder.is_dir():
        cause = "is a file" if folder.exists() else "does not exist"
        raise FileError(f"{folder} {cause}: give the folder of a run", path=folder)
    matches = _files_of_runs(folder)
    keys = sorted({found[2] for found in matches})
    second = {split.other_task for key in keys for split in second_splits(key) if split.other_task in keys}
    # The second test set of a task is part of its run; alone, or with a train kernel of its own, it is a task.
    own = {found[2] for found in matches if found[0].startswith(("train_", "run_"))}
    runs = [_read_run(folder, key) for key in keys if key not in second - own]
    if not runs:
        patterns = [f"{depth}/{name}" for depth in ("*", "*/*") for name in ("*_results_*.txt", "*_kernels_*.pt")]
        inside = sorted(path.parent for pattern in patterns for path in folder.glob(pattern))
        raise FileError(
            f"{folder} holds neither kernels nor results of a run (such as test_kernels_sst-2.pt, "
            f"test_results_sst-2.txt): give {inside[0] if inside else 'the folder that `output_dir` named'}",
            path=folder,
        )
    return runs


def holds_run(folder: Path) -> bool:
    """Whether a folder, which need not exist, holds kernels or results of a run."""
    return folder.is_dir() and bool(_files_of_runs(folder))


def _files_of_runs(folder: Path) -> list[re.Match[str]]:
    names = [path.name for path in folder.iterdir()]
    return [found for name in names for pattern in (_KERNEL, *_OTHERS) if (found := re.fullmatch(pattern, name))]


def _read_run(folder: Path, key: str) -> SavedRun:
    paths = RunPaths(folder, key)
    path = paths.record()
    record: Any = {}
    if path.is_file():
        try:
            record = read_json(path)
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict):
            raise FileError(f"{path} is not a JSON object: remove it, or {REPEAT}", path=path)
    splits = ["dev", "test", *map(str, second_splits(key))]
    metrics = {split: _read_metrics(paths.metrics(split)) for split in splits}
    return SavedRun(folder, key, record, {split: found for split, found in metrics.items() if found})


def _read_metrics(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {name: float(value) for name, value in (line.split(" = ") for line in lines)}
    except (OSError, ValueError) as error:
        raise FileError(f"{path} does not hold lines such as 'eval_acc = 0.5': {REPEAT}", path=path) from error


def _read_csv(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise FileError(f"{path} cannot be read as a table: {REPEAT}", path=path) from error


def second_splits(key: str) -> list[Split]:
    """Return a task's second test set, one or none."""
    found = [task.second_test_set.lower() for task in TASKS.values() if task.key == key and task.second_test_set]
    return [Split("test", other) for other in found]


def task_of(split: str, task: Task | None) -> Task | None:
    """Return the task whose labels, files and metric a split of `task` has: another one for a second test set."""
    other = Split.parse(split).other_task
    return find_task(other) if other else task


def label_names(run: SavedRun, count: int) -> list[str]:
    """Name the classes of a run: the label as the files have it, with its label word if that differs.

    Args:
        run: The run, whose task and kernel name the labels.
        count: The number of classes; the task's labels are used if there are as many.
    """
    labels = run.task.labels if run.task is not None and len(run.task.labels) == count else range(count)
    names = [(str(label), run.label_words.get(str(label), "")) for label in labels]
    return [label if word in ("", label) else f"{label} ({word})" for label, word in names]


def distinguishing_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by the parts of their paths between those that all begin with and all end with.

    Examples:
        >>> distinguishing_names([Path("/a/x/16-42"), Path("/a/y/16-42")])
        ['x', 'y']
    """
    parts = [folder.resolve().parts for folder in folders]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shortest = min(map(len, parts))
    begin = next((i for i in range(shortest) if len({path[i] for path in parts}) > 1), shortest)
    end = next((i for i in range(shortest - begin) if len({path[-1 - i] for path in parts}) > 1), 0)
    return ["/".join(path[begin : len(path) - end]) or path[-1] for path in parts]
