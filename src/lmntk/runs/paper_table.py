"""The table of the paper's protocol: mean and standard deviation over seeds, beside published numbers where given."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lmntk.data.tasks import TASKS
from lmntk.errors import DataError, FileError, UnknownNameError, suggest
from lmntk.runs.behaviour_plan import Case
from lmntk.runs.learning_rate import ChosenRate, choose_rate, dev_score
from lmntk.runs.log import metric_keys, task_of
from lmntk.runs.paper_plan import TABLES, TITLES, PaperCell, PaperPlan, PaperRun
from lmntk.solvers.candidates import used_settings
from lmntk.storage.tables import format_table

COLUMNS = ("table", "task", "k", "method", "mean", "sd", "seeds")
"""The columns of published numbers; `sd` and `seeds` may be left out."""

PUBLISHED_SEEDS = 5
"""How many seeds a published number is of, where the file does not say."""


@dataclass(frozen=True)
class SeedResult:
    """The run that counts for one cell.

    Attributes:
        cell: The cell.
        score: The main metric on test, in percent.
        dev: That on dev.
        choice: The learning rate, None without training.
        numbers: The numbers of the solver's settings, by name; empty without a kernel.
    """

    cell: PaperCell
    score: float
    dev: float
    choice: ChosenRate | None
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Score:
    """A cell of the table: a mean over seeds, in percent.

    Attributes:
        mean: The mean.
        sd: The standard deviation over seeds, with n − 1 in its denominator; NaN for one seed.
        seeds: How many seeds there are.
    """

    mean: float
    sd: float
    seeds: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Score":
        """Return the mean and standard deviation of some seeds."""
        return cls(mean(scores), stdev(scores) if len(scores) > 1 else math.nan, len(scores))

    def __str__(self) -> str:
        """``87.2 (1.3)``."""
        return f"{self.mean:.1f}" + ("" if math.isnan(self.sd) else f" ({self.sd:.1f})")

    def distance(self, other: "Score") -> float:
        """Return the difference from another mean in standard errors of the difference; NaN if these are not known.

        Examples:
            >>> Score(80.0, 2.0, 4).distance(Score(78.0, 0.0, 4))
            2.0
        """
        error = math.sqrt(self.sd**2 / self.seeds + other.sd**2 / other.seeds)
        return (self.mean - other.mean) / error if error > 0 else math.nan


Key = tuple[str, int, str]
"""Task, K and method."""


def results_of(plan: PaperPlan) -> list[SeedResult]:
    """Return the results of all cells that have a score, the learning rates chosen on dev."""
    found = []
    for cell in plan.cells():
        runs = plan.runs(cell)
        if not all(run.is_done() for run in runs.values()):
            continue
        records = {rate: run.record for rate, run in runs.items()}
        choice = None
        if cell.method.rates:
            try:
                choice = choose_rate({rate: dev_score(record) for rate, record in records.items()})
            except DataError:  # all have diverged
                continue
        record = records["" if choice is None else choice.rate]
        task = task_of(record)
        numbers = {}
        if cell.method.trainer == "kernel":
            solver, settings = str(cell.method.settings.get("kernel_solver", "lstsq")), cell.method.settings
            used = used_settings(solver, f0=bool(settings.get("adjust_for_init")))
            numbers = {name: record[name] for name in used}
        test = record.get(metric_keys(task, task).test or "")
        if not isinstance(test, int | float) or not math.isfinite(test):
            continue
        found.append(SeedResult(cell, _percent(test), _percent(dev_score(record)), choice, numbers))
    return found


def unscored(plan: PaperPlan) -> list[PaperRun]:
    """Return every cell whose runs are done without a score that is a number, as a run without a learning rate."""
    scored = {result.cell for result in results_of(plan)}
    cells = [[*plan.runs(cell).values()] for cell in plan.cells() if cell not in scored]
    return [replace(runs[0], rate="") for runs in cells if all(run.is_done() for run in runs)]


def _percent(fraction: float) -> float:
    return round(100 * fraction, 10)


def scores_of(results: Sequence[SeedResult]) -> dict[Key, Score]:
    """Return the mean over seeds of every task, K and method."""
    by_key: dict[Key, list[float]] = {}
    for result in results:
        cell = result.cell
        by_key.setdefault((cell.case.name, cell.k, cell.method.name), []).append(result.score)
    return {key: Score.of(scores) for key, scores in by_key.items()}


def read_published(path: Path, table: str, cases: Sequence[Case]) -> dict[Key, Score]:
    """Read the user's published numbers: a CSV file with the columns table, task, k, method, mean, sd and seeds.

    Means and standard deviations are in percent. A table that is printed as CSV is such a file.

    Args:
        path: The file.
        table: The table whose rows count.
        cases: The tasks of the table; rows of other known tasks are left out.

    Raises:
        FileError: The file cannot be read, lacks a column, or holds something that is not a number, in the line named.
        UnknownNameError: A table, task or method does not exist.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"`published={path}` cannot be read: {error}", path=path) from error
    missing = [name for name in COLUMNS[:5] if name not in header]
    if missing:
        sentence = f"`published={path}` lacks the column {missing[0]}: it needs {', '.join(COLUMNS[:5])}, and may have "
        raise FileError(sentence + ", ".join(COLUMNS[5:]), path=path)
    own = {case.name.lower(): case.name for case in cases}
    tasks = {task.key: task.name for task in TASKS.values()} | own
    found = {}
    for line, row in enumerate(rows, start=2):
        for name, options, kind in (
            (row["table"], TABLES, "table"),
            (row["task"] and row["task"].lower(), tasks, "task"),
            (row["method"], TITLES, "method"),
        ):
            if name not in options:
                sentence = f"`published={path}`, line {line}: {suggest(name or '', options, kind)}"
                raise UnknownNameError(sentence, name=name, kind=kind, options=[*options])
        try:
            sd = float(row["sd"]) if row.get("sd") else math.nan
            score = Score(float(row["mean"]), sd, int(row.get("seeds") or PUBLISHED_SEEDS))
            key = tasks[row["task"].lower()], int(row["k"]), row["method"]
            if not math.isfinite(score.mean) or score.sd < 0 or score.seeds < 1:
                raise ValueError
            if row.get("sd") and not math.isfinite(sd):
                raise ValueError
        except (TypeError, ValueError) as error:
            sentence = f"`published={path}`, line {line}: k and seeds are whole numbers, mean and sd numbers in percent"
            raise FileError(sentence, path=path, line=line) from error
        if row["table"] == table:
            if key in found:
                raise FileError(
                    f"`published={path}`, line {line}: {', '.join(map(str, key))} is there twice", path=path
                )
            found[key] = score
    return found


