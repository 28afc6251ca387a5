#!/usr/bin/env python3
"""A grid of runs of run_fewshot.sh, over tasks, seeds, learning rates, formulas and whatever else its flags say.

    python tools/run_grid.py TAG=lr TASK=SST-2,mr SEED=13,42 --learning_rate 1e-5 2e-5 --max_steps 1000
    python tools/run_grid.py --grid formulas.json --jobs 2 TAG=formulas SEED=100,13,21,42,87 --binary_classification

NAME=value,value are variables of run_fewshot.sh; the shell's own count as they do there. Every other --flag goes to
run.py: with several values, one a run; without a value it is a switch, on in every run. A grid in a JSON file is an
object, or a list of them for settings that go together; the command line adds to each, and overrides. There true is
a switch, false is --flag=False, and null leaves the setting out:

    [{"TRAINER": "kernel", "kernel_formula": ["sgd", "signgd"]},
     {"TRAINER": "kernel", "kernel_formula": "asymmetric_signgd", "kernel_solver": "asym", "kernel_gamma": [0.1, 1]}]

The flags that vary make GRID_TAG, so each run has an output folder of its own. There, grid-run.log is what it prints
and grid-stamp, once it has ended well, the hash of its settings: runs whose stamp fits are not started again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lmntk import interrupts

if __name__ == "__main__":
    interrupts.begin()

from tqdm import tqdm

from lmntk.config.legacy_flags import is_flag
from lmntk.config.tool_parser import Parser, exit_status
from lmntk.errors import UsageError, suggest
from lmntk.storage.atomic import write_text

RUN_SCRIPT = Path(__file__).resolve().parents[1] / "run_fewshot.sh"
LOG, STAMP = "grid-run.log", "grid-stamp"
POLL_SECONDS = 0.1

# As run_fewshot.sh has them: the name of an output folder is known before the run only with its defaults.
DEFAULTS = {
    "TASK": "SST-2", "SEED": "13", "K": "16", "MODEL": "roberta-base", "TYPE": "prompt", "TRAINER": "standard",
    "TAG": "", "NUM_GPU": "1", "LOAD_KERNELS_TAG": "",
}  # fmt: skip
NOT_IN_FOLDER_NAME = ("NUM_GPU", "LOAD_KERNELS_TAG")
NO_FOLDER_NAME = re.compile(r"[^A-Za-z0-9._=+,-]")

# What to take for each variable or flag: True is a switch that is on, False one that is off, None something left out.
Value = str | bool | None
Grid = dict[str, list[Value]]


@dataclass(frozen=True)
class Run:
    """One point of the grid: its variables and flags, and the part of its folder's name that tells it from others."""

    settings: Mapping[str, str | bool]
    grid_tag: str

    @property
    def variables(self) -> dict[str, str]:
        """All variables, so that none of the shell's slips in."""
        given = {name: str(self.settings.get(name) or default) for name, default in DEFAULTS.items()}
        return given | {"GRID_TAG": self.grid_tag}

    @property
    def flags(self) -> list[str]:
        """The words for run.py."""
        flags = [(name, value) for name, value in self.settings.items() if name not in DEFAULTS]
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags]

    @property
    def folder(self) -> Path:
        """The output folder, as run_fewshot.sh names it."""
        parts = self.variables | {"MODEL": self.variables["MODEL"].replace("/", "_")}
        return base() / "result" / "{TASK}-{MODEL}-{TYPE}-{TRAINER}-{TAG}{GRID_TAG}/{K}-{SEED}".format_map(parts)

    @property
    def stamp(self) -> str:
        """Hash all that was asked for."""
        return hashlib.sha256(json.dumps([self.variables, sorted(self.flags)]).encode()).hexdigest()

    @property
    def command(self) -> str:
        """The line for a shell that does the same."""
        named = self.settings.keys() | os.environ.keys() | ({"GRID_TAG"} if self.grid_tag else set())
        given = [f"{name}={shlex.quote(text)}" for name, text in self.variables.items() if name in named]
        return " ".join([*given, shlex.join(["bash", str(base() / RUN_SCRIPT.name), *self.flags])])

    def is_done(self) -> bool:
        """Tell whether results of just these settings are there."""
        stamp = self.folder / STAMP
        return stamp.is_file() and stamp.read_bytes() == self.stamp.encode() and self.has_results()

    def has_results(self) -> bool:
        """Tell whether run.py has written metrics."""
        return any(any(self.folder.glob(f"{split}_results_*.txt")) for split in ("eval", "test"))

    def start(self, jobs: int) -> subprocess.Popen[bytes]:
        """Start run_fewshot.sh in a process group of its own: it gets a signal once, from us and not the terminal."""
        python = os.environ.get("PYTHON") or sys.executable  # which has what run.py needs
        environment = os.environ | self.variables | {"PYTHON": python}
        if jobs > 1 and not environment.get("OMP_NUM_THREADS"):
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / STAMP).unlink(missing_ok=True)
        with (self.folder / LOG).open("wb") as log:
            return subprocess.Popen(
                ["bash", str(RUN_SCRIPT), *self.flags], env=environment, process_group=0,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def trouble(self, status: int) -> str | None:
        """Say what is wrong with a run that has ended; None, and a stamp, where nothing is."""
        if status == 0 and self.has_results():
            write_text(self.folder / STAMP, self.stamp)
            return None
        reason = f"status {status}" if status else "ended well, but left no results"
        lines = (self.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((f"\n    {line.strip()[:300]}" for line in reversed(lines) if line.strip()), "")
        return f"{reason}; log: {self.folder / LOG}{last}"


def base() -> Path:
    """Return what paths of the repository begin with: nothing where the caller stands in it, as in run_fewshot.sh."""
    return Path() if Path.cwd() == RUN_SCRIPT.parent else RUN_SCRIPT.parent


def setting_name(name: str) -> str:
    """Return the name of a variable, or of a flag without its dashes, if it is the user's to set."""
    if name == "GRID_TAG":
        raise UsageError("GRID_TAG is made of the flags that vary: give the grid a TAG")
    if name.isupper() and name not in DEFAULTS:
        raise UsageError(suggest(name, DEFAULTS, "variable"))
    flag = name if name in DEFAULTS else name.removeprefix("--").replace("-", "_")
    if flag and "output_dir".startswith(flag):  # run.py takes abbreviations
        raise UsageError(f"--{flag} would send all runs into one folder: TAG is part of the name of each one's own")
    if flag.startswith("dr") and "dry_run".startswith(flag):
        raise UsageError(f"--{flag} leaves no results: --list prints the runs, and run.py itself says what one takes")
    return flag


def read_words(words: Sequence[str]) -> Grid:
    """Read NAME=value,value and --flag value value from the command line."""
    grid: Grid = {}
    flag = None
    for word in words:
        name, equals, text = word.partition("=")
        shouted = name.isidentifier() and (name.isupper() or name.upper() in DEFAULTS)
        if is_flag(word):
            key = setting_name(name)
            grid[key], flag = ([text], None) if equals else ([], key)
        elif equals and (shouted or flag is None):
            if not name.isupper():
                raise UsageError(suggest(name, DEFAULTS, "variable"))
            grid[setting_name(name)], flag = list[Value](text.split(",")), None
            if text and "" in grid[name]:
                raise UsageError(f"{word} has a comma without a value beside it")
        elif flag is None:
            raise UsageError(f"'{word}' belongs to no flag: variables are NAME=value, values follow their --flag")
        else:
            grid[flag].append(word)
    return {name: values or [True] for name, values in grid.items()}


def read_file(path: Path) -> list[Grid]:
    """Read the objects of a JSON file; numbers stay as they are written, for the folders' names."""
    as_written: dict[str, Any] = dict.fromkeys(("parse_float", "parse_int", "parse_constant"), str)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), **as_written)
        grids = content if isinstance(content, list) else [content]
        if not grids or not all(isinstance(grid, dict) for grid in grids):
            raise UsageError('it must hold an object, {"TASK": …, "flag": …}, or a list of objects')
        return [{setting_name(key): _values(key, value) for key, value in grid.items()} for grid in grids]
    except (OSError, ValueError, UsageError) as error:
        raise UsageError(f"--grid {path}: {error}") from error


