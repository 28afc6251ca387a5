#!/usr/bin/env python
"""Draw k-shot splits from the original data sets: data/original/<TASK> -> data/<mode>/<TASK>/<k>-<seed>.

Data of one's own have columns with names, and may be one file of all examples:

    python tools/generate_k_shot_data.py --mode k-shot-1k-test --task custom --custom_columns text,label --input FILE
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from lmntk.config.tool_parser import Parser, exit_status
from lmntk.data.kshot import (
    DEFAULT_TASKS,
    KSHOT_MODES,
    PUBLISHED_SEEDS,
    Originals,
    missing_originals,
    read_originals,
    read_own_file,
    read_own_originals,
    write_splits,
)
from lmntk.data.tasks import CUSTOM, TASKS, Task, custom_task, find_task
from lmntk.errors import UsageError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that shows defaults, and the examples above as they stand."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; numbers are checked here, names of tasks where they are looked up."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--mode", choices=KSHOT_MODES, default=KSHOT_MODES[0],
        help="k-shot: k dev examples of each label and the whole test set; k-shot-10x: ten times the dev examples; "
        "k-shot-1k-test: at most 1000 test examples",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=16, help="training examples of each label")
    parser.add_argument(
        "--task", nargs="+", metavar="TASK",
        help=f"among {', '.join(TASKS)} (default: those that are there of {' '.join(DEFAULT_TASKS)}); for data of "
        "one's own custom, or another name to keep several apart (default: custom)",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    own = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--custom_columns", metavar="TEXT[,TEXT...],LABEL", **own,
        help="data of one's own: the names of the text columns and, last, of the label's",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=Path, metavar="FILE", **own,
        help="one CSV, TSV or JSON-lines file of all examples; what is neither train nor dev is the test set (default: "
        "the folder's train and test files)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, nargs="+", metavar="SEED", default=list(PUBLISHED_SEEDS), help="seeds")
    parser.add_argument("--data_dir", type=Path, default=Path("data/original"), help="where the originals are")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="where the folder of the mode is to be")
    arguments = parser.read(argv)
    if "input" in arguments and "custom_columns" not in arguments:
        raise UsageError(f"--input {arguments.input} needs --custom_columns, such as text,label: which columns it has")
    if arguments.k < 1:
        raise UsageError(f"--k {arguments.k}: a split needs at least one training example of each label")
    for seed in arguments.seed:
        if not 0 <= seed < 2**32:
            raise UsageError(f"--seed {seed}: seeds run from 0 to {2**32 - 1}")
    return arguments


def choose_tasks(names: list[str] | None, data_dir: Path) -> list[Task]:
    """Look up the tasks asked for, or the usual ones as far as their folders exist; each folder counts once."""
    download = "bash data/download_dataset.sh fetches the originals where there is a network"
    tasks: dict[str, Task] = {}
    left_out = []
    for name in names or DEFAULT_TASKS:
        task = TASKS[find_task(name).folder]
        missing = missing_originals(task, data_dir)
        if missing is None:
            tasks[task.name] = task
        elif names or missing != data_dir / task.folder:
            raise UsageError(f"{missing} is missing: {download}; --data_dir says where they are")
        else:
            left_out.append(task.name)
    if not tasks:
        raise UsageError(f"{data_dir} holds none of the usual tasks: {download}; --data_dir says where they are")
    if left_out:
        print(f"note: {data_dir} has no folders of {', '.join(left_out)}: left out", file=sys.stderr)
    return list(tasks.values())


def read_own(arguments: argparse.Namespace) -> Originals:
    """Read data of one's own: the file given, or a folder's train and test files."""
    names = getattr(arguments, "task", [CUSTOM])
    if len(names) > 1:
        raise UsageError(f"--task {' '.join(names)}: --custom_columns are those of one data set, name one task")
    task = custom_task(arguments.custom_columns, name=names[0])
    if "input" in arguments:
        originals = read_own_file(task, arguments.input)
    else:
        originals = read_own_originals(task, arguments.data_dir / task.folder)
    counts = Counter(line.label for line in originals.train)
    print(f"{sum(counts.values())} rows, labels " + ", ".join(f"'{label}' ({n})" for label, n in counts.items()))
    return originals


def read_all(arguments: argparse.Namespace) -> Iterator[Originals]:
    """Read task by task, so that only one task's originals are in memory at a time."""
    if "custom_columns" in arguments:
        yield read_own(arguments)
        return
    for task in choose_tasks(getattr(arguments, "task", None), arguments.data_dir):
        published = arguments.seed == list(PUBLISHED_SEEDS[: len(arguments.seed)])
        if task.seeds_build_on_each_other and not published:
            print(
                f"note: the draws of {task.name} build on those of the seeds before; published splits need --seed "
                f"{' '.join(map(str, PUBLISHED_SEEDS))}",
                file=sys.stderr,
            )
        yield read_originals(task, arguments.data_dir)


def main(argv: list[str] | None = None) -> None:
    """Draw the splits of each task."""
    arguments = parse_arguments(argv)
    splits = 0
    for originals in read_all(arguments):
        for folder in write_splits(originals, arguments.output_dir, arguments.mode, arguments.k, arguments.seed):
            print(folder)
            splits += 1
    print(f"{splits} splits of {arguments.k} training examples a label are in {arguments.output_dir / arguments.mode}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
