"""Choose the k train examples of each class that bring most, and write them as a k-shot folder.

    lmntk select result/mr-roberta-base-prompt-kernel-pool/64-42 -k 16 --by loo --output_dir data/by-loo/mr/16-42

It reads a run with --trainer kernel whose train examples are the pool, and asks no model. The ways to choose:

  loo       in each step the example with the least mean squared error over the pool, each example of which is predicted
            by the other chosen ones
  dev       the same by the mean squared error on dev
  variance  the example with the largest posterior variance: a pivoted Cholesky decomposition; no label counts but the
            class
  herding   the example that brings the mean feature nearest to its class's in the pool (Chen, Welling and Smola 2010)
  random    k of each class at random

Classes take turns, so that the first examples are a choice for smaller k. The folder gets the train file with the
chosen rows, copies of dev and test, and selection.json, which says how they were chosen. The table compares their
scores, by the kernel's sub-matrix, with those of random subsets.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmntk.commands.results import add_figure_flag, check_figure, write_figure
from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags
from lmntk.errors import Bounds, SettingError, check_numbers

if TYPE_CHECKING:
    from lmntk.analysis.example_selection import Selection
    from lmntk.analysis.saved_run import SavedRun

FORMS = ("text", "markdown", "latex", "csv", "json")
RECORD = "selection.json"
BOUNDS = (Bounds("draws", 1), Bounds("seed", 0))
BY = ("loo", "dev", "variance", "herding", "random")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="RUN", help="folder of a run with --trainer kernel, whose train set is the pool")
    add("--k", "-k", type=int, required=True, help="examples of each class")
    add("--by", choices=BY, default="loo", help="how to choose (loo)")
    add("--output_dir", type=Path, metavar="DIR", help="the k-shot folder to write; without it only the table is shown")
    add("--data_dir", type=Path, metavar="DIR", help="where the data files of the run are now (where it records)")
    add("--seed", type=int, default=0, help="seed of the choice at random, and of the random subsets (0)")
    add("--draws", type=int, default=100, help="random subsets to compare with (100)")
    add_solver_flags(parser)
    add("--format", choices=FORMS, default="text", help="how to write the table (text)")
    add_figure_flag(parser, "draw the scores of the choice beside those of random subsets")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Choose the examples; return the exit status."""
    return run_tool(make_parser(), _select, argv)


def _select(given: argparse.Namespace) -> None:
    check_numbers(BOUNDS, vars(given))
    check_figure(given)
    from lmntk.analysis.example_selection import format_selection, select_examples  # here, since torch takes seconds
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
    from lmntk.data.subsets import write_new_files

    run = find_kernel_run(given.folder)
    _check_output(given.output_dir)
    problem = read_least_squares(run, solver_flags(given))
    show = sys.stderr.isatty()
    train = None if given.output_dir is None else run.data_file("train", given.data_dir)
    found = select_examples(problem, given.by, given.k, given.seed, given.draws, show)
    if train is not None:
        write_new_files(given.output_dir, _files(given, run, train, found))
    print(format_selection(found, given.format), end="")
    stream = sys.stdout if given.format == "text" else sys.stderr
    metric = run.task.main_metrics[0] if run.task else "acc"

    def draw() -> bytes:
        from lmntk.report.prompts import selection_figure

        return selection_figure(found, metric)

    write_figure(given.figure, draw, stream)
    if train is not None:
        print(f"The k-shot folder: {given.output_dir}", file=stream)


def _check_output(folder: Path | None) -> None:
    """Refuse the folder of a run, whose files a k-shot folder would lie among."""
    from lmntk.analysis.saved_run import holds_run

    if folder is not None and holds_run(folder):
        sentence = f"`output_dir={folder}` holds a run: give a folder of its own for the chosen examples"
        raise SettingError(sentence, setting="output_dir", value=folder)


def _files(given: argparse.Namespace, run: "SavedRun", train: Path, found: "Selection") -> dict[str, bytes]:
    """Return the files of the k-shot folder: the chosen rows class by class, as `lmntk splits` writes them."""
    from lmntk.data.examples import read_examples
    from lmntk.data.subsets import subset_files
    from lmntk.storage.kernel_metadata import file_hash

    task = run.task
    assert task is not None  # else it has no file
    labels = [example.label for example in read_examples(task, train)]
    order = sorted(found.examples, key=lambda example: task.labels.index(labels[example]))
    record = {
        "by": found.by, "k": found.k, "seed": given.seed, "task": task.name, "run": str(run.folder.resolve()),
        "pool": str(train.resolve()), "pool_sha256": file_hash(train), "scores": found.scores,
        "examples": [{"index": example, "label": labels[example]} for example in found.examples],
    }  # fmt: skip
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    return subset_files(task, train, order) | {RECORD: text.encode()}
