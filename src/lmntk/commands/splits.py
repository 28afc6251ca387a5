"""Draw k-shot splits from the original data sets: data/original/<TASK> -> data/<mode>/<TASK>/<k>-<seed>.

Your own data have columns with names, and may be one file of all examples:

    python tools/generate_k_shot_data.py --mode k-shot-1k-test --task custom --custom_columns text,label --input FILE
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmntk.config.tool_parser import Parser, run_tool
from lmntk.data.kshot import (
    DEFAULT_TASKS,
    KSHOT_MODES,
    PUBLISHED_SEEDS,
    Originals,
    choose_tasks,
    missing_originals,
    read_originals,
    read_user_file,
    read_user_originals,
    write_splits,
)
from lmntk.data.tasks import CUSTOM, TASKS, custom_task
from lmntk.errors import FileError, SettingError

DOWNLOAD = (
    "bash data/download_dataset.sh fetches the originals where there is a network; --data_dir says where they are"
)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults, and the examples above as they stand."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the splits of each task; return the exit status."""
    return run_tool(make_parser(), _draw_splits, argv)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__, formatter_class=_HelpFormatter)
    parser.add_argument(
        "--mode", choices=KSHOT_MODES, default=KSHOT_MODES[0],
        help="k-shot: k dev examples of each label and the whole test set; k-shot-10x: ten times the dev examples; "
        "k-shot-1k-test: at most 1000 test examples",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=16, help="training examples of each label")
    parser.add_argument(
        "--task", nargs="+", metavar="TASK", default=argparse.SUPPRESS,
        help=f"among {', '.join(TASKS)} (default: those of {' '.join(DEFAULT_TASKS)} that have a folder); for your own "
        "data custom, or another name to keep several apart (default: custom)",
    )  # fmt: skip
    parser.add_argument(
        "--custom_columns", metavar="TEXT[,TEXT...],LABEL", default=argparse.SUPPRESS,
        help="your own data: the names of the text columns and, last, of the label column",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="one CSV, TSV or JSON-lines file of all examples; what is in neither train nor dev is the test set "
        "(default: the folder's train and test files)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, nargs="+", metavar="SEED", default=list(PUBLISHED_SEEDS), help="seeds")
    parser.add_argument("--data_dir", type=Path, default=Path("data/original"), help="folder of the originals")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="folder to hold the folder of the mode")
    return parser


def _draw_splits(given: argparse.Namespace) -> None:
    if "input" in given and "custom_columns" not in given:
        raise SettingError(f"--input {given.input} needs --custom_columns, such as text,label: which columns it has")
    if given.k < 1:
        raise SettingError(f"--k {given.k}: a split needs at least one training example of each label")
    for seed in given.seed:
        if not 0 <= seed < 2**32:
            raise SettingError(f"--seed {seed}: seeds run from 0 to {2**32 - 1}")
    splits = 0
    for originals in [_read_user_data(given)] if "custom_columns" in given else _read_all(given):
        for folder in write_splits(originals, given.output_dir, given.mode, given.k, given.seed):
            print(folder)
            splits += 1
    print(f"{splits} splits of {given.k} training examples a label are in {given.output_dir / given.mode}")


def _read_user_data(given: argparse.Namespace) -> Originals:
    names = getattr(given, "task", [CUSTOM])
    if len(names) > 1:
        raise SettingError(f"--task {' '.join(names)}: --custom_columns are those of one data set, name one task")
    task = custom_task(given.custom_columns, name=names[0])
    if "input" in given:
        originals = read_user_file(task, given.input)
    else:
        originals = read_user_originals(task, given.data_dir / task.folder)
    counts = Counter(line.label for line in originals.train)
    print(f"{sum(counts.values())} rows, labels " + ", ".join(f"'{label}' ({n})" for label, n in counts.items()))
    return originals


def _read_all(given: argparse.Namespace) -> Iterator[Originals]:
    """Read one task after the other, so that only one task's originals are in memory at a time."""
    names = getattr(given, "task", None)
    try:
        tasks = choose_tasks(names, given.data_dir)
    except FileError as error:
        raise FileError(f"{error}: {DOWNLOAD}", **error.data) from error
    for missing in filter(None, (missing_originals(task, given.data_dir) for task in tasks)):
        raise FileError(f"{missing} is missing: {DOWNLOAD}", path=missing)
    left_out = [] if names else [name for name in DEFAULT_TASKS if TASKS[name] not in tasks]
    if left_out:
        print(f"note: {given.data_dir} has no folders of {', '.join(left_out)}: left out", file=sys.stderr)
    published = given.seed == list(PUBLISHED_SEEDS[: len(given.seed)])
    for task in tasks:
        if task.seeds_build_on_each_other and not published:
            print(
                f"note: the draws of {task.name} build on those of the seeds before; published splits need --seed "
                f"{' '.join(map(str, PUBLISHED_SEEDS))}",
                file=sys.stderr,
            )
        yield read_originals(task, given.data_dir)
