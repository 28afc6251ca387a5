"""The command `lmntk`: it hands the rest of its line to one of the commands in this folder."""

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lmntk import __version__, interrupts
from lmntk.errors import UnknownNameError, suggest

NAMES = (
    *("tasks", "splits", "kernel", "train", "gather", "ensemble", "report", "compare"),
    *("influence", "subsets", "forecast", "select", "prompts", "behaviour", "drift", "validate", "reproduce"),
    *("features", "grid", "estimate", "download", "embed"),
)
"""The commands in the order of the help; each is the module of that name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command's name and its flags; by default those of the process.

    Returns:
        The exit status: 0, 2 after a mistake, or 128 and the number of the signal that ended the command.

    Example:
        >>> main(["--version"])
        lmntk 0.1.0
        0
    """
    if argv is None:
        interrupts.begin()
        argv = sys.argv[1:]
        sys.argv[0] = f"lmntk {argv[0]}" if argv else "lmntk"  # the program's name in the command's own help
    name, rest = (argv[0], [*argv[1:]]) if argv else ("--help", [])
    if name not in _summaries():
        return interrupts.exit_status(lambda: _print_or_refuse(name))
    try:
        status: int = import_module(f"lmntk.commands.{name}").main(rest)
    except ModuleNotFoundError as error:
        if (error.name or "lmntk").startswith("lmntk"):
            raise
        print(f"error: lmntk {name} needs {error.name}: pip install 'lmntk[all]'", file=sys.stderr)
        return 2
    return status


def _print_or_refuse(name: str) -> None:
    if name in ("-h", "--help", "help"):
        print(_usage())
    elif name == "--version":
        print(f"lmntk {__version__}")
    else:
        raise UnknownNameError(suggest(name, _summaries(), "command"), name=name, options=[*_summaries()])


def _usage() -> str:
    rows = "\n".join(f"  {name:<10}{summary}" for name, summary in _summaries().items())
    return (
        f"usage: lmntk COMMAND [flags]\n\n{rows}\n\n"
        "`lmntk COMMAND --help` explains the flags of a command; `lmntk --version` prints the version."
    )


def _summaries() -> dict[str, str]:
    """The first line of each command's docstring, which is read without importing the command."""
    files = {name: Path(__file__).with_name(f"{name}.py") for name in NAMES}
    return {
        name: (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        for name, path in files.items()
        if path.is_file()
    }


if __name__ == "__main__":
    sys.exit(main())
