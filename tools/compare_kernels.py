#!/usr/bin/env python3
"""Compare two kernels: how far apart they are, how alike what they measure is, and whether they predict the same.

A and B are folders that run.py left (or any with kernels of that layout), compared split by split, or two kernel files.
Two formulas, a model before and after fine-tuning, ours against published ones. Per split:

  distance     ||A - B|| / ||B||, over all entries
  scaled       the same, of the multiple of A that is nearest to B
  CKA          centred kernel alignment (Kornblith et al. 2019) of the kernels of the logits' differences, -1 to 1
  correlation  Pearson's, of all entries
  acc A, B     what the same solver predicts from each (folders with the train kernel)
  agreement    how many examples both give the same label

Kernels of one logit and of two are compared as kernels of the logits' differences, an asymmetric kernel with a
symmetric one as the mean of its directions.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

import numpy as np

from gather_result import note
from lmntk.analysis import statistics
from lmntk.analysis.saved_run import SavedKernel, SavedRun, read_runs
from lmntk.analysis.statistics import Array
from lmntk.analysis.summary import Study, study
from lmntk.config.tool_parser import exit_status
from lmntk.errors import UsageError
from lmntk.solvers.problem import check_values, class_ids
from lmntk.storage import kernel_files, kernel_metadata, paths
from report import Parser, solver_flags

COLUMNS = ("split", "distance", "scaled", "CKA", "correlation", "acc A", "acc B", "agreement")


Row = dict[str, str]
"""A split's line in the table: cells by column, those with nothing to say left out."""


def read_file(path: Path) -> SavedKernel:
    """Read a kernel file.

    Raises:
        UsageError: It is missing or damaged, or holds NaN or infinity.
    """
    values, labels = kernel_files.load_kernel(path)
    kernel = SavedKernel(path, values.numpy(), labels.numpy(), kernel_metadata.read_description(path) or {})
    return checked(kernel)


def checked(kernel: SavedKernel) -> SavedKernel:
    """Return a kernel after a look at its numbers."""
    try:
        check_values(kernel.values, kernel.path.name.partition("_")[0])
    except UsageError as error:
        raise UsageError(f"{kernel.path}: {error}") from error
    return kernel


def find_runs(folders: Sequence[Path]) -> list[SavedRun]:
    """Find the runs of one task in two folders.

    Raises:
        UsageError: The folders have no task in common, or several.
    """
    found = [{run.key: run for run in read_runs(folder) if run.kernel_splits} for folder in folders]
    for folder, runs in zip(folders, found, strict=True):
        if not runs:
            raise UsageError(f"{folder} holds no kernels: give the folder of a run of --trainer kernel")
    common = [key for key in found[0] if key in found[1]]
    if not common:
        raise UsageError(
            f"{folders[0]} has kernels of {', '.join(found[0])} and {folders[1]} of {', '.join(found[1])}: give two "
            "folders of one task, or two kernel files"
        )
    if len(common) > 1:
        raise UsageError(
            f"{folders[0]} and {folders[1]} both hold kernels of {', '.join(common)}: give two kernel files, such as "
            f"{paths.kernel_path(folders[0], 'test', common[0])}"
        )
    return [runs[common[0]] for runs in found]


def comparable(a: SavedKernel, b: SavedKernel) -> tuple[Array, Array, list[str]]:
    """Bring two kernels of the same examples into one shape; say what was done.

    Raises:
        UsageError: They are of different examples.
    """
    sizes = [(kernel.values.shape[-4], kernel.values.shape[-2]) for kernel in (a, b)]
    if sizes[0] != sizes[1]:
        of_a, of_b = (f"{rows} × {columns}" for rows, columns in sizes)
        raise UsageError(
            f"{a.path} is a kernel of {of_a} examples and {b.path} one of {of_b}: only kernels of the same examples "
            "can be compared"
        )
    classes = [class_ids(kernel.labels, kernel.num_logits) for kernel in (a, b)]
    different = np.flatnonzero(classes[0] != classes[1])
    if len(different):
        raise UsageError(
            f"{a.path} and {b.path} have different labels, first for example {different[0]} (counted from 0): they are "
            "of other examples, or of the same in another order"
        )
    notes = []
    first, second = a.values, b.values
    if first.ndim != second.ndim:
        notes.append("one kernel is asymmetric: the mean of its two directions is compared")
        first, second = (statistics.mean_of_directions(values) for values in (first, second))
    if a.num_logits != b.num_logits:
        if {a.num_logits, b.num_logits} != {1, 2}:
            raise UsageError(
                f"{a.path} is a kernel of {a.num_logits} logits and {b.path} one of {b.num_logits}: only kernels of "
                "the same classes can be compared"
            )
        notes.append("one kernel has one logit, f1 - f0, the other two: the kernels of f1 - f0 are compared")
        # Of two logits it is half the kernel of f1 - f0.
        first, second = (
            (1 if kernel.num_logits == 1 else 2) * statistics.logit_differences(values)[:, None, :, None]
            for kernel, values in ((a, first), (b, second))
        )
    return first, second, notes


