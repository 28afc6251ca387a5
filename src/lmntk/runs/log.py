"""The log that runs leave behind: read, searched by condition, and each seed's best trial chosen.

A line is a JSON object, or, in logs of LM-BFF (Gao et al. 2021) and of the kernels published with Malladi et al. 2023,
a Python dictionary as `str` writes it. Text is read and never run, whatever it holds.
"""

import ast
import difflib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmntk.data.tasks import TASKS
from lmntk.errors import UsageError

logger = logging.getLogger(__name__)

Run = dict[str, Any]
"""One line of the log: flags and metrics by name."""

_BY_KEY = {task.key: task for task in TASKS.values()}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_REPR = re.compile(rf"{_QUOTED}|<(?P<inside>(?:{_QUOTED}|[^<>'\"])*)>")
_EXAMPLE = "\"{'tag': 'x', 'task_name': 'sst-2'}\""


def read_log(path: str | Path) -> list[Run]:
    """Read the runs of a log in its order; lines that cannot be read are skipped with one warning.

    Args:
        path: The file, JSON objects and older dictionaries in any mixture.

    Returns:
        One dictionary a line.

    Raises:
        UsageError: The file is missing, a folder, or holds no readable line.
    """
    try:
        # A process killed within a character must not take the other lines along.
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        where = "run.py appends to a file log in its working directory"
        raise UsageError(f"--log {path} cannot be read ({error.strerror}): {where}") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    read = {number: _read_line(line) for number, line in lines.items()}
    runs = [run for run in read.values() if run is not None]
    if not runs:
        raise UsageError(f"--log {path} holds no line that can be read as a run: give the log that run.py appends to")
    if len(runs) < len(read):
        first = next(number for number, run in read.items() if run is None)
        skipped = "%s: skipped %d of %d lines that cannot be read (the first is line %d)"
        logger.warning(skipped, path, len(read) - len(runs), len(read), first)
    return runs


def parse_condition(text: str) -> dict[str, Any]:
    """Read what ``--condition`` says.

    Args:
        text: A Python dictionary of literals.

    Returns:
        The dictionary; a ``task_name`` in it has become a list of lower-case names.

    Raises:
        UsageError: It is no such dictionary, or asks for a metric that a task has not.
    """
    try:
        condition = ast.literal_eval(text.strip())
    # What literal_eval raises for damaged or hostile text, by its documentation.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        condition = None
    if not isinstance(condition, dict) or not all(isinstance(key, str) for key in condition):
        raise UsageError(f"--condition {text} is no Python dictionary of plain values: write it like {_EXAMPLE}")
    if "task_name" in condition:
        names = _as_options(condition["task_name"])
        if not names or not all(isinstance(name, str) for name in names):
            raise UsageError(f"--condition: 'task_name' is a name or a list of names, as in {_EXAMPLE}")
        condition["task_name"] = list(dict.fromkeys(name.lower() for name in names))
        for name in condition["task_name"]:
            _metric_names(name)
    return condition


def select(runs: Sequence[Run], condition: dict[str, Any]) -> dict[str, list[Run]]:
    """Find the runs that meet a condition.

    Args:
        runs: From `read_log`.
        condition: From `parse_condition`. A list means any of its values; a run without the key does not match.
            Runs of mnli are runs of mnli-mm too: older ones were tested on both.

    Returns:
        The matching runs of each task asked for, or of each task there is when none was, in the log's order.

    Raises:
        UsageError: Nothing matches; says which condition leaves nothing.
    """
    matching = [run for run in runs if all(_meets(run, key, wanted) for key, wanted in condition.items())]
    if not matching:
        raise UsageError(_why_nothing(runs, condition))
    if "task_name" in condition:
        return {name: [run for run in matching if _meets(run, "task_name", [name])] for name in condition["task_name"]}
    found: dict[str, list[Run]] = {}
    for run in matching:
        found.setdefault(task_of(run), []).append(run)
    return found


def task_of(run: Run) -> str:
    """Return the lower-case name of a run's task, as its metrics have it."""
    return str(run.get("task_name", "")).lower()


def data_seed(run: Run) -> str:
    """Return the seed of a run's k-shot split: what follows the last dash of its folder, ``"42"`` of ``.../16-42/``."""
    return str(run.get("data_dir", "")).rstrip("/").rpartition("/")[2].rpartition("-")[2]


class Keys(NamedTuple):
    """Under which names a run has the metric to choose by, the one to tell, and a second one to tell, where it has."""

    dev: str
    test: str
    second: str | None = None


def keys_of(asked: str, task: str) -> Keys:
    """Say where the metrics of a task are.

    Args:
        asked: A lower-case task name, or one with a metric, ``"mrpc/acc"``.
        task: The run's own task, which differs for mnli-mm asked of a run of mnli.

    Raises:
        UsageError: The task has no such metric.
    """
    base, names = asked.partition("/")[0], _metric_names(asked)
    prefix = {key: _BY_KEY[key].metric_prefix if key in _BY_KEY else "" for key in (base, task)}
    tests = [f"{base}_test_eval_{prefix[base]}{name}" for name in names]
    return Keys(f"{task}_dev_eval_{prefix[task]}{names[0]}", *tests)


@dataclass(frozen=True)
class Trial:
    """A run with its metrics as fractions; NaN where the run had no number, and for a `second` that it lacks."""

    run: Run
    dev: float
    test: float
    second: float | None


