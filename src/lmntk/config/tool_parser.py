"""Parsers of the tools, and the one way to end a tool: an error is printed as one sentence."""

import argparse
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmntk import interrupts
from lmntk.config.command_words import check_words
from lmntk.config.flag_names import RUN_SETTINGS, FlagFormatter, in_flags
from lmntk.errors import UsageError, suggest

SOLVER_FLAGS = ("kernel_solver", "kernel_regularization", "kernel_gamma", "kernel_lambda")


class Parser(argparse.ArgumentParser):
    """A parser that raises errors for its caller to report; the description keeps its line breaks.

    Args:
        description: What the tool does.
        **settings: As for `argparse.ArgumentParser`.
    """

    def __init__(self, description: str | None = None, **settings: Any) -> None:
        super().__init__(
            description=description, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings}
        )

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


def log_parser(description: str | None) -> Parser:
    """Return a parser with the flags of the tools that read the log: which runs, and which of their metrics."""
    parser = Parser(description)
    parser.add_argument(
        "--condition", required=True, metavar="DICT",
        help="which runs, as a Python dictionary: \"{'tag': 'x', 'task_name': 'sst-2'}\". A list as a value means "
        "any of these; mrpc/acc, mrpc/f1, qqp/acc, qqp/f1, sts-b/pearson and sts-b/spearmanr choose a metric; "
        "without a task_name: all tasks",
    )  # fmt: skip
    parser.add_argument("--log", type=Path, default=Path("log"), help="the log that run.py appends to (log)")
    parser.add_argument("--key", help="metric to choose by (the task's, on dev), such as sst-2_dev_eval_acc")
    parser.add_argument("--test_key", help="metric to report (the task's, on test)")
    parser.add_argument("--test_key2", help="second metric to report (the task's other one, if it has two)")
    return parser


def add_solver_flags(parser: Parser) -> None:
    """Add flags that replace the solver settings of saved runs."""
    from lmntk.solvers import SOLVERS  # here, since few tools need scipy
    from lmntk.solvers.problem import SolverSettings

    default = SolverSettings()
    parser.add_argument(
        "--kernel_solver", choices=tuple(SOLVERS), help="predict with this solver, not the run's (lstsq if unknown)"
    )
    for name, what, value in (
        ("kernel_regularization", "regularization of the solver", default.regularization),
        ("kernel_gamma", "gamma of the asym solver", default.gamma),
        ("kernel_lambda", "lambda of the asym solver", default.lambda_),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{what} ({value:g} if unknown)")


def solver_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the flags of `add_solver_flags` by name, None where not given."""
    return {name: getattr(arguments, name) for name in SOLVER_FLAGS}


def run_tool(
    parser: Parser,
    work: Callable[[argparse.Namespace], int | None],
    argv: Sequence[str] | None = None,
    when_stopped: str = interrupts.STARTS_ANEW,
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
    names = {flag.removeprefix("--") for action in parser._actions for flag in action.option_strings} | {*RUN_SETTINGS}
    _log_warnings(names)
    return interrupts.exit_status(lambda: work(parser.read(argv)), when_stopped, wording=lambda e: wording(e, names))


def wording(error: UsageError, names: Collection[str] = RUN_SETTINGS) -> str:
    """Return the sentence of an error with flags and commands.

    Args:
        error: The error.
        names: The flags of the command line, without ``--``.
    """
    from lmntk.config.remedies import sentence_of  # here, since an error alone needs the table of tasks

    return in_flags(sentence_of(error), names)


def _log_warnings(names: Collection[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(FlagFormatter("warning: %(message)s", None, names))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
