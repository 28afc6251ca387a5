"""The run in a folder, for commands that work on one run."""

from pathlib import Path

from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.errors import KernelMismatchError


def only_run(folder: Path) -> SavedRun:
    """Return the run in a folder.

    Raises:
        FileError: It is not the folder of a run.
        KernelMismatchError: It holds runs of several tasks.
    """
    runs = read_runs(folder)
    if len(runs) > 1:
        tasks = [run.key for run in runs]
        sentence = f"{folder} holds runs of {' and '.join(tasks)}: move those of one task to another folder"
        raise KernelMismatchError(sentence, path=folder, differences=tasks)
    return runs[0]