def format_scores(plan: PaperPlan, scores: Mapping[Key, Score], published: Mapping[Key, Score], form: str) -> str:
    """Write the table.

    Args:
        plan: Its methods are the rows, its tasks the columns.
        scores: Our numbers.
        published: The numbers to stand beside them.
        form: ``"text"``, ``"markdown"`` or ``"latex"`` for the table, ``"csv"`` or ``"json"`` for a row for each cell.
    """
    if form in ("csv", "json"):
        rows = _records(plan, scores, published)
        return json.dumps(rows, indent=2, allow_nan=False) + "\n" if form == "json" else _as_csv(rows)
    table = []
    for k in plan.ks:
        for method in plan.methods:
            several = {"K": str(k)} if len(plan.ks) > 1 else {}
            keys = {case.name: (case.name, k, method.name) for case in plan.cases}
            ours = {name: _cell(scores[key], len(plan.seeds)) for name, key in keys.items() if key in scores}
            ours = dict.fromkeys(keys, "") | ours
            table.append({"method": TITLES[method.name], **several, **ours})
            theirs = {name: str(published[key]) if key in published else "" for name, key in keys.items()}
            if any(theirs.values()):
                both = {name: key for name, key in keys.items() if key in published and key in scores}
                distances = {name: scores[key].distance(published[key]) for name, key in both.items()}
                table.append({"method": "- published", **theirs})
                apart = {name: "" if math.isnan(value) else f"{value:+.1f}" for name, value in distances.items()}
                table.append({"method": "- difference in standard errors", **apart})
    return format_table(table, form, words=("method",))


def _cell(score: Score, seeds: int) -> str:
    """Write a score, and over how many of the seeds it is a mean if some are missing."""
    return str(score) + ("" if score.seeds == seeds else f" [{score.seeds} of {seeds}]")


def _records(plan: PaperPlan, scores: Mapping[Key, Score], published: Mapping[Key, Score]) -> list[dict[str, Any]]:
    rows = []
    for (task, k, method), score in scores.items():
        row: dict[str, Any] = {"table": plan.table, "task": task, "k": k, "method": method}
        row |= {"mean": score.mean, "sd": _number(score.sd), "seeds": score.seeds, "seeds_asked": len(plan.seeds)}
        if published:
            theirs = published.get((task, k, method))
            row |= {
                "published_mean": theirs and theirs.mean,
                "published_sd": theirs and _number(theirs.sd),
                "difference": theirs and score.mean - theirs.mean,
                "standard_errors": theirs and _number(score.distance(theirs)),
            }
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def choices_table(plan: PaperPlan, results: Sequence[SeedResult]) -> str:
    """Write, as CSV, the scores of every seed and what was chosen on dev for it."""
    rows = [
        {
            "table": plan.table, "task": result.cell.case.name, "k": result.cell.k, "seed": result.cell.seed,
            "method": result.cell.method.name, "test": result.score, "dev": result.dev,
            "learning_rate": "" if result.choice is None else result.choice.rate, **result.numbers,
        }
        for result in results
    ]  # fmt: skip
    return _as_csv(rows)


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, [*columns], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
