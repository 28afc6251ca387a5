"""Write a page that shows the kernels and results of some runs side by side.

It reads the folders that run.py left (--output_dir), or any with kernels of that layout, and computes no kernel: it
predicts from the stored ones. The page is one HTML file that needs no network; its pictures are also saved beside it
as PNG files. docs/how-to/report.md explains each picture.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add_solver_flags(parser)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder of a run, or with kernels")
    parser.add_argument("--output_dir", type=Path, help="write here (DIR/report; for several DIRs: report)")
    parser.add_argument("--sentences", type=int, nargs="+", metavar="I", help="test sentences to show, counted from 0 "
                        "in the file's order (two surely right, two surely wrong, two undecided)")  # fmt: skip
    parser.add_argument("--data_dir", type=Path, help="where the data files are now (where the kernels record)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report and print where it is; return the exit status."""
    return run_tool(make_parser(), _write, argv)


def _write(arguments: argparse.Namespace) -> None:
    from lmntk.report import write_report  # here, since torch and matplotlib take seconds that --help need not wait

    folders = arguments.folders
    output = arguments.output_dir or (folders[0] / "report" if len(folders) == 1 else Path("report"))
    settings, show = solver_flags(arguments), sys.stderr.isatty()
    page = write_report(folders, output, settings, arguments.sentences, arguments.data_dir, show_progress=show)
    print(f"The report: {page}")
