"""The run in a folder, for commands that work on one run."""

from collections.abc import Sequence
from pathlib import Path

from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.errors import KernelMismatchError


def only_run(folder: Path) -> SavedRun:
    """Return the run in a folder.

    Raises:
        FileError: It is not the folder of a run.
        KernelMismatchError: It holds runs of several tasks.
    """
    return the_one(read_runs(folder), folder, "runs")


def the_one(runs: Sequence[SavedRun], folder: Path, what: str) -> SavedRun:
    """Return the only one of some runs of a folder.

    Args:
        runs: One or more.
        folder: The folder.
        what: What they are called in the error.

    Raises:
        KernelMismatchError: There are several, of several tasks.
    """
    if len(runs) > 1:
        tasks = [run.key for run in runs]
        sentence = f"{folder} holds {what} of {' and '.join(tasks)}: move those of one task to another folder"
        raise KernelMismatchError(sentence, path=folder, differences=tasks)
    return runs[0]
