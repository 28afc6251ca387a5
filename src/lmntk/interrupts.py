"""Handle user errors, Ctrl-C, SIGTERM and full disks: print one sentence and return the exit status."""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO, cast

from lmntk.errors import UsageError, refused

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STARTS_ANEW = "the same command starts anew"

_received: list[signal.Signals] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: The signal.

    Attributes:
        kept_summary: Which unfinished work is kept, for the user; empty where the program's usual sentence says it.
        resume_hint: How to continue from there.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
        self.kept_summary = ""
        self.resume_hint = "the same command goes on from there"

    @property
    def status(self) -> int:
        """The exit status by which shells know the signal."""
        return 128 + self.number


def begin() -> None:
    """Make the standard streams usable, and let Ctrl-C end the program without a traceback until `exit_status` runs."""
    # The next file to be opened would get the number of a closed stream, and libraries would write into that file.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)


def exit_status(
    work: Callable[[], int | None],
    when_stopped: str = STARTS_ANEW,
    prints_results: bool = True,
    wording: Callable[[UsageError], str] = str,
) -> int:
    """Run a program; if it ends early, print one sentence on stderr that says why.

    A message that cannot be written, as after ``| head`` or on a full disk, does not end the work.

    Args:
        work: The program; it returns its exit status, or None for 0.
        when_stopped: The sentence after a signal, unless `Stopped` carries its own.
        prints_results: Whether stdout carries results: if so, the work ends where stdout cannot be written.
        wording: Returns the sentence that the program's command line prints for an error.

    Returns:
        The status of `work`; 2 after a `UsageError` or where a file could not be read or written; 128 plus the number
        of a signal, as in shells.

    Examples:
        >>> exit_status(lambda: None)
        0
    """
    tolerant = ("stderr",) if prints_results else ("stderr", "stdout")
    with _stopped_by_signals(), _ignoring_write_errors(*tolerant):
        try:
            status = work()
            sys.stdout.flush()
        except BaseException as error:
            _end_progress_bars()
            failure_status = _report(error, when_stopped, wording)
            if failure_status is None:
                raise
            return failure_status
        finally:
            _flush(sys.stdout)
    return status or 0


def check() -> None:
    """Raise `Stopped` if a signal came and a library swallowed its exception, as destructors do."""
    if _received:
        raise Stopped(_received[0])


def _report(error: BaseException, when_stopped: str, wording: Callable[[UsageError], str]) -> int | None:
    """Print why the program ends and return its status; None for an error that only a traceback explains."""
    stop = _signal_of(error)
    if stop is not None:
        # The reader of stdout has closed it on purpose: no message.
        if stop.number != signal.SIGPIPE and os.environ.get("RANK", "0") == "0":
            rest = f"{stop.kept_summary}; {stop.resume_hint}" if stop.kept_summary else when_stopped
            # The wording of a setting may import modules, which fails where the signal has interrupted an import.
            sentence = wording(UsageError(rest)) if "`" in rest else rest
            print(f"stopped by {stop}: {sentence}", file=sys.stderr)
        return stop.status
    if isinstance(error, OSError) and error.errno is not None:
        logger.debug("the file system refused an operation", exc_info=error)
        error = refused(error)
    if not isinstance(error, UsageError):
        return None
    error.args = (wording(error),)
    if "RANK" not in os.environ:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from lmntk import distributed  # here, since torch takes its time to load

    return distributed.end_with(error)


def _signal_of(error: BaseException) -> Stopped | None:
    """Find the signal that ended the work: libraries may catch `Stopped` and then fail with any other error."""
    if isinstance(error, Stopped):
        return error
    if _received:
        return Stopped(_received[0])
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    return Stopped(signal.SIGPIPE) if isinstance(error, BrokenPipeError) else None


def _end_progress_bars() -> None:
    """Close open progress bars, which would otherwise share a line with the message and be redrawn after it."""
    progress = sys.modules.get("tqdm")
    bars = [] if progress is None else list(progress.tqdm._instances)
    for bar in sorted(bars, key=lambda bar: -abs(bar.pos)):  # the lowest first
        bar.close()


class _TolerantStream:
    """A stream of messages that never fails: what cannot be written is dropped, and so is everything after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text if the stream takes it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            _redirect_to_null(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if it takes that."""
        _flush(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _ignoring_write_errors(*names: str) -> Iterator[None]:
    """Replace some of the standard streams by ones that never fail."""
    streams = {name: getattr(sys, name) for name in names}
    for name, stream in streams.items():
        setattr(sys, name, cast(TextIO, _TolerantStream(stream)))
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        _redirect_to_null(stream)


def _redirect_to_null(stream: TextIO) -> None:
    """Redirect a stream, with what it still buffers, to the null device: Python would fail again when it exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` at the first signal, wherever the program is; ignore the second; die at the third."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    _received.clear()
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN and handler is not None:  # set by nohup, or by C code
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                # After the work it is no longer true that nothing was begun.
                signal.signal(number, signal.SIG_DFL if handler is _exit_at_once else handler)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    if len(_received) == 1:
        raise Stopped(_received[0])
    # A terminal sends Ctrl-C to torchrun and to its processes, and torchrun passes it on: two signals are one request.
    signal.signal(number, signal.SIG_DFL)


def _exit_at_once(number: int, frame: FrameType | None) -> None:
    """Exit at once: there is nothing to clean up yet, and an interrupted import may raise anything."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by SIGINT: nothing was begun yet\n")
    os._exit(128 + number)