def trials_of(runs: Iterable[Run], asked: str, given: Sequence[str | None] = (None, None, None)) -> list[Trial]:
    """Take the metrics from those runs that have them.

    Args:
        runs: Of one task, from `select`.
        asked: The task as asked for, see `keys_of`.
        given: Keys for dev, test and second metric that replace the task's, None for those that do not.

    Returns:
        The trials in the runs' order; runs that lack the dev or test metric are not among them.
    """
    trials = []
    for run in runs:
        usual = keys_of(asked, task_of(run))
        keys = Keys(given[0] or usual.dev, given[1] or usual.test, given[2] or usual.second)
        dev, test = _number(run, keys.dev), _number(run, keys.test)
        if dev is not None and test is not None:
            second = _number(run, keys.second) if keys.second else None
            trials.append(Trial(run, dev, test, math.nan if keys.second and second is None else second))
    return trials


class Best(NamedTuple):
    """The best of several trials, how many there were, and how many more repeated an output folder."""

    trial: Trial
    trials: int
    ignored: int


def best_trial(trials: Sequence[Trial]) -> Best:
    """Choose the trial with the best dev metric, the first by output folder among equals.

    Args:
        trials: At least one, in the log's order: of those with one output folder the latest counts, as it is the one
            whose files are there. A dev metric that is no number is worse than any.
    """
    latest = {str(trial.run.get("output_dir", number)): trial for number, trial in enumerate(trials)}
    ordered = sorted(latest.values(), key=lambda trial: str(trial.run.get("output_dir", "")))
    best = max(ordered, key=lambda trial: -math.inf if math.isnan(trial.dev) else trial.dev)
    return Best(best, len(latest), len(trials) - len(latest))


def _metric_names(asked: str) -> tuple[str, ...]:
    """The metric that a task is judged by and the other one; accuracy for a task that is in no row."""
    base, _, chosen = asked.partition("/")
    names = _BY_KEY[base].main_metrics if base in _BY_KEY else ("acc",)
    if chosen and chosen not in names:
        raise UsageError(f"--condition: '{asked}' asks for a metric by which {base} is not judged: {', '.join(names)}")
    return (chosen, *(name for name in names if name != chosen)) if chosen else names


def _number(run: Run, key: str) -> float | None:
    """A metric, NaN where the run noted that there was no number, None where it noted nothing."""
    value = run.get(key, "")
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_options(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]


def _meets(run: Run, key: str, wanted: Any) -> bool:
    if key != "task_name":
        return key in run and run[key] in _as_options(wanted)
    bases, task = {name.partition("/")[0] for name in wanted}, task_of(run)
    return task in bases or (task == "mnli" and "mnli-mm" in bases)


def _why_nothing(runs: Sequence[Run], condition: dict[str, Any]) -> str:
    read = f"{len(runs)} line{'' if len(runs) == 1 else 's'} read"
    counts = {key: sum(_meets(run, key, wanted) for run in runs) for key, wanted in condition.items()}
    for key, wanted in condition.items():
        if counts[key]:
            continue
        there = sorted({task_of(run) if key == "task_name" else str(run[key]) for run in runs if key in run})
        if not there:
            close = difflib.get_close_matches(key, {name for run in runs for name in run}, n=1)
            return f"no run has a setting '{key}' ({read})" + (f": did you mean '{close[0]}'?" if close else "")
        more = ", ..." if len(there) > 12 else ""
        return f"no run has {_shown(key, wanted)} ({read}); {key}s there: {', '.join(there[:12])}{more}"
    met = ", ".join(f"{_shown(key, wanted)} by {counts[key]}" for key, wanted in condition.items())
    return f"no run meets all of --condition at once ({read}); alone they are met: {met}"


def _shown(key: str, wanted: Any) -> str:
    return f"{key} {' or '.join(map(repr, _as_options(wanted))) or '[]'}"


def _read_line(line: str) -> Run | None:
    """Read one line as JSON or as an older program's dictionary; None where it is neither."""
    try:
        run = json.loads(line)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                run = _value(ast.parse(_REPR.sub(_as_literal, line), mode="eval").body)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return None
    return run if isinstance(run, dict) and all(isinstance(key, str) for key in run) else None


def _as_literal(match: re.Match[str]) -> str:
    """Turn ``<A.B: 'x'>``, the form of an enumeration's member, into ``'x'``, what else is in ``<>`` into text."""
    if match["inside"] is None:
        return match[0]
    member = re.fullmatch(rf"[\w.]+: ({_QUOTED}|-?[\d.]+)", match["inside"])
    return member[1] if member else repr(match[0])


def _value(node: ast.expr) -> Any:
    """Turn a syntax tree into plain values; what is no literal becomes its text."""
    match node:
        case ast.Constant(value=value) if value is None or isinstance(value, bool | int | float | str):
            return value
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
            return [_value(element) for element in elements]
        case ast.Name(id="inf" | "nan" as name) | ast.Attribute(value=ast.Name(), attr="inf" | "nan" as name):
            return float(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(number := _value(operand), int | float):
            return -number
        case ast.Call(func=ast.Name() | ast.Attribute(value=ast.Name()), args=[argument], keywords=[]):
            if isinstance(argument, ast.Constant | ast.List | ast.UnaryOp) or ast.unparse(argument) in ("inf", "nan"):
                value, is_float = _value(argument), ast.unparse(node.func) == "float"
                return float(value) if is_float and isinstance(value, str) else value
    return ast.unparse(node)
