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

from lmntk.analysis.solver_choice import _SETTINGS, DEFAULTS, OF_FLAGS, OF_RUN, SolverChoice
from lmntk.data.examples import read_examples
from lmntk.data.tasks import TASKS, Task, custom_task, described_task, find_task
from lmntk.errors import UsageError
from lmntk.solvers.problem import Array, ClassIds, SolverSettings, class_ids
from lmntk.storage import kernel_files, kernel_metadata, logits_files, paths
from lmntk.storage.readers import read_json

MODES = ("train", "dev", "test")
_KERNEL = re.compile(r"(train|dev|test)_kernels_(.+)\.pt")
_OTHERS = (r"()run_(.+)\.json", r"(dev|test)_predictions_(.+)\.csv", r"(eval|test)_results_(.+)\.txt")


@dataclass(frozen=True)
class SavedKernel:
    """A kernel file and what it says of itself.

    Attributes:
        path: The file.
        values: [N, C, X, C] or [2, N, C, X, C].
        labels: [X], as the file has them.
        description: What lies beside it; empty where nothing does.
    """

    path: Path
    values: Array
    labels: Array
    description: Mapping[str, Any]

    @property
    def num_logits(self) -> int:
        """C."""
        return self.values.shape[-1]

    @property
    def samples(self) -> tuple[int, int]:
        """How often each example of train, and of the other split, is there: with every template and draw."""
        asked = self.description.get("template")
        templates = len(asked) if isinstance(asked, list) else 1
        draws = (self.description.get("demonstrations") or {}).get("draws", 1)
        both = templates, templates if self.path.name.startswith("train_") else templates * draws
        sizes = self.values.shape[-4], self.values.shape[-2]
        if any(size % samples for size, samples in zip(sizes, both, strict=True)):
            raise UsageError(
                f"{self.path} has {sizes[0]} × {sizes[1]} examples, which are not {both[0]} and {both[1]} samples of "
                "each, as its description says: give the command that made it again, with --overwrite_kernels"
            )
        return both

    @property
    def classes(self) -> ClassIds:
        """The class ids of the examples, each once."""
        return class_ids(self.labels, self.num_logits)[: len(self.labels) // self.samples[1]]

    def each_once(self, matrix: Array) -> Array:
        """Average a matrix of all pairs over the samples of each example: the kernel of the examples' mean logits."""
        of_train, of_x = self.samples
        rows, columns = matrix.shape
        parts = matrix.reshape(of_train, rows // of_train, of_x, columns // of_x)
        return parts.mean(axis=(0, 2))


@dataclass(frozen=True)
class Predictions:
    """What a run predicted of a split.

    Attributes:
        labels: Class ids, or scores of a regression task, [X].
        predicted: Alike.
    """

    labels: Array
    predicted: Array


@dataclass(frozen=True)
class SavedRun:
    """What the folder of a run holds of one task.

    Attributes:
        folder: The folder.
        key: The task in file names.
        record: The arguments and metrics of the run; empty where no file says.
        metrics: The metrics of each split, as in the result files.
    """

    folder: Path
    key: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]

    @functools.cached_property
    def kernel_folder(self) -> Path:
        """Where the kernels are: the folder itself, or the one that the run took them from."""
        own = any(_KERNEL.fullmatch(path.name) for path in self.folder.glob(f"*_kernels_{self.key}.pt"))
        loaded = self.record.get("load_kernels")
        if own or not loaded:
            return self.folder
        # The run's working directory, if the path is relative to one: here, or somewhere above the run's folder.
        places = (Path(), *self.folder.absolute().parents)
        return next((place / str(loaded) for place in places if (place / str(loaded)).is_dir()), Path(str(loaded)))

    @functools.cached_property
    def kernel_splits(self) -> list[str]:
        """The splits whose kernels are there, train first, a second test set last; none without that of train.

        Raises:
            UsageError: There are kernels, but not that of train.
        """
        wanted = [*MODES, *(f"test:{key}" for key in _second_keys(self.key))]
        there = [split for split in wanted if paths.kernel_path(self.kernel_folder, split, self.key).is_file()]
        if there and there[0] != "train":
            raise UsageError(
                f"{self.kernel_folder} holds the kernel of {there[0]}, but no train_kernels_{self.key}.pt, without "
                "which nothing can be predicted: give the command that made it again"
            )
        return there

    @functools.cached_property
    def description(self) -> Mapping[str, Any]:
        """What the kernel of train says of itself; empty where there is none, or no description."""
        if not self.kernel_splits:
            return {}
        return kernel_metadata.read_description(paths.kernel_path(self.kernel_folder, "train", self.key)) or {}

    @functools.cached_property
    def task(self) -> Task | None:
        """The row of the table of tasks, or what the run says of data of the user's own; None where nothing does."""
        known = next((task for task in TASKS.values() if task.key == self.key), None)
        if known is not None:
            return known
        if "custom_columns" in self.description:
            return described_task(self.description)
        columns, labels = self.record.get("custom_columns"), self._labels_of_own_data()
        return custom_task(columns, labels, self.record["task_name"]) if columns and labels else None

    def _labels_of_own_data(self) -> list[str]:
        """The labels that the run tells, in the order of the logits: by its mapping, or by a column for each."""
        if self.label_words:
            return list(self.label_words)
        paths = (paths.predictions_path(self.folder, mode, self.key) for mode in MODES)
        headers = [_read_csv(path)[0] for path in paths if path.is_file()]
        return [name.removeprefix("logit_") for name in (headers or [[]])[0] if name.startswith("logit_")]

    @functools.cached_property
    def label_words(self) -> dict[str, str]:
        """The label words, by label in the order of the logits; empty without, or where nothing says so."""
        words = self.description.get("mapping")
        if words is None:
            try:
                words = ast.literal_eval(self.record.get("mapping", "{}"))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                words = {}
        return {str(label): str(word) for label, word in words.items()} if isinstance(words, dict) else {}

    def kernel(self, split: str) -> SavedKernel:
        """Read a kernel.

        Raises:
            UsageError: It is missing, damaged, or does not go with its description, or with the kernel of train.
        """
        path = paths.kernel_path(self.kernel_folder, split, self.key)
        kernel_metadata.check_one_run(paths.kernel_path(self.kernel_folder, "train", self.key), path)
        values, labels = kernel_files.load_kernel(path)
        return SavedKernel(path, values.numpy(), labels.numpy(), kernel_metadata.read_description(path) or {})

    def untrained_logits(self, split: str) -> Array:
        """Read the logits of the untrained model, [X, C]."""
        places = [paths.logits_path(place, split, self.key) for place in (self.folder, self.kernel_folder)]
        path = next(filter(Path.is_file, places), places[-1])
        logits, targets = logits_files.load_logits(path)
        kernel = paths.kernel_path(self.kernel_folder, split, self.key)
        # Logits in the folder of a run that loaded its kernels are that run's own.
        beside = kernel if path.parent == kernel.parent else path.with_name(kernel.name)
        logits_files.check_logits(path, targets, beside, kernel_files.load_kernel(kernel)[1])
        return logits.double().numpy()

    def layer_shares(self) -> dict[str, float]:
        """Return which part of the train kernel's trace each layer has, from the input on; empty where not kept."""
        path = paths.layer_kernels_path(self.kernel_folder, "train", self.key)
        if not path.is_file():
            return {}
        traces = {
            name: float(np.einsum("...iaia->...", part.numpy()).sum())
            for name, part in kernel_files.load_layer_kernels(path).items()
        }
        whole = sum(traces.values())
        return {name: trace / whole if whole else 0.0 for name, trace in traces.items()}

    def layer_results(self) -> list[list[str]]:
        """Return the table that says how the layers predict alone, its header first; empty where there is none."""
        path = paths.layer_results_path(self.folder, self.key)
        return _read_csv(path) if path.is_file() else []

    def predictions(self, split: str) -> Predictions | None:
        """Read the predictions that the run wrote of a split; None where there are none.

        Raises:
            UsageError: The file is damaged, or of another task.
        """
        path = paths.predictions_path(self.folder, split, self.key)
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
            raise UsageError(
                f"{path} holds no labels and predictions of {task.name}: give the run's command again"
            ) from (error)
        return Predictions(numbers[:, 0], numbers[:, 1]) if len(numbers) else None

    def texts(self, split: str, data_dir: Path | None = None) -> list[tuple[str, ...]] | str:
        """Read the sentences of a split's examples; or say in a sentence why those of the kernel cannot be shown.

        Args:
            split: ``"train"``, ``"dev"``, ``"test"``.
            data_dir: Where the files are now; None: where the kernel's description says.
        """
        mode = paths.mode_and_task(split, self.key)[0]
        description = self.kernel(split).description
        name, wanted = (description.get(key, {}).get(mode) for key in ("data_files", "data_sha256"))
        task = task_of(split, self.task)
        if name is None or wanted is None:
            return "The kernel has no description that says which sentences it is of."
        if task is None:
            return f"The task {self.key} is not one whose files this program reads."
        path = data_dir / Path(name).name if data_dir else Path(name)
        if not path.is_file():
            return f"The sentences are not shown: {path} is not there (--data_dir names the folder that has them now)."
        if kernel_metadata.file_hash(path) != wanted:
            return f"The sentences are not shown: {path} has changed since the kernel was computed."
        return [example.texts for example in read_examples(task, path)]

    def solving(self, given: Mapping[str, Any]) -> SolverChoice:
        """Return how the run predicted from its kernels, or what flags say instead.

        Args:
            given: Values of solver flags by name, None where not given.
        """
        flags = {name: value for name, value in given.items() if value is not None}
        of_run = self.record if self.record.get("trainer") == "kernel" else {}
        settings = {**{name: of_run[name] for name in _SETTINGS if name in of_run}, **flags}
        try:
            numbers: dict[str, Any] = {
                _SETTINGS[name]: float(value) for name, value in settings.items() if _SETTINGS[name]
            }
        except (TypeError, ValueError) as error:
            path = paths.record_path(self.folder, self.key)
            raise UsageError(
                f"{path} holds solver settings that are no numbers: give the run's command again"
            ) from error
        return SolverChoice(
            solver=str(settings.get("kernel_solver", "lstsq")),
            settings=SolverSettings(**numbers),
            adjusts=bool(of_run.get("adjust_for_init")),
            source=OF_FLAGS if flags else OF_RUN if of_run else DEFAULTS,
        )


def read_runs(folder: Path) -> list[SavedRun]:
    """Find what a folder holds, one `SavedRun` for each task.

    Raises:
        UsageError: It is no folder, or one without kernels and results.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is {'a file' if folder.exists() else 'not there'}: give the folder of a run")
    names = [path.name for path in folder.iterdir()]
    matches = [found for name in names for pattern in (_KERNEL, *_OTHERS) if (found := re.fullmatch(pattern, name))]
    keys = sorted({found[2] for found in matches})
    second = {other for key in keys for other in _second_keys(key) if other in keys}
    # The second test set of a task is part of its run; alone, or with a train kernel of its own, it is a task.
    own = {found[2] for found in matches if found[0].startswith(("train_", "run_"))}
    runs = [_read_run(folder, key) for key in keys if key not in second - own]
    if not runs:
        below = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/*_results_*.txt")]
        below += [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/*_kernels_*.pt")]
        inside = sorted(path.parent for path in below)
        raise UsageError(
            f"{folder} holds neither kernels nor results of a run (such as test_kernels_sst-2.pt, "
            f"test_results_sst-2.txt): give {inside[0] if inside else 'the folder that --output_dir named'}"
        )
    return runs


def _read_run(folder: Path, key: str) -> SavedRun:
    path = paths.record_path(folder, key)
    record: Any = {}
    if path.is_file():
        try:
            record = read_json(path)
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict):
            raise UsageError(f"{path} is no JSON object: remove it, or give the run's command again")
    splits = ["dev", "test", *(f"test:{other}" for other in _second_keys(key))]
    metrics = {split: _read_metrics(paths.metrics_path(folder, split, key)) for split in splits}
    return SavedRun(folder, key, record, {split: found for split, found in metrics.items() if found})


def _read_metrics(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return {name: float(value) for name, value in (line.split(" = ") for line in lines)}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} does not hold lines such as 'eval_acc = 0.5': give the run's command again"
        ) from error


def _read_csv(path: Path) -> list[list[str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as a table: give the run's command again") from error


def _second_keys(key: str) -> Sequence[str]:
    """The keys of a task's second test set: one or none."""
    return [task.second_test_set.lower() for task in TASKS.values() if task.key == key and task.second_test_set]


def task_of(split: str, task: Task | None) -> Task | None:
    """Return the task whose labels, files and metric a split of `task` has: its own, but for a second test set."""
    return find_task(split.partition(":")[2]) if ":" in split else task


def label_names(run: SavedRun, count: int) -> list[str]:
    """Name the classes of a run: the label as the files have it, and its label word where that is another.

    Args:
        run: Whose task and kernel say so.
        count: How many classes there are; a task that fits has as many labels.
    """
    labels = run.task.labels if run.task is not None and len(run.task.labels) == count else range(count)
    names = [(str(label), run.label_words.get(str(label), "")) for label in labels]
    return [label if word in ("", label) else f"{label} ({word})" for label, word in names]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Name folders by what tells them apart: the parts of their paths between what all begin and all end with."""
    parts = [folder.resolve().parts for folder in folders]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shortest = min(map(len, parts))
    begin = next((i for i in range(shortest) if len({path[i] for path in parts}) > 1), shortest)
    end = next((i for i in range(shortest - begin) if len({path[-1 - i] for path in parts}) > 1), 0)
    return ["/".join(path[begin : len(path) - end]) or path[-1] for path in parts]
