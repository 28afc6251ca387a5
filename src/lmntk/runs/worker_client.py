"""What run_fewshot.sh starts in place of run.py in a grid: it gives the run to a worker, and waits for its end.

    LMNTK_WORKER=SOCKET python -IS worker_client.py run.py WORD …

This process stands for the run: it passes on the signals that it gets, and ends as the run ends. Where no worker takes
the run, it becomes `python run.py WORD …`, as without workers. It imports nothing of the package and no site packages,
since every run waits for it to start.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

VARIABLE = "LMNTK_WORKER"
"""The environment variable that holds the address of the worker's socket."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(command: list[str]) -> NoReturn:
    """Give a command to the worker, and end as it ends.

    Args:
        command: The path of run.py, and its words.
    """
    address, parent = os.environ.pop(VARIABLE), os.getppid()
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    worker = socket.socket(socket.AF_UNIX)
    _set_handlers(ignored, lambda number, frame: _pass_on(worker, number) if _has_begun(worker) else _end_by(number))
    directory = os.getcwd()  # noqa: PTH109 (pathlib takes a third as long to import as everything else here)
    request = {"command": command, "directory": directory, "environment": dict(os.environ), "ignored": ignored}
    if not _is_taken(worker, address, json.dumps(request)):
        if os.getppid() != parent:
            os.write(2, b"error: the grid of this run was killed\n")
            os._exit(1)
        os.execv(sys.executable, [sys.executable, *command])
    _set_handlers(ignored, lambda number, frame: _pass_on(worker, number))
    _end_with(_read_line(worker).removeprefix("+"))


def _is_taken(worker: socket.socket, address: str, request: str) -> bool:
    """Return whether the worker has started a run with the standard streams of this process."""
    try:
        worker.connect(address)
        socket.send_fds(worker, [b"\n"], [0, 1, 2])
        worker.sendall(request.encode() + b"\n")
        return _has_begun(worker, socket.MSG_PEEK)
    except OSError:
        return False


def _has_begun(worker: socket.socket, flags: int = socket.MSG_PEEK | socket.MSG_DONTWAIT) -> bool:
    """Return whether the worker says that it has started the run; its word stays unread."""
    try:
        return worker.recv(1, flags) == b"+"
    except OSError:  # no word yet, or no worker
        return False


def _read_line(worker: socket.socket) -> str:
    try:
        return worker.makefile().readline()
    except OSError:  # the worker was killed
        return ""


def _set_handlers(ignored: list[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, handler)


def _pass_on(worker: socket.socket, number: int) -> None:
    try:
        worker.send(bytes([number]))
    except OSError:  # the worker was killed, or the run has just ended
        return


def _end_by(number: int) -> NoReturn:
    """End by a signal before a run has begun, as Python does."""
    if number == signal.SIGINT:
        os.write(2, b"stopped by SIGINT: nothing was begun yet\n")
    else:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(128 + number)


def _end_with(status_line: str) -> NoReturn:
    """End with the status of the run, by a signal if one has ended it; an empty line means that nobody knows it."""
    if not status_line:
        os.write(2, b"error: the worker of this run was killed\n")
        os._exit(1)
    status = int(status_line)
    if status < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the run itself has left one
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
