"""A worker of a grid: it imports what run.py needs, then forks for every run that asks for it.

    python run_worker.py LISTENER MESSAGES

`lmntk.runs.workers` starts it, with a listening socket, and with a file that standard error goes to: what libraries
print while they are imported belongs to every run. The worker computes nothing, and has one thread when it forks, since
OpenMP's threads and their locks do not survive that. It ends when its standard input ends, and its runs with it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # As run.py has them; Python's safe path has no folder of a script. Before all other imports, since the folder of
    # this script has a module `select`, and so has Python.
    _folders = [str(folder) for folder in Path(__file__).resolve().parents]
    if sys.path[:1] == _folders[:1]:
        sys.path[0] = _folders[3]
    sys.path.insert(0, _folders[2])

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import json
import os
import runpy
import selectors
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lmntk import interrupts, startup

MODULES = (
    *("lmntk.commands.run", "lmntk.config.validation", "lmntk.config.remedies", "lmntk.storage.output_folder"),
    *("lmntk.experiment.build", "lmntk.experiment.run_record", "lmntk.trainers", "lmntk.trainers.loaded_kernels"),
)
"""What every run imports, at once or late."""

LATE_PACKAGES = {"lmntk", "transformers", "peft", "sklearn", "scipy"}
"""The packages of which a worker imports more, once a run has imported it: the modules of its model and its solver."""

RUN_VARIABLES = {
    "TASK", "SEED", "K", "MODEL", "TYPE", "TRAINER", "TAG", "GRID_TAG", "LOAD_KERNELS_TAG", "AS_PUBLISHED", "NUM_GPU",
    "PYTHON", "PWD", "OLDPWD", "SHLVL", "_",
}  # fmt: skip
"""The variables in which a run may differ from its worker: no library reads them when it is imported."""

REQUEST_SECONDS = 5.0
"""How long a client may take for a request that it has begun; one that takes longer does without a worker."""

SOURCE = Path(__file__).resolve().parents[2]

PR_SET_PDEATHSIG = 1  # prctl(2)


class Worker:
    """Forks a process for every run that connects to a socket.

    Args:
        listener: The socket.
        messages: A file with what was printed to standard error so far.
    """

    def __init__(self, listener: socket.socket, messages: Path) -> None:
        self._listener, self._messages = listener, messages
        self._environment = dict(os.environ)
        self._printed, self._imported, self._tokenizers = b"", set[str](), set[str]()
        self._runs: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._news, self._report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ends, notify = os.pipe()
        os.set_blocking(notify, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(notify)

    def serve(self) -> None:
        """Start runs until standard input ends; then ask those that go on to end, and wait for them."""
        import_libraries()
        self._freeze_state()
        self._printed = self._messages.read_bytes()
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._stop)
        self._selector.register(self._listener, selectors.EVENT_READ, self._start)
        self._selector.register(self._news, selectors.EVENT_READ, self._import_late_modules)
        self._selector.register(self._ends, selectors.EVENT_READ, self._reap)
        while self._runs or sys.stdin in self._selector.get_map():
            for key, _ in self._selector.select():
                key.data()

    def _import_late_modules(self) -> None:
        """Import what a run has imported."""
        names = json.loads(self._news.recv(1 << 20))
        for name in names:
            with contextlib.suppress(Exception):  # a module that only the run could make
                importlib.import_module(name)
        self._imported |= set(names)
        self._freeze_state()

    def _freeze_state(self) -> None:
        self._imported |= sys.modules.keys()
        _succeeds_in_fork(lambda: None)  # OpenBLAS, which starts threads when it is loaded, ends them for a fork
        gc.collect()
        gc.freeze()  # a collector that looks at what is here would copy its memory for every run

    def _start(self) -> None:
        if sys.stdin not in self._selector.get_map():  # it has ended since `select` returned
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:  # the client was killed
            return
        request, streams = _receive(connection)
        if self._can_fork_for(request):
            with contextlib.suppress(OSError):  # no memory: the client does without this process
                os.chdir(request["directory"])
                self._keep_tokenizer(_model_of(request["command"]))
                self._fork(request, streams, connection)
        if connection not in self._runs.values():
            connection.close()
        for stream in streams:
            os.close(stream)

    def _can_fork_for(self, request: dict[str, Any]) -> bool:
        """Return whether a fork of this process can be what a new process would be."""
        words, given, own = request.get("command", ()), request.get("environment", {}), self._environment
        differing = {name for name in given.keys() | own.keys() if given.get(name) != own.get(name)}
        return asks_for_cpu(words) and differing <= RUN_VARIABLES and len([*Path("/proc/self/task").iterdir()]) == 1

    def _keep_tokenizer(self, folder: str) -> None:
        """Load the tokenizer of a run's model, unless that fails or prints something: then every run has to say so."""
        if folder in self._tokenizers or not Path(folder).is_dir():
            return
        from lmntk.models.pretrained import keep_tokenizer

        self._tokenizers.add(folder)
        size = self._messages.stat().st_size
        if _succeeds_in_fork(lambda: keep_tokenizer(folder)) and self._messages.stat().st_size == size:
            with contextlib.suppress(Exception):  # a file of it has just changed
                keep_tokenizer(folder)
            self._freeze_state()

    def _fork(self, request: dict[str, Any], streams: Sequence[int], connection: socket.socket) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)  # until the run has handlers
        try:
            pid = os.fork()
            if pid == 0:
                self._run_as_child(request, streams, connection)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._runs[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, functools.partial(self._pass_on, pid))
        _answer(connection, "+")

    def _pass_on(self, pid: int) -> None:
        """Send a run the signals that its client got; kill it if its client was killed."""
        if (connection := self._runs.get(pid)) is None:  # it has just ended
            return
        try:
            numbers = connection.recv(16)
        except OSError:
            numbers = b""
        if not numbers:
            self._selector.unregister(connection)
        for number in numbers or [signal.SIGKILL]:
            _send(pid, number)

    def _reap(self) -> None:
        """Tell the clients of runs that have ended how they ended."""
        os.read(self._ends, 4096)
        while self._runs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (ended := self._runs.pop(pid, None)) is None:  # not a run
                continue
            with ended as connection:
                if connection in self._selector.get_map():  # else its client was killed
                    self._selector.unregister(connection)
                _answer(connection, f"{os.waitstatus_to_exitcode(status)}\n")

    def _stop(self) -> None:
        self._selector.unregister(sys.stdin)
        self._selector.unregister(self._listener)
        self._listener.close()
        for pid in self._runs:
            _send(pid, signal.SIGTERM)

    def _run_as_child(self, request: dict[str, Any], streams: Sequence[int], connection: socket.socket) -> NoReturn:
        """Make a fork of this process what a new process would be, and execute the request's command in it."""
        status = 1
        try:
            os.setpgid(0, 0)  # the worker does the same: whichever is first
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.set_wakeup_fd(-1)
            self._selector.close()
            for other in (self._listener, *self._runs.values()):
                other.close()
            # `connection` stays open: the client then sees its end when the worker and the run have ended.
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            _open_streams()
            sys.path.remove(str(SOURCE))  # run.py adds it
            os.write(2, self._printed)
            self._set_environment(request["environment"])
            _draw_seeds()
            _set_signals(request["ignored"])
            status = execute(*request["command"])
            self._tell_late_modules()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _tell_late_modules(self) -> None:
        late = [name for name in sys.modules if name.split(".")[0] in LATE_PACKAGES and name not in self._imported]
        if late:
            with contextlib.suppress(OSError):  # more than a message holds, or the worker was killed
                self._report.send(json.dumps(late).encode())

    def _set_environment(self, given: dict[str, str]) -> None:
        """Take the variables of a run, and those that libraries have set when they were imported."""
        own = self._environment
        changed = {name: value for name, value in os.environ.items() if own.get(name) != value}
        os.environ.clear()
        os.environ.update(given | changed)


