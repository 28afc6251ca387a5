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
    address = os.environ.pop(VARIABLE)
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, _end_at_once)
    worker = socket.socket(socket.AF_UNIX)
    directory = os.getcwd()  # noqa: PTH109 (pathlib takes a third as long to import as everything else here)
    request = {"command": command, "directory": directory, "environment": dict(os.environ), "ignored": ignored}
    if not _is_taken(worker, address, json.dumps(request)):
        os.execv(sys.executable, [sys.executable, *command])
    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, lambda number, frame: worker.send(bytes([number])))
    _end_with(worker.makefile().readline())


def _is_taken(worker: socket.socket, address: str, request: str) -> bool:
    """Return whether the worker has started a run with the standard streams of this process."""
    try:
        worker.connect(address)
        socket.send_fds(worker, [b"\n"], [0, 1, 2])
        worker.sendall(request.encode() + b"\n")
        return worker.recv(1) == b"+"
    except OSError:
        return False


def _end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"stopped by SIGINT: nothing was begun yet\n")
    os._exit(128 + number)


def _end_with(answer: str) -> NoReturn:
    """End with the status of the run, by a signal if one has ended it; an empty answer means that nobody knows it."""
    if not answer:
        os.write(2, b"error: the worker of this run was killed\n")
        os._exit(1)
    status = int(answer)
    if status < 0:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the run itself has left one
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
