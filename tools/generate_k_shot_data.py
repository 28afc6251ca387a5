#!/usr/bin/env python
"""Draw k-shot splits from the original data sets: data/original/<TASK> -> data/<mode>/<TASK>/<k>-<seed>."""

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk.errors import UsageError, suggest
from lmntk.examples import KSHOT_MODES, PUBLISHED_SEEDS
from lmntk.kshot import DEFAULT_TASKS, missing_originals, read_originals, write_splits
from lmntk.tasks import TASKS, Task, find_task


class Parser(argparse.ArgumentParser):
    """A parser that leaves the telling of errors to `main`."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise UsageError(f"{message}; see --help")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; numbers are checked here, names of tasks where they are looked up."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--mode", choices=KSHOT_MODES, default=KSHOT_MODES[0],
        help="k-shot: k dev examples of each label and the whole test set; k-shot-10x: ten times the dev examples; "
        "k-shot-1k-test: at most 1000 test examples",
    )  # fmt: skip
    parser.add_argument("--k", type=int, default=16, help="training examples of each label")
    parser.add_argument(
        "--task", nargs="+", metavar="TASK",
        help=f"among {', '.join(TASKS)} (default: those that are there of {' '.join(DEFAULT_TASKS)})",
        default=argparse.SUPPRESS,
    )  # fmt: skip
    parser.add_argument("--seed", type=int, nargs="+", metavar="SEED", default=list(PUBLISHED_SEEDS), help="seeds")
    parser.add_argument("--data_dir", type=Path, default=Path("data/original"), help="where the originals are")
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="where the folder of the mode is to be")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise UsageError(suggest(unknown[0].split("=")[0], flags, "flag"))
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


def main(argv: list[str] | None = None) -> None:
    """Draw the splits task by task, so that only one task's originals are in memory at a time."""
    arguments = parse_arguments(argv)
    tasks = choose_tasks(getattr(arguments, "task", None), arguments.data_dir)
    for task in tasks:
        published = arguments.seed == list(PUBLISHED_SEEDS[: len(arguments.seed)])
        if task.seeds_build_on_each_other and not published:
            print(
                f"note: the draws of {task.name} build on those of the seeds before; published splits need --seed "
                f"{' '.join(map(str, PUBLISHED_SEEDS))}",
                file=sys.stderr,
            )
        originals = read_originals(task, arguments.data_dir)
        for folder in write_splits(originals, arguments.output_dir, arguments.mode, arguments.k, arguments.seed):
            print(folder)
    splits = len(tasks) * len(arguments.seed)
    print(f"{splits} splits of {arguments.k} training examples a label are in {arguments.output_dir / arguments.mode}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s")
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
