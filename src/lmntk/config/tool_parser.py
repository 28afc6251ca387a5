"""The command lines of the tools: mistakes are told in one sentence, like all others."""

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, cast

from lmntk import interrupts
from lmntk.config.command_words import check_words
from lmntk.config.flag_names import FlagFormatter, in_flags
from lmntk.errors import UsageError, suggest


class Parser(argparse.ArgumentParser):
    """A parser that leaves the telling of errors to whoever calls it."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse what is there, after a look at its words."""
        words = sys.argv[1:] if args is None else list(args)
        check_words(words)
        return super().parse_known_args(words, namespace)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line; an unknown flag is answered with the one that was probably meant.

        Raises:
            UsageError: A flag does not exist, lacks its value, or has one that it cannot take.
        """
        arguments, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            raise UsageError(suggest(unknown[0].split("=")[0], flags, "flag"))
        return arguments


def run_tool(
    parser: Parser,
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    when_stopped: str = interrupts.ANEW,
) -> int:
    """Read a tool's command line and do its work; warnings, and why it ended early, go to stderr, settings as flags.

    Args:
        parser: The tool's flags.
        work: What to do with them; what it returns is the status of an end that is not an error.
        argv: The command line without the program's name; by default that of the process.
        when_stopped: What to say after a signal.

    Returns:
        The exit status, as `interrupts.exit_status` has it.
    """
    names = {flag.removeprefix("--") for action in parser._actions for flag in action.option_strings}
    _log_warnings(names)
    return interrupts.exit_status(lambda: work(parser.read(argv)), when_stopped, wording=lambda e: _wording(e, names))


def _wording(error: UsageError, names: Collection[str]) -> str:
    from lmntk.config.remedies import sentence_of  # here, since an error alone needs the table of tasks

    return in_flags(sentence_of(error), names)


def _log_warnings(names: Collection[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter("warning: %(message)s", None, names))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _AnyName:
    """All names of flags, for the tools that do not end in `run_tool` yet."""

    def __contains__(self, name: object) -> bool:
        return True


def exit_status(main: Callable[[], int | None], when_stopped: str = interrupts.ANEW) -> int:
    """Do the work of a tool; its warnings, and why it ended early, are told on stderr.

    Args:
        main: What to do.
        when_stopped: What to say after a signal.

    Returns:
        The exit status, as `interrupts.exit_status` has it.
    """
    names = cast(Collection[str], _AnyName())
    _log_warnings(names)
    return interrupts.exit_status(main, when_stopped, wording=lambda error: _wording(error, names))
