"""The log of many runs: read it, select entries by a condition, and choose the best trial of each seed.

A line is a JSON object or, in logs of LM-BFF (Gao et al. 2021) and of the program published with Malladi et al. 2023, a
Python dictionary as `str` writes it. Lines are parsed and never executed.

Entries stay dictionaries. A DataFrame would merge three states that count differently here: a key that is missing, a
metric that was not a number (null), and a number.
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
from lmntk.errors import DataError, FileError, SettingError

logger = logging.getLogger(__name__)

LogEntry = dict[str, Any]
"""One line of the log: a run's arguments and metrics by name."""

_BY_KEY = {task.key: task for task in TASKS.values()}
_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_REPR = re.compile(rf"{_QUOTED}|<(?P<inside>(?:{_QUOTED}|[^<>'\"])*)>")
_EXAMPLE = "\"{'tag': 'x', 'task_name': 'sst-2'}\""


def read_log(path: str | Path) -> list[LogEntry]:
    """Read the entries of a log. One warning counts the lines that cannot be read, which are skipped.

    Args:
        path: The file; JSON objects and older dictionaries may be mixed.

    Returns:
        One dictionary per line, in the order of the file.

    Raises:
        FileError: The file is missing, is a folder, or holds no readable line.
    """
    try:
        # A character that a killed process left incomplete must not make the other lines unreadable.
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        where = "run.py appends to a file log in its working directory"
        raise FileError(f"`log={path}` cannot be read ({error.strerror}): {where}", path=path) from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    read = {number: _read_line(line) for number, line in lines.items()}
    entries = [entry for entry in read.values() if entry is not None]
    if not entries:
        remedy = "give the log that run.py appends to"
        raise FileError(f"`log={path}` holds no line that can be read as a run: {remedy}", path=path)
    if len(entries) < len(read):
        first = next(number for number, entry in read.items() if entry is None)
        skipped = "%s: skipped %d of %d lines that cannot be read (the first is line %d)"
        logger.warning(skipped, path, len(read) - len(entries), len(read), first)
    return entries


def parse_condition(text: str) -> dict[str, Any]:
    """Read the condition that selects entries of the log.

    Args:
        text: A Python dictionary of literals.

    Returns:
        The dictionary; its ``task_name``, if it has one, is a list of lower-case names.

    Raises:
        SettingError: The text is not such a dictionary, or asks for a metric that its task does not have.

    Examples:
        >>> parse_condition("{'tag': 'lr', 'task_name': 'MRPC/f1', 'seed': [13, 42]}")
        {'tag': 'lr', 'task_name': ['mrpc/f1'], 'seed': [13, 42]}
    """
    try:
        condition = ast.literal_eval(text.strip())
    # The documentation of literal_eval lists these errors for damaged or hostile text.
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        condition = None
    if not isinstance(condition, dict) or not all(isinstance(key, str) for key in condition):
        sentence = f"`condition={text}` is not a Python dictionary of plain values: write it like {_EXAMPLE}"
        raise SettingError(sentence, setting="condition", value=text)
    if "task_name" in condition:
        names = _as_options(condition["task_name"])
        if not names or not all(isinstance(name, str) for name in names):
            sentence = f"'task_name' in `condition` must be a name or a list of names, as in {_EXAMPLE}"
            raise SettingError(sentence, setting="condition", value=text)
        condition["task_name"] = list(dict.fromkeys(name.lower() for name in names))
        for name in condition["task_name"]:
            _metric_names(name)
    return condition


def select(entries: Sequence[LogEntry], condition: dict[str, Any]) -> dict[str, list[LogEntry]]:
    """Select the entries that meet a condition.

    Args:
        entries: The entries that `read_log` returned.
        condition: The condition that `parse_condition` returned. A list stands for any of its values; an entry
            without the key does not match. Entries of mnli match mnli-mm too: older runs tested on both.

    Returns:
        The matching entries, in the log's order, for each task that the condition names; for each task that occurs if
        it names none.

    Raises:
        DataError: Nothing matches; data: ``condition``, and the ``key`` that no entry meets.

    Examples:
        >>> entries = [{"task_name": "SST-2", "seed": 13}, {"task_name": "mr", "seed": 42}]
        >>> select(entries, {"seed": [13, 21]})
        {'sst-2': [{'task_name': 'SST-2', 'seed': 13}]}
    """
    matching = [entry for entry in entries if all(_meets(entry, key, wanted) for key, wanted in condition.items())]
    if not matching:
        raise _nothing_matches(entries, condition)
    if "task_name" in condition:
        names = condition["task_name"]
        return {name: [entry for entry in matching if _meets(entry, "task_name", [name])] for name in names}
    found: dict[str, list[LogEntry]] = {}
    for entry in matching:
        found.setdefault(task_of(entry), []).append(entry)
    return found