def _values(key: str, value: Any) -> list[Value]:
    values = value if isinstance(value, list) else [value]
    kinds = (str,) if key in DEFAULTS else (str, bool)
    if not (values and all(item is None or isinstance(item, kinds) for item in values)):
        kinds_named = "text, a number" + ("" if key in DEFAULTS else ", true, false") + " or null"
        raise UsageError(f'"{key}" takes {kinds_named}, or a list of them with one for each run')
    return values


def expand(grids: Sequence[Grid]) -> list[Run]:
    """Make the run of every point, each once, and see that each has a folder."""
    combinations = (dict(zip(grid, values, strict=True)) for grid in grids for values in product(*grid.values()))
    points = [{name: value for name, value in point.items() if value is not None} for point in combinations]
    names = {name for point in points for name in point if name not in DEFAULTS or name in NOT_IN_FOLDER_NAME}
    varying = sorted(name for name in names if len({point.get(name) for point in points}) > 1)
    runs: dict[Path, Run] = {}
    for point in points:
        parts = [f"-{name}" if point[name] is True else f"-{name}={point[name]}" for name in varying if name in point]
        run = Run(point, NO_FOLDER_NAME.sub("_", "".join(parts)))
        other = runs.setdefault(run.folder, run)
        if other.stamp != run.stamp:
            both = f"`{other.command}` and `{run.command}`"
            raise UsageError(f"two runs would share the folder {run.folder}, {both}: give them grids with a TAG each")
    return list(runs.values())


