"""Two kernels compared: how far apart they are, how well they are aligned, and whether they predict the same labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis import statistics
from lmntk.analysis.saved_run import SavedKernel, SavedRun, read_runs
from lmntk.analysis.statistics import Array, Comparison
from lmntk.analysis.summary import RunSummary, summarise_run
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.solvers.problem import check_values, class_ids
from lmntk.storage import kernel_files, kernel_metadata, paths

DEFAULT_SOLVER: Mapping[str, Any] = {"kernel_solver": "lstsq", "kernel_regularization": 0.0}


@dataclass(frozen=True)
class SplitComparison:
    """How two kernels of a split, A and B, compare.

    Attributes:
        split: The split.
        kernels: How alike their entries are.
        accuracies: The share of examples that the solver predicts right from A, and from B; None without predictions.
        agreement: The share of examples that both give the same label; None without predictions.
    """

    split: str
    kernels: Comparison
    accuracies: tuple[float, float] | None = None
    agreement: float | None = None

    def cells(self) -> dict[str, str]:
        """Return the row of a table, cells by column; numbers that are unknown are left out."""
        cells = {
            "split": self.split,
            "distance": f"{self.kernels.distance:.3g}",
            "scaled": f"{self.kernels.scaled_distance:.3g}",
            "CKA": f"{self.kernels.alignment:.4f}",
            "correlation": f"{self.kernels.correlation:.4f}",
        }
        if self.accuracies is not None and self.agreement is not None:
            shares = dict(zip(("acc A", "acc B"), self.accuracies, strict=True)) | {"agreement": self.agreement}
            cells |= {column: f"{100 * share:.1f}" for column, share in shares.items()}
        return cells


def compare_paths(
    first: Path, second: Path, settings: Mapping[str, Any] | None = None
) -> tuple[list[SplitComparison], list[str]]:
    """Compare two kernel files, or the kernels in two folders, split by split.

    Kernels of one logit and of two are compared as kernels of the logits' differences, an asymmetric kernel with a
    symmetric one as the mean of its two directions.

    Args:
        first: Kernel A: a folder that a run left, or a kernel file.
        second: Kernel B, of the same kind.
        settings: Solver settings by name that predict from the kernels of two folders; `DEFAULT_SOLVER` where absent
            or None. Two files are compared without predictions and take none.

    Returns:
        The comparison of each split that both have, and notes on what was compared.

    Raises:
        FileError: A path is missing or damaged, or holds no kernels.
        KernelMismatchError: The kernels are of different examples, classes or tasks.
        SettingError: A solver is given for two files.
    """
    given = {name: value for name, value in (settings or {}).items() if value is not None}
    for path in (first, second):
        if not path.exists():
            raise FileError(f"{path} does not exist: give the folder of a run, or a kernel file", path=path)
    if first.is_dir() != second.is_dir():
        raise FileError(f"{first} and {second}: give two folders, or two kernel files", path=second)
    if first.is_dir():
        return compare_folders(first, second, given)
    if given:
        name, value = next(iter(given.items()))
        raise SettingError(
            f"`{name}`: two kernel files without the train kernel predict nothing: give the folders",
            setting=name,
            value=value,
        )
    a, b = read_kernel(first), read_kernel(second)
    comparison, notes = compare_kernels(first.name.partition("_")[0], a, b)
    return [comparison], notes


def compare_folders(first: Path, second: Path, settings: Mapping[str, Any]) -> tuple[list[SplitComparison], list[str]]:
    """Compare every split that two folders have in common, predicting from both with one solver.

    Args:
        first: The folder of kernels A.
        second: The folder of kernels B.
        settings: Solver settings by name; `DEFAULT_SOLVER` where absent.

    Returns:
        The comparison of each split, and notes on what was compared.
    """
    solver = {**DEFAULT_SOLVER, **settings}
    runs = find_runs(first, second)
    check_texts(*(run.kernel("train") for run in runs))  # before anything is predicted
    summaries = [summarise_run(run, str(run.folder), solver, curve=False) for run in runs]
    comparisons, notes = [], []
    for split in runs[0].kernel_splits:
        if split in runs[1].kernel_splits:
            comparison, remarks = compare_kernels(split, runs[0].kernel(split), runs[1].kernel(split), summaries)
            comparisons.append(comparison)
            notes += remarks
    notes.append(
        f"acc and agreement: predictions by {solver['kernel_solver']}, regularisation "
        f"{solver['kernel_regularization']:g}, from both kernels, whatever solver the runs used"
    )
    if solver["kernel_solver"] != "asym" and any(run.kernel("train").values.ndim == 5 for run in runs):
        notes.append("acc and agreement: the first direction of an asymmetric kernel predicts, as in a run")
    return comparisons, list(dict.fromkeys(notes))


def find_runs(first: Path, second: Path) -> list[SavedRun]:
    """Find the runs of one task in two folders.

    Raises:
        FileError: A folder holds no kernels.
        KernelMismatchError: The folders have no task in common, or several.
    """
    found = []
    for folder in (first, second):
        runs = {run.key: run for run in read_runs(folder) if run.kernel_splits}
        if not runs:
            raise FileError(f"{folder} holds no kernels: give the folder of a run of `trainer=kernel`", path=folder)
        found.append(runs)
    common = [key for key in found[0] if key in found[1]]
    if not common:
        raise KernelMismatchError(
            f"{first} has kernels of {', '.join(found[0])} and {second} of {', '.join(found[1])}: give two folders of "
            "one task, or two kernel files",
            path=second,
            differences=["task"],
        )
    if len(common) > 1:
        raise KernelMismatchError(
            f"{first} and {second} both hold kernels of {', '.join(common)}: give two kernel files, such as "
            f"{paths.kernel_path(first, 'test', common[0])}",
            path=second,
            differences=common,
        )
    return [runs[common[0]] for runs in found]


def read_kernel(path: Path) -> SavedKernel:
    """Read a kernel file.

    Raises:
        FileError: It is missing or damaged.
    """
    values, labels = kernel_files.load_kernel(path)
    return SavedKernel(path, values.numpy(), labels.numpy(), kernel_metadata.read_description(path) or {})


def compare_kernels(
    split: str, a: SavedKernel, b: SavedKernel, summaries: Sequence[RunSummary] = ()
) -> tuple[SplitComparison, list[str]]:
    """Compare the kernels of a split, and the predictions from them where both runs have some.

    Args:
        split: What to call it.
        a: Kernel A.
        b: Kernel B, of the same examples.
        summaries: The summaries of the runs of A and of B; none for kernels without predictions.

    Returns:
        The comparison, and notes on what was compared.

    Raises:
        NotFiniteError: A kernel holds NaN or infinity.
        KernelMismatchError: The kernels are of different examples or classes.
    """
    for kernel in (a, b):
        _check_finite(kernel)
    first, second, notes = make_comparable(a, b)
    kernels, notes = statistics.compare(first, second), [*notes, *check_texts(a, b)]
    predictions = [summary.splits[split] for summary in summaries if split in summary.splits]
    if len(predictions) != 2:
        return SplitComparison(split, kernels), notes
    of_a, of_b = (float(np.mean(found.predicted == found.labels)) for found in predictions)
    agreement = float(np.mean(predictions[0].predicted == predictions[1].predicted))
    return SplitComparison(split, kernels, (of_a, of_b), agreement), notes


def _check_finite(kernel: SavedKernel) -> None:
    try:
        check_values(kernel.values, kernel.path.name.partition("_")[0])
    except UsageError as error:
        raise type(error)(f"{kernel.path}: {error}", **error.data | {"path": kernel.path}) from error


def make_comparable(a: SavedKernel, b: SavedKernel) -> tuple[Array, Array, list[str]]:
    """Bring two kernels of the same examples into one shape.

    Returns:
        Both arrays, of one shape, and a note on each change.

    Raises:
        KernelMismatchError: The kernels are of different examples or classes.
    """
    _check_same_examples(a, b)
    notes = []
    first, second = a.values, b.values
    if first.ndim != second.ndim:
        notes.append("one kernel is asymmetric: the mean of its two directions is compared")
        first, second = (statistics.mean_of_directions(values) for values in (first, second))
    if a.num_logits != b.num_logits:
        if {a.num_logits, b.num_logits} != {1, 2}:
            raise KernelMismatchError(
                f"{a.path} is a kernel of {a.num_logits} logits and {b.path} one of {b.num_logits}: only kernels of "
                "the same classes can be compared",
                path=b.path,
                differences=["logits"],
            )
        notes.append("one kernel has one logit, f1 - f0, the other two: the kernels of f1 - f0 are compared")
        # For two logits `logit_differences` is half the kernel of f1 - f0.
        first, second = (
            (1 if kernel.num_logits == 1 else 2) * statistics.logit_differences(values)[:, None, :, None]
            for kernel, values in ((a, first), (b, second))
        )
    return first, second, notes


def _check_same_examples(a: SavedKernel, b: SavedKernel) -> None:
    sizes = [(kernel.values.shape[-4], kernel.values.shape[-2]) for kernel in (a, b)]
    if sizes[0] != sizes[1]:
        of_a, of_b = (f"{rows} × {columns}" for rows, columns in sizes)
        raise KernelMismatchError(
            f"{a.path} is a kernel of {of_a} examples and {b.path} one of {of_b}: only kernels of the same examples "
            "can be compared",
            path=b.path,
            differences=["examples"],
        )
    classes = [class_ids(kernel.labels, kernel.num_logits) for kernel in (a, b)]
    different = np.flatnonzero(classes[0] != classes[1])
    if len(different):
        raise KernelMismatchError(
            f"{a.path} and {b.path} have different labels, first for example {different[0]} (counted from 0): their "
            "examples, or the order of their examples, differ",
            path=b.path,
            differences=["labels"],
        )


def check_texts(a: SavedKernel, b: SavedKernel) -> list[str]:
    """Compare the data and tokens that two kernels' descriptions record; equal labels do not imply equal texts.

    Returns:
        A note if either differs.

    Raises:
        KernelMismatchError: Both differ: the texts do, as those of k-shot splits of two seeds with the same labels.
    """
    different = {key: _different_modes(a, b, key) for key in ("data_sha256", "tokens_sha256")}
    if all(different.values()):
        raise KernelMismatchError(
            f"{a.path} and {b.path} are kernels of different texts, as the descriptions beside them record: only "
            "kernels of the same examples can be compared",
            path=b.path,
            differences=list(different),
        )
    return [
        f"the descriptions record different {what} of {' and '.join(different[key])}"
        for key, what in (("data_sha256", "data files"), ("tokens_sha256", "tokens"))
        if different[key]
    ]


def _different_modes(a: SavedKernel, b: SavedKernel, key: str) -> list[str]:
    """Return the splits whose hashes differ where both descriptions have some."""
    of_a, of_b = (kernel.description.get(key) or {} for kernel in (a, b))
    return [mode for mode in of_a if of_b and of_a[mode] != of_b.get(mode)]
