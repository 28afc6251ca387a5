"""The progress bar of many runs."""

import sys

from tqdm import tqdm

from lmntk.runs.processes import Progress, RunT


class Bar(Progress[RunT]):
    """A progress bar on stderr.

    Args:
        bar: The bar, whose unit is a run.
    """

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._failed = bar, 0

    def waiting(self) -> None:
        """Let the clock go on."""
        if sys.stderr.isatty():
            self._bar.refresh()

    def ended(self, run: RunT, problem: str | None) -> None:
        """Count a run, and those that have failed."""
        if problem is not None:
            self._failed += 1
            self._bar.set_postfix_str(f"{self._failed} failed", refresh=False)
        self._bar.update()
