"""Runs as processes: several at a time, each with a log and a stamp in its folder, so that no finished run repeats."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from lmntk.errors import FileError, UsageError
from lmntk.interrupts import SIGNALS
from lmntk.runs.workers import Worker, worker_for
from lmntk.storage.atomic import write_text

RUN_SCRIPT = Path(__file__).resolve().parents[3] / "run_fewshot.sh"
"""The script that starts a run; only a checkout has it."""

LOG, STAMP = "grid-run.log", "grid-stamp"
POLL_SECONDS = 0.02
UNFINISHED = " unfinished"
"""The end of the stamp of a run that goes on, was stopped, or failed."""


class RunProcess(ABC):
    """A run of run_fewshot.sh that fills a folder, where `LOG` is what it prints and `STAMP` the hash of its settings.

    While the run goes on, and if it fails, the stamp says that it is unfinished.

    Attributes:
        directory: Where the process runs; None: in the working directory of this one.
        delete_stale: Whether what a run with another stamp left in the folder is deleted before this one starts.
    """

    directory: Path | None = None
    delete_stale = False

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The output folder."""

    @property
    @abstractmethod
    def stamp(self) -> str:
        """A hash of everything that the results depend on."""

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """The words of the command."""

    @abstractmethod
    def environment(self, jobs: int) -> Mapping[str, str]:
        """Return the environment of the process when so many run at a time."""

    def is_done(self) -> bool:
        """Return whether the folder has the results of exactly these settings."""
        return read_stamp(self.folder) == self.stamp and self.has_results()

    def has_results(self) -> bool:
        """Return whether run.py has written metrics."""
        return any(any(self.folder.glob(f"{split}_results_*.txt")) for split in ("eval", "test"))

    def start(self, jobs: int, worker: Worker | None = None) -> subprocess.Popen[bytes]:
        """Start the process in its own process group, so that it gets a signal from `run_all` and no second one.

        Args:
            jobs: How many run at a time.
            worker: What does the run, if it can.
        """
        environment = self.environment(jobs)
        if self.delete_stale and (read_stamp(self.folder) or "").removesuffix(UNFINISHED) != self.stamp:
            shutil.rmtree(self.folder, ignore_errors=True)
        write_text(self.folder / STAMP, self.stamp + UNFINISHED, make_folder=True)
        with (self.folder / LOG).open("wb") as log:
            return subprocess.Popen(
                self.command, env=environment if worker is None else worker.environment(environment),
                cwd=self.directory, process_group=0, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def finish(self, status: int) -> str | None:
        """Return what is wrong with the run, which has ended; None, after stamping the folder, if nothing is."""
        if status == 0 and self.has_results():
            write_text(self.folder / STAMP, self.stamp)
            return None
        reason = f"status {status}" if status else "ended well, but left no results"
        lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((f"\n    {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")
        return f"{reason}; log: {self.folder / LOG}{last}"


def read_stamp(folder: Path) -> str | None:
    """Return the stamp in a folder, None if there is none."""
    path = folder / STAMP
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


RunT = TypeVar("RunT", bound=RunProcess)


class Progress(Generic[RunT]):
    """What is shown while runs go on; this base class shows nothing."""

    def started(self, run: RunT) -> None:
        """Show that a run has started."""

    def waiting(self) -> None:
        """Show what has changed; called many times a second, and before `ended`."""

    def ended(self, run: RunT, problem: str | None) -> None:
        """Show that a run has ended, and what is wrong with it if it failed."""


class Outcome(NamedTuple, Generic[RunT]):
    """How several runs ended: how many well, which failed and why, and the signals that arrived and were passed on."""

    num_finished: int
    failures: list[tuple[RunT, str]]
    signals: list[int]


def run_all(
    runs: Sequence[RunT], jobs: int, progress: Progress[RunT], *, stop_at_failure: bool = False
) -> Outcome[RunT]:
    """Run several processes, and wait for them.

    After a signal no further run starts; those that have started get it and are waited for.

    Args:
        runs: The runs, in the order in which they start.
        jobs: How many run at a time.
        progress: Shows how far they are.
        stop_at_failure: Whether no further run starts after one has failed.

    Raises:
        FileError: This package is not part of a checkout, so there is no script to start.
    """
    if not RUN_SCRIPT.is_file():
        sentence = "runs are started by run_fewshot.sh, which an installed package lacks: use a checkout of the source"
        raise FileError(sentence, path=RUN_SCRIPT)
    todo, running = deque(runs), dict[subprocess.Popen[bytes], RunT]()
    num_finished, failures, passed_on = 0, list[tuple[RunT, str]](), 0

    def may_start() -> bool:
        return bool(todo) and not signals and not (failures and stop_at_failure)

    def end(run: RunT, problem: str | None) -> None:
        if problem is not None:
            failures.append((run, problem))
        progress.ended(run, problem)

    with _collected_signals() as signals, worker_for(len(runs)) as worker, _stopping_on_error(running):
        while running or may_start():
            while may_start() and len(running) < jobs:
                run = todo.popleft()
                try:
                    running[run.start(jobs, worker)] = run
                except (UsageError, OSError) as error:
                    end(run, f"cannot start it: {error}")
                    continue
                progress.started(run)
            if worker is not None:
                worker.start_if_needed()
            new = signals[passed_on:]
            passed_on += len(new)
            for process, number in product(running, new):
                _send(process, number)
            ended = [process for process in running if process.poll() is not None]
            progress.waiting()
            for process in ended:
                run = running.pop(process)
                try:
                    problem = run.finish(process.returncode)
                except (UsageError, OSError) as error:
                    problem = str(error)
                num_finished += problem is None
                if problem is None or not signals:
                    end(run, problem)
            time.sleep(POLL_SECONDS)
    return Outcome(num_finished, failures, signals)


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process, which must pass them on first; nohup's stay ignored."""
    signals: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    handlers = {number: old for number, old in handlers.items() if old not in (None, signal.SIG_IGN)}
    for number in handlers:
        signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stopping_on_error(running: Mapping[subprocess.Popen[bytes], RunProcess]) -> Iterator[None]:
    """Stop the processes if this one fails, as when nobody reads what it prints."""
    try:
        yield
    except BaseException:
        for process in running:
            _send(process, signal.SIGTERM)
        for process in running:
            process.wait()
        raise


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