def task_of(entry: LogEntry) -> str:
    """Return the lower-case name of a run's task, with which the names of its metrics begin."""
    return str(entry.get("task_name", "")).lower()


def split_folder(entry: LogEntry) -> tuple[str, str]:
    """Return K and the data seed of a run: what precedes and follows the last dash of its data folder's name.

    Examples:
        >>> split_folder({"data_dir": "data/k-shot-1k-test/SST-2/16-42/"})
        ('16', '42')
    """
    k, _, seed = str(entry.get("data_dir", "")).rstrip("/").rpartition("/")[2].rpartition("-")
    return k, seed


def data_seed(entry: LogEntry) -> str:
    """Return the seed of a run's k-shot split, ``"42"`` of ``.../16-42/``."""
    return split_folder(entry)[1]


class MetricKeys(NamedTuple):
    """The keys of the metrics to choose a trial by, to report, and to report beside it; None stands for the task's."""

    dev: str | None = None
    test: str | None = None
    second: str | None = None


TASK_METRICS = MetricKeys()
"""The request for a task's own metrics."""


def metric_keys(asked: str, task: str) -> MetricKeys:
    """Return the keys of a task's metrics.

    Args:
        asked: A lower-case task name, with or without a metric: ``"mrpc/acc"``.
        task: The run's own task; it differs from the name if mnli-mm is asked of a run of mnli.

    Returns:
        The keys; `second` is None if the task has one metric.

    Raises:
        SettingError: The task does not have the metric.

    Examples:
        >>> metric_keys("mrpc/acc", "mrpc").second
        'mrpc_test_eval_f1'
    """
    base, names = asked.partition("/")[0], _metric_names(asked)
    prefix = {key: _BY_KEY[key].metric_prefix if key in _BY_KEY else "" for key in (base, task)}
    tests = [f"{base}_test_eval_{prefix[base]}{name}" for name in names]
    return MetricKeys(f"{task}_dev_eval_{prefix[task]}{names[0]}", *tests)


@dataclass(frozen=True)
class Trial:
    """An entry of the log with its metrics as fractions, NaN where the run noted that there was no number.

    Attributes:
        entry: The line of the log.
        dev: The metric by which trials are chosen.
        test: The metric that is reported.
        second: The second test metric, NaN also if the entry lacks it; None if the task has no second metric.
    """

    entry: LogEntry
    dev: float
    test: float
    second: float | None


def find_trials(entries: Iterable[LogEntry], asked: str, keys: MetricKeys = TASK_METRICS) -> list[Trial]:
    """Return a trial for each entry that has a dev and a test metric.

    Args:
        entries: The entries of one task, from `select`.
        asked: The task as the condition names it, see `metric_keys`.
        keys: The keys that replace the task's own.

    Returns:
        The trials in the order of the entries.
    """
    trials = []
    for entry in entries:
        usual = metric_keys(asked, task_of(entry))
        dev_key, test_key, second_key = (given or key for given, key in zip(keys, usual, strict=True))
        dev, test = _number(entry, dev_key), _number(entry, test_key)
        if dev is not None and test is not None:
            second = _number(entry, second_key) if second_key else None
            trials.append(Trial(entry, dev, test, math.nan if second_key and second is None else second))
    return trials


class BestTrial(NamedTuple):
    """The best of several trials.

    Attributes:
        trial: The trial.
        num_trials: How many trials there were, one for each output folder.
        num_repeats: How many further entries had the output folder of a later one.
    """

    trial: Trial
    num_trials: int
    num_repeats: int


