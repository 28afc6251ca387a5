"""The one error a user can cause, and the sentences that help: the right name, and what a file system refused."""

import difflib
import errno
from collections.abc import Iterable


class UsageError(Exception):
    """A mistake in flags or files, told in one sentence that names the cause and the way out.

    `run.py` and the tools print the sentence after ``error:`` and exit with status 2.

    Attributes:
        met_by_all: Whether all processes of a run end with it, and know that.
    """

    met_by_all = False


class ReportedElsewhereError(UsageError):
    """The same on a process that is not the one to show it."""

    met_by_all = True


class PeerExitedError(UsageError):
    """Another process, with which this one works together, has ended."""


def refused(error: OSError) -> UsageError:
    """Say what the file system refused, with which file, and what helps."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    way_out = "take a shorter name" if error.errno == errno.ENAMETOOLONG else "make room, or clear the way"
    return UsageError(f"{what}: {way_out}, and give the same command again; what was finished is kept")


def suggest(word: str, options: Iterable[str], kind: str) -> str:
    """Say that `word` is no known `kind`, what was probably meant, and what there is.

    Args:
        word: What the user wrote.
        options: The names that exist.
        kind: What the names stand for, in the singular: ``"task"``, ``"flag"``.

    Returns:
        One line, e.g. ``unknown task 'sst2': did you mean 'SST-2'? Available: SST-2, mr``.
    """
    names = list(options)
    by_folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_folded, n=1, cutoff=0.6)
    hint = f" did you mean '{by_folded[close[0]]}'?" if close else ""
    return f"unknown {kind} '{word}':{hint} Available: {', '.join(names)}"
