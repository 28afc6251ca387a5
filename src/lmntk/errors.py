"""The errors that a user can cause, by kind, and what makes them: numbers out of bounds, unknown names, refused files.

A sentence names a setting in backticks, with the value where that helps: `kernel_dtype`, `kernel_dtype=float64`. In
Python it is an argument. The command lines show the same sentence with flags, ``--kernel_dtype float64``
(`lmntk.config.flag_names`): below `config/` nothing knows how a flag is spelt.
"""

import contextlib
import difflib
import errno
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple


class UsageError(Exception):
    """A mistake in settings or files, described in one sentence that names the cause and the remedy.

    `run.py` and the tools print the sentence after ``error:`` and exit with status 2.

    Args:
        sentence: The cause and the remedy, settings in backticks.
        data: What the sentence is about, by name, for code that handles the error.

    Attributes:
        data: The same.
        met_by_all: Whether all processes of a run end with it, and know that.
    """

    met_by_all = False

    def __init__(self, sentence: str, **data: Any) -> None:
        super().__init__(sentence)
        self.data = data


class SettingError(UsageError):
    """A setting has a value that it cannot take, is missing, or contradicts another; data: ``setting``, ``value``."""


class UnknownNameError(UsageError):
    """No task, formula, solver, column … has this name; data: ``name``, ``kind``, ``options``."""


class FileError(UsageError):
    """A file or folder is missing, unreadable, or not what its name says; data: ``path``."""


class DataError(UsageError):
    """An example cannot be used; data: ``path``, ``line`` or ``example``."""


class MissingSplitError(FileError):
    """A split of the data is not there; data: ``path``, ``folder``, ``task``, ``split``, ``cause``."""


class EmbeddingsError(FileError):
    """Sentence embeddings are missing or do not fit the data; data: ``path``, ``model``, ``cause``."""


class TemplateError(UsageError):
    """A template cannot be read, or its mask does not reach the model; data: ``template``."""


class LabelWordError(UsageError):
    """A label word is not one token, or two classes share it; data: ``word``, ``pieces``, ``label``."""


class ModelError(UsageError):
    """A model, tokenizer or adapter cannot be loaded, or does not fit the task; data: ``path`` or ``model``."""


class NotFiniteError(UsageError):
    """NaN or infinity in weights, logits or a kernel; data: ``parameter`` or ``example``."""


class KernelMismatchError(UsageError):
    """A stored kernel is not the one that is asked for; data: ``path``, ``differences``."""


class SolverError(UsageError):
    """A solver cannot work with this kernel or these labels; data: ``solver``."""


class NoLeaveOneOutError(SolverError, AttributeError):
    """A classifier has no ``loo_`` with its solver or kernel: `hasattr` answers False; data: ``solver``."""


class ReportedElsewhereError(UsageError):
    """An error that another process prints."""

    met_by_all = True


class PeerExitedError(UsageError):
    """Another process, with which this one works together, has ended."""


def refused(error: OSError) -> FileError:
    """Say what the file system refused, with which file, and what helps."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    remedy = "take a shorter name" if error.errno == errno.ENAMETOOLONG else "make room, or free the path"
    sentence = f"{what}: {remedy}, and give the same command again; what was finished is kept"
    return FileError(sentence, path=error.filename)


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of a library's error, on one line, cut after 200 characters.

    Examples:
        >>> first_sentence(OSError("no such file. Try again."))
        'no such file'
        >>> first_sentence(KeyError())
        'KeyError'
    """
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__


@contextlib.contextmanager
def as_usage_error(describe: Callable[[str], UsageError]) -> Iterator[None]:
    """Turn any error of a library into a `UsageError`; a `UsageError` passes unchanged.

    Args:
        describe: Makes the error to raise, given the first sentence of the library's.

    Raises:
        UsageError: The code inside raised an `Exception`.

    Examples:
        >>> with as_usage_error(lambda reason: FileError(f"weights.bin is damaged ({reason})")):
        ...     raise ValueError("bad header")
        Traceback (most recent call last):
        lmntk.errors.FileError: weights.bin is damaged (bad header)
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # libraries raise any type for a bad file
        raise describe(first_sentence(error)) from error


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


class Bounds(NamedTuple):
    """The values that a number can take.

    Attributes:
        setting: The setting that has the number.
        least: The least value.
        most: The greatest value.
        above: Whether `least` itself is too little.
        or_zero: Whether 0 is allowed too.
    """

    setting: str
    least: float
    most: float = math.inf
    above: bool = False
    or_zero: bool = False

    def contains(self, value: float) -> bool:
        """Whether a value is allowed; infinity, NaN and what is not a number never are."""
        if not isinstance(value, Real):
            return False
        if self.or_zero and value == 0:
            return True
        enough = value > self.least if self.above else value >= self.least
        return enough and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        """Write the allowed values, for a sentence."""
        zero = "0, or " if self.or_zero else ""
        if self.most < math.inf:
            return f"above {self.least}, up to {self.most}" if self.above else f"{zero}from {self.least} to {self.most}"
        return f"above {self.least}" if self.above else f"{self.least} or more"


def check_numbers(table: Iterable[Bounds], values: Mapping[str, Any]) -> None:
    """Check the numbers of settings against their bounds.

    Args:
        table: The bounds of each setting.
        values: The number of each setting, or a list of numbers; None always passes.

    Raises:
        SettingError: A number is out of bounds; names the first one.

    Examples:
        >>> check_numbers([Bounds("num_demo", 1)], {"num_demo": 0})
        Traceback (most recent call last):
        lmntk.errors.SettingError: `num_demo` is 0, but it must be 1 or more
    """
    for bounds in table:
        given = values[bounds.setting]
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not bounds.contains(value):
                sentence = f"`{bounds.setting}` is {value}, but it must be {bounds}"
                raise SettingError(sentence, setting=bounds.setting, value=value)
