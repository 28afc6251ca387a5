"""The command lines of the tools: mistakes are told in one sentence, like all others."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from lmntk.errors import UsageError, suggest


class Parser(argparse.ArgumentParser):
    """A parser that leaves the telling of errors to whoever calls it."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see --help")

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


def exit_status(main: Callable[[], None]) -> int:
    """Do the work of a tool, its warnings, a `UsageError` and Ctrl-C told on stderr; return the exit status."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command begins anew", file=sys.stderr)
        return 130
    return 0
