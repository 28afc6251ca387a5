"""What a program does first, while most of it has yet to load, which takes seconds."""

import os
import signal
import sys
from types import FrameType


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
        signal.signal(signal.SIGINT, leave)


def leave(number: int, frame: FrameType | None) -> None:
    """End at once: there is nothing yet to put in order, and an import that is cut short may raise anything."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by SIGINT: nothing was begun yet\n")
    os._exit(128 + number)
