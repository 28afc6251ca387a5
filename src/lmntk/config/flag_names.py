"""The names of settings as a command line spells them: `kernel_dtype=float64` is ``--kernel_dtype float64``."""

import logging
import re
from collections.abc import Collection

_SETTING = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


def in_flags(sentence: str, names: Collection[str]) -> str:
    """Write the settings that a sentence names in backticks as flags.

    Args:
        sentence: Of an error or a log line, such as ``needs `kernel_dtype=float64` and `overwrite_kernels=True```.
        names: The flags of the command line, without ``--``; other words in backticks stay as they are.

    Returns:
        The sentence; ``needs --kernel_dtype float64 and --overwrite_kernels`` in the example.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names:
            return match[0]
        return f"--{name}" if value in (None, "True") else f"--{name} {value}"

    return _SETTING.sub(flag, sentence)


class FlagFormatter(logging.Formatter):
    """Formats log lines with flags in place of settings.

    Args:
        fmt: As for `logging.Formatter`.
        datefmt: As for `logging.Formatter`.
        names: The flags of the command line, without ``--``.
    """

    def __init__(self, fmt: str, datefmt: str | None, names: Collection[str]) -> None:
        super().__init__(fmt, datefmt)
        self._names = names

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return in_flags(super().format(record), self._names)