def start_all(todo: Sequence[Run], jobs: int) -> tuple[int, list[tuple[Run, str]], list[int]]:
    """Run what is to do: how many ended well, which failed and why, and the signals that came and were passed on."""
    waiting, running = deque(todo), dict[subprocess.Popen[bytes], Run]()
    finished, failures, signals, passed_on = 0, list[tuple[Run, str]](), list[int](), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: old for number, old in handlers.items() if old not in (None, signal.SIG_IGN)}  # nohup ignores
    for number in handlers:
        signal.signal(number, lambda number, frame: signals.append(number))
    # Runs of one grid differ in length: the mean over all says more than the last few.
    with tqdm(total=len(todo), unit="run", smoothing=0) as bar:
        while running or (waiting and not signals):
            while waiting and len(running) < jobs and not signals:
                run = waiting.popleft()
                try:
                    running[run.start(jobs)] = run
                except OSError as error:
                    failures.append((run, f"cannot start it: {error}"))
                    bar.update()
            new = signals[passed_on:]
            passed_on += len(new)
            for process, sent in product(running, new):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
            for process in [process for process in running if process.poll() is not None]:
                run = running.pop(process)
                try:
                    trouble = run.trouble(process.returncode)
                except (UsageError, OSError) as error:
                    trouble = str(error)
                finished += trouble is None
                if trouble is not None and not signals:
                    failures.append((run, trouble))
                    bar.set_postfix_str(f"{len(failures)} failed", refresh=False)
                bar.update()
            if sys.stderr.isatty():  # the clock goes on
                bar.refresh()
            time.sleep(POLL_SECONDS)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return finished, failures, signals


def read_grid(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Run]]:
    """Read the command line, and the file where one is named."""
    usage = "run_grid.py [--grid FILE.json] [--jobs N] [--list] [NAME=value,value …] [--flag value value …]"
    parser = Parser(usage=usage, description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    parser.add_argument("--grid", type=Path, metavar="FILE.json", help="a grid, or several, in a file")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    arguments, words = parser.parse_known_args(argv)
    if arguments.jobs < 1:
        raise UsageError(f"--jobs {arguments.jobs}: at least one run at a time")
    grids = [grid | read_words(words) for grid in (read_file(arguments.grid) if arguments.grid else [{}])]
    if not any(grids):
        raise UsageError("the grid is empty: give variables (SEED=13,42), flags (--learning_rate 1e-5 2e-5) or --grid")
    shell: Grid = {name: [os.environ[name]] for name in DEFAULTS if os.environ.get(name)}
    return arguments, expand([shell | grid for grid in grids])


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are not done; return the exit status."""
    arguments, runs = read_grid(argv)
    todo = [run for run in runs if not run.is_done()]
    if arguments.list:
        print(*(run.command + ("" if run in todo else "  # done") for run in runs), sep="\n")
        return 0
    before = len(runs) - len(todo)
    print(f"{len(runs)} run{'s' * (len(runs) != 1)}: {before} done already, {len(todo)} to do", flush=True)
    finished, failures, signals = start_all(todo, arguments.jobs)
    if failures:
        print("\nfailed:", *(f"  {run.command}\n    {trouble}" for run, trouble in failures), sep="\n")
    if signals:
        how_far = f"stopped by {signal.Signals(signals[0]).name}: {before + finished} of {len(runs)} runs are done"
        print(f"{how_far}; the same command goes on from there", file=sys.stderr)
        return 128 + signals[0]
    print(f"{finished} done, {before} skipped, {len(failures)} failed")
    print(f"results: in folders like {runs[0].folder}, and a line for each run in {Path('log').resolve()}")
    table = shlex.quote(str(base() / "tools" / "gather_result.py"))
    for tag in dict.fromkeys(run.settings.get("tag", run.variables["TAG"]) for run in runs):
        print(f"a table: python {table} --condition \"{{'tag': {tag!r}}}\"")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
