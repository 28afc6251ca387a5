"""Show how well each subset of the parameters would predict: layers, kinds, biases, LoRA.

    lmntk subsets result/SST-2-roberta-base-prompt-kernel-parts/16-42 --subset 'layer.11/*/bias' --figure subsets.png

It reads a run with --trainer kernel and --kernel_parts layer,kind,weight-or-bias: its kernel is a sum over parameters,
and the kernel of some of them is the sum of their parts. No model is opened. For each subset:

  parameters         how many there are
  trace              the trace of the train kernel over that of all parameters
  alignment          centred alignment with the labels (Cortes et al. 2012)
  effective rank     exp of the entropy of the singular values of the kernel (Roy and Vetterli 2007)
  condition          the condition number of what is solved, the kernel with the regularization
  loo, loo loss      score and loss of train examples that are predicted from the others (exact leave-one-out)
  dev, test          scores with the run's regularization and untrained logits

LoRA (Hu et al. 2021) at its start, B = 0: "drawn" are the kernels that --kernel_lora_rank has kept, with the random A
of the run's seed; "expected" is their mean over A, a multiple of the weights' own parts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lmntk.commands.results import add_figure_flag, add_output_flag, check_figure, write_results
from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags
from lmntk.errors import Bounds, check_numbers

FORMS = ("text", "markdown", "latex", "csv", "json")
BOUNDS = (Bounds("lora_rank", 1),)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run with --trainer kernel and --kernel_parts")
    add("--subset", action="append", default=[], metavar="GLOB", help="also this subset: patterns of parts, separated "
        "by commas, such as 'layer.3/*/bias' (may be given several times)")  # fmt: skip
    add("--lora", action="append", default=[], metavar="NAMES", help="adapters on these layers or kinds, such as "
        "query,value (may be given several times; default: the usual ones)")  # fmt: skip
    add("--lora_rank", type=int, help="rank of the expectation of LoRA (that of the run's adapters, else 8)")
    add_solver_flags(parser)
    add("--format", choices=FORMS, default="text", help="how to write the tables; csv and json hold all digits (text)")
    add_output_flag(parser)
    add_figure_flag(parser, "draw the scores of the subsets")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the numbers of subsets; return the exit status."""
    return run_tool(make_parser(), _show, argv)


def _show(given: argparse.Namespace) -> None:
    check_figure(given)
    check_numbers(BOUNDS, vars(given))
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares  # here: torch takes seconds to load
    from lmntk.analysis.saved_run import distinguishing_names
    from lmntk.analysis.subset_tables import format_subsets
    from lmntk.analysis.subsets import measure_subsets, subsets_of

    run = find_kernel_run(given.folder)
    problem = read_least_squares(run, solver_flags(given))
    subsets = subsets_of(run, given.subset, given.lora, given.lora_rank)
    found = measure_subsets(problem, subsets, show_progress=sys.stderr.isatty())
    metric = run.task.main_metrics[0] if run.task else "acc"
    table = format_subsets(distinguishing_names([given.folder])[0], metric, problem.choice, found, given.format)

    def draw() -> bytes:
        from lmntk.report.subsets import subsets_figure

        return subsets_figure(found, metric)

    write_results(given, table, draw)
