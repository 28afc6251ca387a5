"""What `WarmPython` starts: `warm_server.py SOCKET` imports what run.py needs, and forks for every client.

A fork takes its client's environment, directory, streams and signal handlers, and then executes a script. Everything
before that is as in a new process of run.py: nothing was computed, and no command was run.
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmntk.commands import run_worker

MORE_MODULES = (
    *("torch.distributed.run", "transformers.models.roberta.modeling_roberta", "transformers.models.auto"),
    *("scipy.linalg", "scipy.optimize", "sklearn.linear_model", "sklearn.metrics", "sklearn.svm"),
    *("lmntk.trainers.kernel", "lmntk.trainers.finetune", "lmntk.solvers", "lmntk.analysis.influence"),
)
PR_SET_PDEATHSIG = 1  # prctl(2)


def serve(address: str) -> NoReturn:
    """Fork for every client that connects, until this process is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        _die_with_parent(signal.SIGKILL)
        print("ready", flush=True)
        folders = [folder for folder in sys.path if folder not in (str(run_worker.SOURCE), str(Path(__file__).parent))]
        signal.signal(signal.SIGCHLD, lambda number, frame: _reap_keepers())
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(client, folders)
            client.close()


def _reap_keepers() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(client: socket.socket, folders: list[str]) -> NoReturn:
    """Start the process, and tell its client how it ends; kill it if its client is killed."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile(encoding="utf-8").readline())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        client.close()
        _execute(request, streams, folders)
    for stream in streams:
        os.close(stream)
    client.sendall(f"{pid}\n".encode())
    ends = os.pidfd_open(pid)
    ready, _, _ = select.select([ends, client], [], [])
    if client in ready and ends not in ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        client.sendall(f"{status}\n".encode())
    os._exit(0)


def _execute(request: dict[str, Any], streams: Sequence[int], folders: list[str]) -> NoReturn:
    """Become what Python is when it starts, and execute a script."""
    status = 1
    try:
        _die_with_parent(signal.SIGKILL)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        run_worker._open_streams()
        os.chdir(request["directory"])
        given = request["environment"]
        os.environ.clear()
        os.environ.update(given)
        script, words = _script(request["words"])
        first = str(Path(script).resolve().parent) if "-m" not in request["words"][:2] else str(Path.cwd())
        sys.path[:] = [first, *filter(None, given.get("PYTHONPATH", "").split(os.pathsep)), *folders]
        run_worker._draw_seeds()
        run_worker._set_signals(request["ignored"])
        status = run_worker.execute(script, *words)
    finally:
        os._exit(status)


def _script(words: list[str]) -> tuple[str, list[str]]:
    """The script that Python's words ask for, and its own words."""
    if words[0] == "-u":  # standard streams are flushed in the end anyhow
        words = words[1:]
    if words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found is not None and found.origin is not None
        return found.origin, words[2:]
    assert not words[0].startswith("-"), f"{words[0]}: a warm Python takes scripts and modules only"
    return words[0], words[1:]


def _die_with_parent(number: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    run_worker.import_libraries()
    for name in MORE_MODULES:
        importlib.import_module(name)
    run_worker._succeeds_in_fork(lambda: None)  # OpenBLAS ends the threads that it started
    gc.collect()
    gc.freeze()
    serve(sys.argv[1])
