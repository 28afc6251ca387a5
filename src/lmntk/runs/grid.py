"""Grids of runs: every combination of several values of run_fewshot.sh's variables and run.py's settings."""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lmntk.errors import FileError, SettingError, UnknownNameError, UsageError, suggest
from lmntk.runs import processes
from lmntk.runs.processes import RunProcess
from lmntk.runs.script_run import share_cores

DEFAULTS = {
    "TASK": "SST-2", "SEED": "13", "K": "16", "MODEL": "roberta-base", "TYPE": "prompt", "TRAINER": "standard",
    "TAG": "", "NUM_GPU": "1", "LOAD_KERNELS_TAG": "",
}  # fmt: skip
"""The variables and their defaults as run_fewshot.sh has them: with these an output folder is known before the run."""

_NOT_IN_FOLDER_NAME = ("NUM_GPU", "LOAD_KERNELS_TAG")
_UNSUITABLE = re.compile(r"[^A-Za-z0-9._=+,-]")

Value = str | bool | None
"""A value of a variable or setting: True is a switch that is on, False one that is off, None leaves it out."""

Grid = dict[str, list[Value]]
"""The values of each variable or setting."""


@dataclass(frozen=True)
class GridRun(RunProcess):
    """One combination.

    Attributes:
        settings: The values of the variables and settings.
        grid_tag: The part of the folder's name that distinguishes this run from the others of the grid.
    """

    settings: Mapping[str, str | bool]
    grid_tag: str

    @property
    def variables(self) -> dict[str, str]:
        """All variables, so that none of the shell's counts."""
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
        """A hash of the variables and settings."""
        return hashlib.sha256(json.dumps([self.variables, sorted(self.flags)]).encode()).hexdigest()

    @property
    def command(self) -> list[str]:
        """The words that start the run."""
        return ["bash", str(processes.RUN_SCRIPT), *self.flags]

    @property
    def shell_line(self) -> str:
        """The line that does the same in a shell."""
        named = self.settings.keys() | os.environ.keys() | ({"GRID_TAG"} if self.grid_tag else set())
        given = [f"{name}={shlex.quote(text)}" for name, text in self.variables.items() if name in named]
        return " ".join([*given, shlex.join(["bash", str(base() / processes.RUN_SCRIPT.name), *self.flags])])

    def environment(self, jobs: int) -> dict[str, str]:
        """Return the environment of the process: several runs at a time share the cores."""
        # The interpreter that runs this has what run.py needs.
        return share_cores(os.environ | self.variables | {"PYTHON": os.environ.get("PYTHON") or sys.executable}, jobs)


def base() -> Path:
    """Return the prefix of paths of the checkout: none if it is the working directory, as in run_fewshot.sh."""
    root = processes.RUN_SCRIPT.parent
    return root if processes.RUN_SCRIPT.is_file() and Path.cwd() != root else Path()


def setting_name(name: str) -> str:
    """Return the name of a variable or setting, if a grid may set it.

    Args:
        name: A variable, or a setting with or without the dashes of its flag.

    Raises:
        SettingError: The grid itself sets it, or it would leave no results.
        UnknownNameError: There is no such variable.

    Examples:
        >>> setting_name("--kernel-formula"), setting_name("TASK")
        ('kernel_formula', 'TASK')
    """
    if name == "GRID_TAG":
        raise SettingError("GRID_TAG is made of the settings that vary: give the grid a TAG", setting=name)
    if name.isupper() and name not in DEFAULTS:
        raise UnknownNameError(suggest(name, DEFAULTS, "variable"), name=name, options=[*DEFAULTS])
    setting = name if name in DEFAULTS else name.removeprefix("--").replace("-", "_")
    if setting and "output_dir".startswith(setting):  # run.py accepts abbreviations
        sentence = f"`{setting}` would send all runs into one folder: TAG is part of the name of each run's folder"
        raise SettingError(sentence, setting=setting)
    if setting.startswith("dr") and "dry_run".startswith(setting):
        sentence = f"`{setting}` leaves no results: `list` prints the runs, and run.py itself estimates what one takes"
        raise SettingError(sentence, setting=setting)
    return setting


def read_grids(path: Path) -> list[Grid]:
    """Read the grids of a JSON file; numbers stay as they are written, since folders are named by them.

    Args:
        path: A file with an object, or with a list of objects.

    Raises:
        FileError: The file is missing, or does not hold grids.
    """
    as_written: dict[str, Any] = dict.fromkeys(("parse_float", "parse_int", "parse_constant"), str)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), **as_written)
        grids = content if isinstance(content, list) else [content]
        if not grids or not all(isinstance(grid, dict) for grid in grids):
            raise ValueError('it must hold an object, {"TASK": …, "setting": …}, or a list of objects')
        return [{setting_name(key): _read_values(key, value) for key, value in grid.items()} for grid in grids]
    except (OSError, ValueError, UsageError) as error:
        raise FileError(f"`grid={path}`: {error}", path=path) from error


def _read_values(key: str, value: Any) -> list[Value]:
    values = value if isinstance(value, list) else [value]
    kinds = (str,) if key in DEFAULTS else (str, bool)
    if not (values and all(item is None or isinstance(item, kinds) for item in values)):
        names = "text, a number" + ("" if key in DEFAULTS else ", true, false") + " or null"
        raise ValueError(f'"{key}" takes {names}, or a list of them with one for each run')
    return values


def expand(grids: Sequence[Grid]) -> list[GridRun]:
    """Return the run of every combination, each once.

    Args:
        grids: The grids; their runs are joined.

    Raises:
        SettingError: Two different runs would have the same folder.

    Examples:
        >>> [run.grid_tag for run in expand([{"TAG": ["lr"], "learning_rate": ["1e-5", "2e-5"]}])]
        ['-learning_rate=1e-5', '-learning_rate=2e-5']
    """
    combinations = (dict(zip(grid, values, strict=True)) for grid in grids for values in product(*grid.values()))
    points = [{name: value for name, value in point.items() if value is not None} for point in combinations]
    names = {name for point in points for name in point if name not in DEFAULTS or name in _NOT_IN_FOLDER_NAME}
    varying = sorted(name for name in names if len({point.get(name) for point in points}) > 1)
    runs: dict[Path, GridRun] = {}
    for point in points:
        parts = [f"-{name}" if point[name] is True else f"-{name}={point[name]}" for name in varying if name in point]
        run = GridRun(point, _UNSUITABLE.sub("_", "".join(parts)))
        other = runs.setdefault(run.folder, run)
        if other.stamp != run.stamp:
            both = f"`{other.shell_line}` and `{run.shell_line}`"
            sentence = f"two runs would share the folder {run.folder}, {both}: give them grids with a TAG each"
            raise SettingError(sentence, setting="TAG", folder=run.folder)
    return list(runs.values())
