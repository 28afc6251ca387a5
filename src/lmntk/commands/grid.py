"""A grid of runs of run_fewshot.sh, over tasks, seeds, learning rates, formulas and whatever else its flags say.

    python tools/run_grid.py TAG=lr TASK=SST-2,mr SEED=13,42 --learning_rate 1e-5 2e-5 --max_steps 1000
    python tools/run_grid.py --grid formulas.json --jobs 2 TAG=formulas SEED=100,13,21,42,87 --binary_classification

NAME=value,value are variables of run_fewshot.sh; the shell's own count as they do there. Every other --flag goes to
run.py: with several values, one a run; without a value it is a switch, on in every run. A grid in a JSON file is an
object, or a list of them for settings that go together; the command line adds to each, and overrides. There true is
a switch, false is --flag=False, and null leaves the setting out:

    [{"TRAINER": "kernel", "kernel_formula": ["sgd", "signgd"]},
     {"TRAINER": "kernel", "kernel_formula": "asymmetric_signgd", "kernel_solver": "asym", "kernel_gamma": [0.1, 1]}]

The flags that vary make GRID_TAG, so each run has a different output folder. There, grid-run.log is what it prints
and grid-stamp the hash of its settings, with the word "unfinished" until it has ended well: runs whose stamp fits,
without that word, are not started again.
"""

import argparse
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from lmntk.config.legacy_flags import is_flag
from lmntk.config.tool_parser import Parser, run_tool
from lmntk.errors import SettingError, UnknownNameError, UsageError, suggest
from lmntk.interrupts import Stopped
from lmntk.runs.grid import DEFAULTS, Grid, GridRun, Value, base, expand, read_grids, setting_name
from lmntk.runs.processes import run_all
from lmntk.runs.progress import Bar
from lmntk.storage.wording import quantity


class GridParser(Parser):
    """A parser that leaves the variables and the flags of run.py to `read_words`."""

    def __init__(self) -> None:
        usage = "%(prog)s [--grid FILE.json] [--jobs N] [--list] [NAME=value,value …] [--flag value value …]"
        style = argparse.RawTextHelpFormatter
        super().__init__(usage=usage, description=__doc__, formatter_class=style, allow_abbrev=False)
        self.add_argument("--grid", type=Path, metavar="FILE.json", help="a grid, or several, in a file")
        self.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
        self.add_argument("--list", action="store_true", help="print the commands and run nothing")

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line, and the file if it names one; `runs` are those of the grid."""
        given, words = self.parse_known_args(argv)
        if given.jobs < 1:
            raise SettingError(f"--jobs {given.jobs}: at least one run at a time", setting="jobs", value=given.jobs)
        grids = [grid | read_words(words) for grid in (read_grids(given.grid) if given.grid else [{}])]
        if not any(grids):
            ways = "give variables (SEED=13,42), flags (--learning_rate 1e-5 2e-5) or --grid"
            raise SettingError(f"the grid is empty: {ways}", setting="grid")
        shell: Grid = {name: [os.environ[name]] for name in DEFAULTS if os.environ.get(name)}
        given.runs = expand([shell | grid for grid in grids])
        return given


def read_words(words: Sequence[str]) -> Grid:
    """Read NAME=value,value and --flag value value from the command line.

    Examples:
        >>> read_words(["SEED=13,42", "--learning_rate", "1e-5", "2e-5", "--fp16"])
        {'SEED': ['13', '42'], 'learning_rate': ['1e-5', '2e-5'], 'fp16': [True]}
    """
    grid: Grid = {}
    flag = None
    for word in words:
        name, equals, text = word.partition("=")
        is_variable = name.isidentifier() and (name.isupper() or name.upper() in DEFAULTS)
        if is_flag(word):
            key = setting_name(name)
            grid[key], flag = (list[Value]([text]), None) if equals else (list[Value](), key)
        elif equals and (is_variable or flag is None):
            if not name.isupper():
                raise UnknownNameError(suggest(name, DEFAULTS, "variable"), name=name, options=[*DEFAULTS])
            grid[setting_name(name)], flag = list[Value](text.split(",")), None
            if text and "" in grid[name]:
                raise UsageError(f"{word} has a comma without a value beside it", word=word)
        elif flag is None:
            sentence = f"'{word}' belongs to no flag: variables are NAME=value, values follow their --flag"
            raise UsageError(sentence, word=word)
        else:
            grid[flag].append(word)
    return {name: values or [True] for name, values in grid.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are not done; return the exit status, 1 if some failed."""
    return run_tool(GridParser(), _run_grid, argv)


def _run_grid(given: argparse.Namespace) -> int:
    runs: list[GridRun] = given.runs
    todo = [run for run in runs if not run.is_done()]
    if given.list:
        print(*(run.shell_line + ("" if run in todo else "  # done") for run in runs), sep="\n")
        return 0
    before = len(runs) - len(todo)
    print(f"{quantity(len(runs), 'run')}: {before} done already, {len(todo)} to do", flush=True)
    # Runs of one grid differ in length: the mean over all says more than the last few.
    with tqdm(total=len(todo), unit="run", smoothing=0) as bar:
        num_finished, failures, signals = run_all(todo, given.jobs, Bar(bar))
    if failures:
        print("\nfailed:", *(f"  {run.shell_line}\n    {problem}" for run, problem in failures), sep="\n")
    if signals:
        stop = Stopped(signal.Signals(signals[0]))
        stop.kept_summary = f"{before + num_finished} of {len(runs)} runs are done"
        raise stop
    print(f"{num_finished} done, {before} skipped, {len(failures)} failed")
    print(f"results: in folders like {runs[0].folder}, and a line for each run in {Path('log').resolve()}")
    tool = shlex.quote(str(base() / "tools" / "gather_result.py"))
    for tag in dict.fromkeys(run.settings.get("tag", run.variables["TAG"]) for run in runs):
        print(f"a table: python {tool} --condition \"{{'tag': {tag!r}}}\"")
    return 1 if failures else 0
