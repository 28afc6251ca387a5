"""Show which train examples look mislabelled, and which help or hurt a kernel's predictions most.

It reads the folder of a kernel run with lstsq (--output_dir of run.py) and computes no kernel: fits without each train
example follow in closed form from the stored ones. It prints

  looks mislabelled  train examples whose label a fit to all others contradicts, by margin
  helps, hurts       train examples without which the mean squared error of --split rises, or falls, most

and writes all numbers to influence_<split>_<task>.csv in that folder: docs/reference/kernel-files.md explains them.
With other solver settings than the run's, or with --groups, it writes files only where --output_dir names a folder.
With --query TEXT it loads the run's model, predicts the text, and prints which train examples push that prediction.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmntk.commands.results import add_figure_flag, check_figure, write_figure
from lmntk.config.tool_parser import Parser, add_solver_flags, run_tool, solver_flags
from lmntk.errors import SettingError, UnknownNameError, suggest

if TYPE_CHECKING:
    from lmntk.analysis.influence import RunInfluence
    from lmntk.analysis.least_squares import LeastSquaresRun
    from lmntk.analysis.scores import Ids

WITHOUT_QUERY = ("split", "figure", "output_dir")
"""The flags that have no effect beside `query`, which draws and writes nothing."""
FORMS = ("text", "markdown", "latex", "csv", "json")


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a kernel run")
    parser.add_argument("--query", nargs="+", metavar="TEXT", help="a text of your own to predict; for tasks of two "
                        "sentences both, each in quotes")  # fmt: skip
    parser.add_argument("--split", help="split that examples help or hurt (test, else dev)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of each table (10)")
    parser.add_argument("--groups", metavar="FILE", help="leave out groups of train examples: a file with a whole "
                        "number in each line, one for each train example; or label, for the classes")  # fmt: skip
    parser.add_argument("--format", choices=FORMS, default="text", help="how to print; csv holds every train example, "
                        "csv and json all digits (text)")  # fmt: skip
    add_figure_flag(parser, "draw each train example's margin against what the loss does without it")
    parser.add_argument("--data_dir", type=Path, help="where the data files are now (where the kernels record)")
    parser.add_argument("--output_dir", type=Path, help="write the files here (RUN; nowhere with --groups or other "
                        "settings than the run's)")  # fmt: skip
    add_solver_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print what train examples do to a run's predictions; return the exit status."""
    return run_tool(make_parser(), _show, argv)


def _show(arguments: argparse.Namespace) -> None:
    if arguments.top < 1:
        raise SettingError(f"`top={arguments.top}`: give 1 or more", setting="top", value=arguments.top)
    check_figure(arguments)
    _check_query(arguments)
    from lmntk.analysis.influence import read_groups, run_influence, write_influence  # here: torch takes seconds
    from lmntk.analysis.influence_tables import TrainTexts, format_influence
    from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
    from lmntk.storage.atomic import prepare_output_dir

    run = find_kernel_run(arguments.folder)
    if arguments.query is not None and run.task is not None:
        from lmntk.data.examples import check_queries

        check_queries(run.task, [tuple(arguments.query)])  # before the model is loaded, which takes long
    of_run = read_least_squares(run, solver_flags(arguments))
    groups = None if arguments.groups is None else read_groups(arguments.groups, of_run.classes("train"))
    if arguments.query is not None:
        print(_ask(arguments, of_run, groups), end="")
        return
    split = _chosen_split(arguments.split, of_run.x_splits)
    if arguments.figure is not None and split is None:
        sentence = "the run has no kernel of dev or test, on which train examples help or hurt: leave it out"
        raise SettingError(f"`figure={arguments.figure}`: {sentence}", setting="figure", value=arguments.figure)
    writes = _check_output(arguments, of_run)
    found = run_influence(of_run, groups, show_progress=sys.stderr.isatty())
    texts = TrainTexts.read(found, arguments.data_dir)
    print(format_influence(found, texts, arguments.format, split, arguments.top), end="")
    if writes:
        if arguments.output_dir is not None:
            prepare_output_dir(arguments.output_dir)
        files = write_influence(found, arguments.output_dir)
    if split is not None:
        _draw(arguments.figure, found, split)
    if writes:
        print(f"All numbers: {', '.join(map(str, files))}", file=sys.stderr)
    else:
        what = "These are not the run's own settings and examples, so that no files are written"
        print(f"{what}: --output_dir DIR keeps all numbers", file=sys.stderr)


def _check_query(arguments: argparse.Namespace) -> None:
    """Refuse flags that have no effect beside a query."""
    if arguments.query is None:
        return
    for name in WITHOUT_QUERY:
        if (value := getattr(arguments, name)) is not None:
            sentence = (
                f"`{name}={value}` has no effect with `query`, whose table is only printed: leave one of them out"
            )
            raise SettingError(sentence, setting=name, value=value)


def _check_output(arguments: argparse.Namespace, of_run: "LeastSquaresRun") -> bool:
    """Return whether to write files: those of the run's own settings into its folder, others where a folder is named.

    Raises:
        SettingError: The folder is the run's, whose own files would be replaced by answers to another question.
    """
    from lmntk.analysis.solver_choice import choose_solver

    folder: Path | None = arguments.output_dir
    own = dataclasses.replace(choose_solver(of_run.run, {}), source=of_run.choice.source)
    if arguments.groups is None and of_run.choice == own:
        return True
    if folder is not None and folder.resolve() == of_run.run.folder.resolve():
        raise SettingError(
            f"`output_dir={folder}` is the run's folder, whose tables are those of its own settings and single train "
            "examples: give another one",
            setting="output_dir",
            value=folder,
        )
    return folder is not None


def _draw(figure: Path | None, found: "RunInfluence", split: str) -> None:
    def draw() -> bytes:
        from lmntk.report import influence_figure

        return influence_figure(found, split)

    write_figure(figure, draw)


def _ask(arguments: argparse.Namespace, of_run: "LeastSquaresRun", groups: "Ids | None") -> str:
    """Predict a text with the run's model, and return the table of what pushes the prediction."""
    from lmntk import startup

    startup.import_transformers()
    from lmntk.analysis.influence import query_influence, run_influence
    from lmntk.analysis.influence_tables import TrainTexts, format_query
    from lmntk.trainers.query import query_kernel

    found = run_influence(of_run, groups, splits=())
    train, run = of_run.train.path, of_run.run
    count, model = len(of_run.classes("train")), run.record.get("model_name_or_path", "the model")
    print(f"loading {model}: the kernel of {count} train examples with the text takes some seconds", file=sys.stderr)
    kernel, logits = query_kernel(
        run.record, train, [tuple(arguments.query)], arguments.data_dir, sys.stderr.isatty()
    )  # fmt: skip
    asked = query_influence(of_run, kernel, logits if of_run.choice.adjust_for_init else None, groups)
    return format_query(found, asked, TrainTexts.read(found, arguments.data_dir), arguments.format, arguments.top)


def _chosen_split(asked: str | None, splits: Sequence[str]) -> str | None:
    if asked is None:
        return next((split for split in ("test", "dev") if split in splits), None)
    if asked not in splits:
        sentence = suggest(asked, splits, "split") if splits else f"`split={asked}`: the run has no kernel but train's"
        raise UnknownNameError(sentence, name=asked, kind="split", options=list(splits))
    return asked
