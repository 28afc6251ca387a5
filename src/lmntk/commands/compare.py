"""Compare two kernels: how far apart they are, how well they are aligned, and whether they predict the same labels.

A and B are folders that run.py left (or any with kernels of that layout), compared split by split, or two kernel files:
two formulas, a model before and after fine-tuning, your kernels and published ones. For each split:

  distance     ||A - B|| / ||B||, over all entries
  scaled       the same, for the multiple of A that is nearest to B
  CKA          centred kernel alignment (Kornblith et al. 2019) of the kernels of the logits' differences, -1 to 1
  correlation  Pearson correlation of all entries
  acc A, B     accuracy of the same solver on each kernel (folders with the train kernel)
  agreement    share of examples that both give the same label

Kernels of one logit and of two are compared as kernels of the logits' differences, an asymmetric kernel with a
symmetric one as the mean of its two directions.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags
from lmntk.storage.tables import STYLES, format_table


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="a folder with kernels, or a kernel file")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    add_solver_flags(parser)
    parser.add_argument("--format", choices=tuple(STYLES), default="text", help="how to print the table (text)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print how two kernels compare; return the exit status."""
    return run_tool(make_parser(), _print_comparison, argv)


def _print_comparison(arguments: argparse.Namespace) -> None:
    from lmntk.analysis.compare import compare_paths  # here, since torch takes seconds that --help need not wait

    comparisons, notes = compare_paths(arguments.first, arguments.second, solver_flags(arguments))
    rows = [comparison.cells() for comparison in comparisons]
    print(format_table(rows, arguments.format, words=["split"]), end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