def import_libraries() -> None:
    """Import what every run imports, as run.py does it, and make the parser and the table that every run makes."""
    startup.begin()
    startup.import_transformers()
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("lmntk.config.arguments").make_parser()
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("bert")


def _succeeds_in_fork(work: Callable[[], object]) -> bool:
    """Do something in a fork of this process; return whether it could be done and raised nothing."""
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _model_of(words: Sequence[str]) -> str:
    """Return the model that the words for run.py name, empty if none."""
    flag = "--model_name_or_path"
    found = [following for word, following in itertools.pairwise(words) if word == flag]
    return ([word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}=")] or found or [""])[-1]


def asks_for_cpu(words: Sequence[str]) -> bool:
    """Return whether the words for run.py ask for the CPU, wherever they speak of it."""
    answers = list[bool]()
    for word, following in itertools.pairwise((*words, "--")):
        flag, _, value = word.replace("-", "_").partition("=")
        if flag.startswith("__use_c"):
            value = value or ("true" if following.startswith("-") else following)
            answers.append(flag == "__use_cpu" and value.lower() in ("true", "t", "yes", "y", "1"))
    return bool(answers) and all(answers)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return the request of a client, and its standard streams; an empty one if the client was killed or stopped."""
    streams, line = list[int](), ""
    connection.settimeout(REQUEST_SECONDS)
    with contextlib.suppress(OSError):
        _, streams, _, _ = socket.recv_fds(connection, 1, 3)
        with connection.makefile(encoding="utf-8") as file:
            line = file.readline()
    connection.settimeout(None)
    return (json.loads(line) if line.endswith("\n") else {}), streams


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _answer(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # the client was killed
        connection.sendall(text.encode())


def _open_streams() -> None:
    """Make the standard streams anew for what their descriptors are now, as Python does it when it starts.

    The objects stay the same ones, since libraries hold them.
    """
    for number, (name, mode) in enumerate((("stdin", "rb"), ("stdout", "wb"), ("stderr", "wb"))):
        stream = getattr(sys, name)
        is_buffered = not stream.write_through  # else PYTHONUNBUFFERED asks for it
        file = open(number, mode, buffering=-1 if is_buffered else 0, closefd=False)  # noqa: SIM115
        raw: Any = getattr(file, "raw", file)
        raw.name = f"<{name}>"
        stream.__init__(
            file,
            encoding=stream.encoding,
            errors=stream.errors,
            newline="\n",
            line_buffering=is_buffered and (name == "stderr" or os.isatty(number)),
            write_through=not is_buffered,
        )
        stream.mode = mode[0]


def _draw_seeds() -> None:
    """Draw the seeds that libraries draw when they are imported; Python's own `random` does so after each fork."""
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _set_signals(ignored: Sequence[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in interrupts.SIGNALS:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.begin()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)


def execute(script: str, *words: str) -> int:
    """Execute a script as the whole work of this process, and everything that Python does before it exits.

    Args:
        script: The path of a Python file.
        *words: The arguments of its command line.

    Returns:
        The exit status.
    """
    sys.argv = [script, *words]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        # The frames of this file and of runpy's are not the script's.
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename != script:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        status = 1
    return _finish(status) & 0xFF


def _finish(status: int) -> int:
    """Do what Python does before it exits; return the exit status, Python's own if a stream cannot be flushed."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            status = 120
            if stream is sys.stdout:
                print(f"Exception ignored in: {stream!r}", file=sys.stderr)
                traceback.print_exception(type(error), error, None)
    return status


def main(listener: str, messages: str) -> None:
    """Serve until standard input ends."""
    for number in interrupts.SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # its runs get them from their clients
    Worker(socket.socket(fileno=int(listener)), Path(messages)).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
