"""Show step by step how far a training moves from its linearisation and its kernel.

It reads the snapshots that a training writes with --kernel_steps 0,1,2,5,10,last and computes no kernel. Several runs
count as seeds: their means are shown. For each step:

  train loss         the loss of the model f on train
  f, lin             accuracy (F1 for MRPC and QQP) of the model and of its linearisation at the start, in percent
  recovery           (lin - PT) / (f - PT): the share of the gain over the pre-trained model that lin has, on --split
  logits distance    ||f - lin|| / ||f - f0||, on --split
  lin = f            share of equal predictions, on --split, in percent
  signs              of the parameters that the step moved, the share against their gradient: 1 for SignGD
  relative distance  mean over train x train of |K - K0| / |K0|, where K0 is the kernel at the start; and the median
  Frobenius          ||K - K0|| / ||K0||
  CKA                centred kernel alignment (Kornblith et al. 2019) of K and K0
  alignment          centred alignment of K with the labels (Cortes et al. 2012)
  effective rank     exp of the entropy of K's singular values (Roy and Vetterli 2007)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmntk.commands.results import add_figure_flag, add_output_flag, check_figure, write_results
from lmntk.config.tool_parser import Parser, run_tool

FORMS = ("text", "markdown", "latex", "csv", "json")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folder of a training with snapshots")
    parser.add_argument("--split", default="test", help="split of recovery and logits: test, dev or train (test)")
    parser.add_argument("--format", choices=FORMS, default="text", help="how to write the table; csv and json hold all "
                        "digits and each run (text)")  # fmt: skip
    add_output_flag(parser)
    add_figure_flag(parser, "draw the numbers against the step")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the drift of a training; return the exit status."""
    return run_tool(make_parser(), _show, argv)


def _show(arguments: argparse.Namespace) -> None:
    check_figure(arguments)
    from lmntk.analysis.drift import drift_of_runs, find_trainings, mean_drift  # here: torch takes seconds to load
    from lmntk.analysis.drift_tables import format_drift
    from lmntk.analysis.saved_run import distinguishing_names

    folders = list({folder.resolve(): folder for folder in arguments.folders}.values())
    runs = find_trainings(folders)
    drifts = drift_of_runs(runs, distinguishing_names(folders), arguments.split, show_progress=sys.stderr.isatty())
    table = format_drift(drifts, arguments.format)

    def draw() -> bytes:
        from lmntk.report import drift_figure

        return drift_figure(mean_drift(drifts))

    write_results(arguments, table, draw)
