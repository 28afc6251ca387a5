"""How a run ends before its end: a mistake of the user's, Ctrl-C, SIGTERM; each said in a sentence."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from lmntk.errors import UsageError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: list[signal.Signals] = []


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: The signal.

    Attributes:
        kept: What of the work at hand is kept, for the user.
        way_on: How to go on from there.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number
        self.kept = "kernels that were finished are kept"
        self.way_on = "the same command goes on from there"

    @property
    def status(self) -> int:
        """The exit status that shells know for it."""
        return 128 + self.number


def exit_status(work: Callable[[], None]) -> int:
    """Do the work of a program; show on stderr, in a sentence, why it ended early.

    Returns:
        0; 2 after a `UsageError`; 128 and the signal's number after a signal, as shells have it.
    """
    with _stopped_by_signals():
        try:
            work()
        except BaseException as error:
            # Libraries catch what they should not: an import that is cut short may end in any error.
            stop = error if isinstance(error, Stopped) else Stopped(_received[0]) if _received else None
            if stop is not None:
                if os.environ.get("RANK", "0") == "0":
                    print(f"stopped by {stop}: {stop.kept}; {stop.way_on}", file=sys.stderr)
                return stop.status
            if not isinstance(error, UsageError):
                raise
            from lmntk import distributed  # here, since torch takes its time to load

            if distributed.tells(error):
                print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def check() -> None:
    """Raise `Stopped` where a signal came whose exception was lost on its way, as in a destructor."""
    if _received:
        raise Stopped(_received[0])


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
                signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number))
    if len(_received) == 1:
        raise Stopped(_received[0])
    # torchrun passes on what a terminal has sent to all: two signals are one wish, a third is impatience.
    signal.signal(number, signal.SIG_DFL)