def _differ(a: SavedKernel, b: SavedKernel, key: str) -> bool:
    stored = [kernel.description.get(key) for kernel in (a, b)]
    return all(stored) and stored[0] != stored[1]


def other_texts(a: SavedKernel, b: SavedKernel) -> list[str]:
    """Say whether the descriptions tell of other prompts, which equal labels do not show.

    Raises:
        UsageError: They tell of other texts, asked in other tokens: k-shot splits of two seeds have the same labels.
    """
    notes = []
    if all(_differ(a, b, key) for key in ("data_sha256", "tokens_sha256")):
        raise UsageError(
            f"{a.path} and {b.path} are kernels of different texts, as the descriptions beside them tell: only kernels "
            "of the same examples can be compared"
        )
    for key, what in (("data_sha256", "data files"), ("tokens_sha256", "tokens")):
        stored = [kernel.description.get(key) for kernel in (a, b)]
        if _differ(a, b, key):
            modes = [mode for mode in stored[0] if stored[0][mode] != stored[1].get(mode)]
            notes.append(f"the descriptions tell of different {what} of {' and '.join(modes)}")
            break  # of other data the tokens are others, too
    return notes


def compare(split: str, a: SavedKernel, b: SavedKernel, studies: Sequence[Study] = ()) -> tuple[Row, list[str]]:
    """Compare the kernels of a split, and what is predicted from them if that is known."""
    first, second, notes = comparable(checked(a), checked(b))
    found = statistics.compare(first, second)
    cells = {
        "split": split,
        "distance": f"{found.distance:.3g}",
        "scaled": f"{found.scaled_distance:.3g}",
        "CKA": f"{found.alignment:.4f}",
        "correlation": f"{found.correlation:.4f}",
    }
    predictions = [one.splits[split] for one in studies if split in one.splits]
    if len(predictions) == 2:
        both = np.mean(predictions[0].predicted == predictions[1].predicted)
        shares = [np.mean(found.predicted == found.labels) for found in predictions]
        cells |= {name: f"{100 * share:.1f}" for name, share in zip(COLUMNS[5:], (*shares, both), strict=True)}
    return cells, [*notes, *other_texts(a, b)]


def compare_folders(folders: Sequence[Path], flags: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """Compare all splits that two folders have in common, with one solver for both."""
    runs = find_runs(folders)
    solver = {"kernel_solver": "lstsq", "kernel_regularization": 0.0}
    given = solver | {name: value for name, value in flags.items() if value is not None}
    other_texts(*(run.kernel("train") for run in runs))  # before anything is predicted
    studies = [study(run, str(run.folder), given, curve=False) for run in runs]
    rows, notes = [], []
    for split in runs[0].kernel_splits:
        if split in runs[1].kernel_splits:
            row, told = compare(split, runs[0].kernel(split), runs[1].kernel(split), studies)
            rows.append(row)
            notes += told
    notes.append(
        f"acc and agreement: predictions by {given['kernel_solver']}, regularisation "
        f"{given['kernel_regularization']:g}, from both kernels, whatever solver the runs had"
    )
    if given["kernel_solver"] != "asym" and any(run.kernel("train").values.ndim == 5 for run in runs):
        notes.append("acc and agreement: of an asymmetric kernel the first direction predicts, as in a run")
    return rows, list(dict.fromkeys(notes))


def table(rows: Sequence[Row], markdown: bool) -> str:
    """Lay out the rows, words to the left and numbers to the right."""
    names = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(len(line.get(name, "")) for line in lines) for name in names}
    cells = [
        [f"{line.get(name, ''):{'<' if name == 'split' else '>'}{widths[name]}}" for name in names] for line in lines
    ]
    if not markdown:
        return "".join("  ".join(row).rstrip() + "\n" for row in cells)
    rule = ["-" * (widths[name] + 1) + ("-" if name == "split" else ":") for name in names]
    shown = ["|" + "|".join(f" {cell} " for cell in row) + "|\n" for row in cells]
    return "".join([shown[0], "|" + "|".join(rule) + "|\n", *shown[1:]])


def main(argv: Sequence[str] | None = None) -> None:
    """Print how two kernels compare."""
    parser = Parser(__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="a folder with kernels, or a kernel file")
    parser.add_argument("second", type=Path, metavar="B", help="another")
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="how to print (text)")
    given = parser.read(argv)
    paths: list[Path] = [given.first, given.second]
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} is not there: give the folder of a run, or a kernel file")
    if paths[0].is_dir() != paths[1].is_dir():
        raise UsageError(f"{paths[0]} and {paths[1]}: give two folders, or two kernel files")
    if paths[0].is_dir():
        rows, notes = compare_folders(paths, solver_flags(given))
    else:
        if flags := [name for name, value in solver_flags(given).items() if value is not None]:
            raise UsageError(f"--{flags[0]}: two kernel files predict nothing without that of train: give the folders")
        row, notes = compare(paths[0].name.partition("_")[0], *map(read_file, paths))
        rows = [row]
    print(table(rows, given.format == "markdown"), end="")
    for told in notes:
        note(told)


if __name__ == "__main__":
    sys.exit(exit_status(main))