def best_trial(trials: Sequence[Trial]) -> BestTrial:
    """Choose the trial with the best dev metric; among equals the first by the name of its output folder.

    Args:
        trials: At least one trial, in the log's order. Of trials with one output folder only the latest counts: the
            files there are its own. A dev metric of NaN is worse than any number.
    """
    latest = {str(trial.entry.get("output_dir", number)): trial for number, trial in enumerate(trials)}
    ordered = sorted(latest.values(), key=lambda trial: str(trial.entry.get("output_dir", "")))
    best = max(ordered, key=lambda trial: -math.inf if math.isnan(trial.dev) else trial.dev)
    return BestTrial(best, len(latest), len(trials) - len(latest))


def _metric_names(asked: str) -> tuple[str, ...]:
    """The main metric of a task and the other one, if it has two; accuracy for a task that has no row."""
    base, _, chosen = asked.partition("/")
    names = _BY_KEY[base].main_metrics if base in _BY_KEY else ("acc",)
    if chosen and chosen not in names:
        sentence = f"'{asked}' in `condition` asks for a metric that {base} does not have: it has {', '.join(names)}"
        raise SettingError(sentence, setting="condition", value=asked)
    return (chosen, *(name for name in names if name != chosen)) if chosen else names


def _number(entry: LogEntry, key: str | None) -> float | None:
    """A metric; NaN if the run noted that it was not a number, None if it noted nothing."""
    value = entry.get(key, "") if key else ""
    if value is None:
        return math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_options(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple | set) else [wanted]


def _meets(entry: LogEntry, key: str, wanted: Any) -> bool:
    if key != "task_name":
        return key in entry and entry[key] in _as_options(wanted)
    bases, task = {name.partition("/")[0] for name in wanted}, task_of(entry)
    return task in bases or (task == "mnli" and "mnli-mm" in bases)


def _nothing_matches(entries: Sequence[LogEntry], condition: dict[str, Any]) -> DataError:
    """Say which part of the condition leaves nothing."""
    lines = f"{len(entries)} line{'' if len(entries) == 1 else 's'} read"
    counts = {key: sum(_meets(entry, key, wanted) for entry in entries) for key, wanted in condition.items()}
    for key, wanted in condition.items():
        if counts[key]:
            continue
        found = sorted({task_of(entry) if key == "task_name" else str(entry[key]) for entry in entries if key in entry})
        if not found:
            close = difflib.get_close_matches(key, {name for entry in entries for name in entry}, n=1)
            hint = f": did you mean '{close[0]}'?" if close else ""
            return DataError(f"no run has a setting '{key}' ({lines}){hint}", condition=condition, key=key)
        more = ", ..." if len(found) > 12 else ""
        sentence = f"no run has {_option_text(key, wanted)} ({lines}); the log has {', '.join(found[:12])}{more}"
        return DataError(sentence, condition=condition, key=key)
    alone = ", ".join(f"{_option_text(key, wanted)} by {counts[key]}" for key, wanted in condition.items())
    sentence = f"no run meets all of `condition` at once ({lines}); its parts alone are met: {alone}"
    return DataError(sentence, condition=condition, key=None)


def _option_text(key: str, wanted: Any) -> str:
    return f"{key} {' or '.join(map(repr, _as_options(wanted))) or '[]'}"


def _read_line(line: str) -> LogEntry | None:
    """Read one line as JSON or as an older program's dictionary; None if it is neither."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                entry = _value(ast.parse(_REPR.sub(_as_literal, line), mode="eval").body)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            return None
    return entry if isinstance(entry, dict) and all(isinstance(key, str) for key in entry) else None


def _as_literal(match: re.Match[str]) -> str:
    """Replace ``<A.B: 'x'>``, a member of an enumeration, by ``'x'``, and any other ``<…>`` by its text in quotes."""
    if match["inside"] is None:
        return match[0]
    member = re.fullmatch(rf"[\w.]+: ({_QUOTED}|-?[\d.]+)", match["inside"])
    return member[1] if member else repr(match[0])


def _value(node: ast.expr) -> Any:
    """Turn a syntax tree into plain values; a part that is not a literal becomes its text."""
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
