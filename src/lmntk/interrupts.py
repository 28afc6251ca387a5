"""How a program ends before its end: a mistake of the user's, a signal, a full disk; each said in one sentence."""

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
ANEW = "the same command begins anew"

_received: list[signal.Signals] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: The signal.

    Attributes:
        kept: What of the work at hand is kept, for the user; empty where it is what the program always keeps.
        way_on: How to go on from there.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
        self.kept = ""
        self.way_on = "the same command goes on from there"

    @property
    def status(self) -> int:
        """The exit status that shells know for it."""
        return 128 + self.number


def begin() -> None:
    """Make the standard streams usable, and let Ctrl-C end the program without a traceback until work has begun."""
    # A closed stream would give its number to the next file that is opened, and libraries would write into that.
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
        signal.signal(signal.SIGINT, _leave_at_once)


def exit_status(
    work: Callable[[], int | None],
    when_stopped: str = ANEW,
    prints_results: bool = True,
    wording: Callable[[UsageError], str] = str,
) -> int:
    """Do the work of a program; show on stderr, in a sentence, why it ended early.

    Messages that nobody can read any more, as behind ``| head`` or on a full disk, end no work.

    Args:
        work: What to do; what it returns is the status of an end that is no error.
        when_stopped: What to say after a signal, where `Stopped` says nothing else.
        prints_results: Whether stdout is more than messages: the work ends where that cannot be written.
        wording: Gives the sentence that the program's command line shows for an error.

    Returns:
        0; 2 after a `UsageError` or where a file could not be read or written; 128 and the signal's number after a
        signal, as shells have it.
    """
    with _stopped_by_signals(), _lasting("stderr"), contextlib.ExitStack() as stack:
        if not prints_results:
            stack.enter_context(_lasting("stdout"))
        try:
            status = work()
            sys.stdout.flush()
        except BaseException as error:
            _end_progress_bars()
            told = _told(error, when_stopped, wording)
            if told is None:
                raise
            return told
        finally:
            _flush(sys.stdout)
    return status or 0


def check() -> None:
    """Raise `Stopped` where a signal came whose exception was lost on its way, as in a destructor."""
    if _received:
        raise Stopped(_received[0])


def _told(error: BaseException, when_stopped: str, wording: Callable[[UsageError], str]) -> int | None:
    """Show why the program ends; None for an error that only a traceback explains."""
    stop = _stop_behind(error)
    if stop is not None:
        # A reader of stdout that has gone wants no more words.
        if stop.number != signal.SIGPIPE and os.environ.get("RANK", "0") == "0":
            how = f"{stop.kept}; {stop.way_on}" if stop.kept else when_stopped
            print(f"stopped by {stop}: {how}", file=sys.stderr)
        return stop.status
    if isinstance(error, OSError) and error.errno is not None:
        logger.debug("what the file system refused", exc_info=error)
        error = refused(error)
    if not isinstance(error, UsageError):
        return None
    error.args = (wording(error),)
    if "RANK" not in os.environ:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from lmntk import distributed  # here, since torch takes its time to load

    return distributed.end_with(error)


def _stop_behind(error: BaseException) -> Stopped | None:
    """Find the signal that ended the work: libraries catch what they should not, and may then end in any error."""
    if isinstance(error, Stopped):
        return error
    if _received:
        return Stopped(_received[0])
    if isinstance(error, KeyboardInterrupt):
        return Stopped(signal.SIGINT)
    return Stopped(signal.SIGPIPE) if isinstance(error, BrokenPipeError) else None


def _end_progress_bars() -> None:
    """Go on below the bars that are still shown: words would stand on their line, and they would be drawn again."""
    progress = sys.modules.get("tqdm")
    bars = [] if progress is None else list(progress.tqdm._instances)
    for bar in sorted(bars, key=lambda bar: -abs(bar.pos)):  # the lowest first
        bar.close()


class _Lasting:
    """A stream of messages that never fails: what cannot be written is lost, and all that comes after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, or nothing."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            _send_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        """Write what waits, or nothing."""
        _flush(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting(name: str) -> Iterator[None]:
    """Let one of the standard streams never fail."""
    stream = getattr(sys, name)
    setattr(sys, name, cast(TextIO, _Lasting(stream)))
    try:
        yield
    finally:
        setattr(sys, name, stream)


def _flush(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        _send_nowhere(stream)


def _send_nowhere(stream: TextIO) -> None:
    """Send what a stream still holds, and gets, to the null device: at the exit Python would fail over it again."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` at the first signal, wherever the program is; the second changes nothing, the third kills."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    _received.clear()
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN and handler is not None:  # as nohup has it, or a library written in C
                signal.signal(number, _stop)
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                # Behind the work there is something that was begun.
                signal.signal(number, signal.SIG_DFL if handler is _leave_at_once else handler)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    if len(_received) == 1:
        raise Stopped(_received[0])
    # torchrun passes on what a terminal has sent to all: two signals are one wish, a third is impatience.
    signal.signal(number, signal.SIG_DFL)


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End at once: there is nothing yet to put in order, and an import that is cut short may raise anything."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by SIGINT: nothing was begun yet\n")
    os._exit(128 + number)
