"""Workers: processes that have imported what a run needs, and fork for the runs of a grid.

A fork gets the run's environment, directory, streams and signal handlers, and executes run.py: it does what a new
process would do, without the seconds of importing. A run that dies takes nothing else along.

    grid ─┬─ run_fewshot.sh, which becomes worker_client.py   for every run: waits for it, and ends as it ends
          └─ run_worker.py ─── the run itself                 started by the first run that asks for it

A run is a new process, as ever, where this cannot be: elsewhere than on Linux, with another interpreter than this one,
with several processes for one run, where it may use a GPU, and after the worker has ended, whatever the reason.
"""

import contextlib
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmntk.runs import worker_client

WORKER = Path(__file__).resolve().parents[1] / "commands" / "run_worker.py"


class Worker:
    """A worker that is started when a run asks for it.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._address, self._messages = folder / "socket", folder / "messages"
        self._environment: dict[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._address))
        self._listener.listen()

    def environment(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Return the environment in which run_fewshot.sh gives its run to the worker."""
        if environment.get("PYTHON") != sys.executable:
            return dict(environment)
        self._environment = self._environment or dict(environment)
        return {**environment, worker_client.VARIABLE: str(self._address)}

    def start_if_needed(self) -> None:
        """Start the worker if a run waits for it; if it has ended, or cannot start, send the runs that wait away."""
        listener = self._listener.fileno()
        if listener == -1:  # closed
            return
        if self._process is not None:
            if self._process.poll() is not None:
                self._listener.close()
        elif self._environment and select.select([listener], [], [], 0)[0]:
            try:
                self._process = self._start(listener)
            except OSError:  # too many processes, no memory, a full disk
                self._listener.close()

    def _start(self, listener: int) -> subprocess.Popen[bytes]:
        with self._messages.open("wb") as messages:
            # Its standard input ends when this process does.
            return subprocess.Popen(
                [sys.executable, str(WORKER), str(listener), str(self._messages)], env=self._environment,
                pass_fds=[listener], process_group=0, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=messages,
            )  # fmt: skip

    def close(self) -> None:
        """End the worker, whose runs have ended."""
        self._listener.close()
        if self._process is not None:
            with self._process:
                self._process.kill()


@contextlib.contextmanager
def worker_for(num_runs: int) -> Iterator[Worker | None]:
    """Have a worker while so many runs go on; None where it would save nothing, or cannot be."""
    with contextlib.ExitStack() as entered:
        worker = None
        if num_runs > 1 and sys.platform == "linux":
            with contextlib.suppress(OSError):  # no folder for temporary files, or one with too long a path
                folder = entered.enter_context(tempfile.TemporaryDirectory(prefix="lmntk-"))
                worker = Worker(Path(folder))
                entered.callback(worker.close)
        yield worker
