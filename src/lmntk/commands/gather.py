"""Gather results from the log: per seed the trial that is best on dev, per group of runs their mean on test.

Numbers are percentages; the standard deviation is the population's (divided by the number of seeds), as published.
"""

import argparse
from collections.abc import Sequence

from lmntk.config.tool_parser import log_parser, run_tool
from lmntk.runs import gather
from lmntk.runs.log import MetricKeys, read_log
from lmntk.storage.tables import STYLES


def main(argv: Sequence[str] | None = None) -> int:
    """Print the results of the matching runs, and on stderr what is missing; return the exit status."""
    parser = log_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="data seeds of which none may be missing")

    parser.add_argument("--format", choices=tuple(STYLES), default="text", help="how to print (text)")
    return run_tool(parser, _print_results, argv)


def _print_results(given: argparse.Namespace) -> None:
    keys = MetricKeys(given.key, given.test_key, given.test_key2)
    found = gather.matching_trials(read_log(given.log), given.condition, keys)
    groups = gather.group_trials(found, given.seeds)
    print(gather.as_text(groups) if given.format == "text" else gather.as_table(groups, given.format), end="")
