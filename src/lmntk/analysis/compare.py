"""Two kernels compared: how far apart they are, how well they are aligned, and whether they predict the same labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis import statistics
from lmntk.analysis.saved_kernel import SavedKernel
from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.analysis.statistics import Array, Comparison
from lmntk.analysis.summary import RunSummary, summarise_run
from lmntk.errors import FileError, KernelMismatchError, SettingError, UsageError
from lmntk.solvers.problem import check_values, class_ids
from lmntk.storage.paths import RunPaths

DEFAULT_SOLVER: Mapping[str, Any] = {"kernel_solver": "lstsq", "kernel_regularization": 0.0}


@dataclass(frozen=True)
class SplitComparison:
    """How two kernels of a split, A and B, compare.

    Attributes:
        split: The split.
        kernels: The distance and similarity of the kernels.
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
        return _compare_folders(first, second, {**DEFAULT_SOLVER, **given})
    for name, value in given.items():
        message = f"`{name}`: two kernel files without the train kernel predict nothing: give the folders"
        raise SettingError(message, setting=name, value=value)
    comparison, notes = _compare_kernels(
        first.name.partition("_")[0], SavedKernel.read(first), SavedKernel.read(second)
    )
    return [comparison], notes


def _compare_folders(first: Path, second: Path, settings: Mapping[str, Any]) -> tuple[list[SplitComparison], list[str]]:
    """Compare every split that two folders have in common, predicting from both with one solver."""
    runs = _find_runs(first, second)
    _note_different_texts(*(run.kernel("train") for run in runs))  # before anything is predicted
    summaries = [summarise_run(run, str(run.folder), settings, curve=False) for run in runs]
    comparisons, notes = [], []
    for split in runs[0].kernel_splits:
        if split in runs[1].kernel_splits:
            found = _compare_kernels(split, runs[0].kernel(split), runs[1].kernel(split), summaries)
            comparisons.append(found[0])
            notes += found[1]
    notes.append(
        f"acc and agreement: predictions by {settings['kernel_solver']}, regularisation "
        f"{settings['kernel_regularization']:g}, from both kernels, whatever solver the runs used"
    )
    if settings["kernel_solver"] != "asym" and any(run.kernel("train").values.ndim == 5 for run in runs):
        notes.append("acc and agreement: the first direction of an asymmetric kernel predicts, as in a run")
    return comparisons, list(dict.fromkeys(notes))


def _find_runs(first: Path, second: Path) -> list[SavedRun]:
    """Find the runs of the one task that two folders have in common."""
    found = []
    for folder in (first, second):
        runs = {run.key: run for run in read_runs(folder) if run.kernel_splits}
        if not runs:
            raise FileError(f"{folder} holds no kernels: give the folder of a run of `trainer=kernel`", path=folder)
        found.append(runs)
    common = [key for key in found[0] if key in found[1]]
    if not common:
        what = f"{first} has kernels of {', '.join(found[0])} and {second} of {', '.join(found[1])}"
        raise _mismatch(f"{what}: give two folders of one task, or two kernel files", second, "task")
    if len(common) > 1:
        example = RunPaths(first, common[0]).kernel("test")
        what = f"{first} and {second} both hold kernels of {', '.join(common)}"
        raise _mismatch(f"{what}: give two kernel files, such as {example}", second, *common)
    return [runs[common[0]] for runs in found]


def _mismatch(message: str, path: Path, *differences: str) -> KernelMismatchError:
    return KernelMismatchError(message, path=path, differences=list(differences))


def _compare_kernels(
    split: str, a: SavedKernel, b: SavedKernel, summaries: Sequence[RunSummary] = ()
) -> tuple[SplitComparison, list[str]]:
    """Compare the kernels of a split, and the predictions from them if both runs' summaries have some."""
    for kernel in (a, b):
        try:
            check_values(kernel.values, kernel.path.name.partition("_")[0])
        except UsageError as error:
            raise type(error)(f"{kernel.path}: {error}", **error.data | {"path": kernel.path}) from error
    first, second, notes = _make_comparable(a, b)
    kernels, notes = statistics.compare(first, second), [*notes, *_note_different_texts(a, b)]
    predictions = [summary.splits[split] for summary in summaries if split in summary.splits]
    if len(predictions) != 2:
        return SplitComparison(split, kernels), notes
    of_a, of_b = (float(np.mean(found.predicted == found.labels)) for found in predictions)
    agreement = float(np.mean(predictions[0].predicted == predictions[1].predicted))
    return SplitComparison(split, kernels, (of_a, of_b), agreement), notes


def _make_comparable(a: SavedKernel, b: SavedKernel) -> tuple[Array, Array, list[str]]:
    """Bring two kernels of the same examples into one shape; return both and a note on each change."""
    sizes = [(kernel.values.shape[-4], kernel.values.shape[-2]) for kernel in (a, b)]
    if sizes[0] != sizes[1]:
        of_a, of_b = (f"{rows} × {columns}" for rows, columns in sizes)
        what = f"{a.path} is a kernel of {of_a} examples and {b.path} one of {of_b}"
        raise _mismatch(f"{what}: only kernels of the same examples can be compared", b.path, "examples")
    different = np.flatnonzero(class_ids(a.labels, a.num_logits) != class_ids(b.labels, b.num_logits))
    if len(different):
        what = f"{a.path} and {b.path} have different labels, first for example {different[0]} (counted from 0)"
        raise _mismatch(f"{what}: their examples, or the order of their examples, differ", b.path, "labels")
    notes = []
    first, second = a.values, b.values
    if first.ndim != second.ndim:
        notes.append("one kernel is asymmetric: the mean of its two directions is compared")
        first, second = (statistics.mean_of_directions(values) for values in (first, second))
    if a.num_logits != b.num_logits:
        if {a.num_logits, b.num_logits} != {1, 2}:
            what = f"{a.path} is a kernel of {a.num_logits} logits and {b.path} one of {b.num_logits}"
            raise _mismatch(f"{what}: only kernels of the same classes can be compared", b.path, "logits")
        notes.append("one kernel has one logit, f1 - f0, the other two: the kernels of f1 - f0 are compared")
        # For two logits `logit_differences` is half the kernel of f1 - f0.
        first, second = (
            (1 if kernel.num_logits == 1 else 2) * statistics.logit_differences(values)[:, None, :, None]
            for kernel, values in ((a, first), (b, second))
        )
    return first, second, notes


def _note_different_texts(a: SavedKernel, b: SavedKernel) -> list[str]:
    """Compare the data and tokens that two kernels' descriptions record: equal labels do not imply equal texts.

    If only one of the two differs, that is noted; if both do, as for k-shot splits of two seeds, the texts differ.
    """
    different = {}
    for key, what in (("data_sha256", "data files"), ("tokens_sha256", "tokens")):
        of_a, of_b = (kernel.description.get(key) or {} for kernel in (a, b))
        if modes := [mode for mode in of_a if mode in of_b and of_a[mode] != of_b[mode]]:
            different[key] = f"the descriptions record different {what} of {' and '.join(modes)}"
    if len(different) == 2:
        what = f"{a.path} and {b.path} are kernels of different texts, as the descriptions beside them record"
        raise _mismatch(f"{what}: only kernels of the same examples can be compared", b.path, *different)
    return list(different.values())
