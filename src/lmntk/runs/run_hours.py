"""How long runs will take, by those of their kind that are done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Protocol, TypeVar

from lmntk.runs.behaviour_plan import Case
from lmntk.runs.log import LogEntry
from lmntk.storage.tables import format_table
from lmntk.storage.wording import duration, quantity

SAME, OTHER_TASKS, SCALED, UNKNOWN = "measured", "as for other tasks", "scaled with K", "unknown"


class TimedCell(Protocol):
    """What a run is of."""

    @property
    def case(self) -> Case:
        """The task and its splits."""

    @property
    def k(self) -> int:
        """The examples of each class."""


class TimedRun(Protocol):
    """A run whose time can be estimated: `BehaviourRun`, `PaperRun`."""

    @property
    def kind(self) -> str:
        """What the run does; runs of one kind take about as long."""

    @property
    def trainer(self) -> str:
        """TRAINER of run_fewshot.sh."""

    @property
    def cell(self) -> TimedCell:
        """What the run is of."""

    @property
    def record(self) -> LogEntry:
        """The record of a run that is done."""


TimedRunT = TypeVar("TimedRunT", bound=TimedRun)


@dataclass(frozen=True)
class KindEstimate:
    """What the runs of a kind take.

    Attributes:
        kind: What they do.
        done: How many are done.
        todo: How many are not.
        seconds: What those take one after another, as far as something of their kind was measured.
        basis: Where the seconds come from: the least direct way that was necessary for one of them.
    """

    kind: str
    done: int
    todo: int
    seconds: float
    basis: str


def estimate(done: Sequence[TimedRun], todo: Sequence[TimedRun], trials: Sequence[TimedRun] = ()) -> list[KindEstimate]:
    """Estimate the runs that are not done, by kind.

    A run takes as long as those of its kind, task and K; else as those of other tasks; else as those of another K,
    whose time grows with K in the case of a kernel.

    Args:
        done: Runs whose records hold their seconds.
        todo: Those to estimate.
        trials: Further runs that are done, which are not part of the work.
    """
    rows = []
    for kind in dict.fromkeys(run.kind for run in (*done, *todo)):
        measured = [run for run in (*done, *trials) if run.kind == kind]
        found = [_seconds(run, measured) for run in todo if run.kind == kind]
        order = (SAME, OTHER_TASKS, SCALED, UNKNOWN)
        basis = max((basis for _, basis in found), key=order.index, default=SAME)
        rows.append(
            KindEstimate(
                kind, sum(run.kind == kind for run in done), len(found), sum(seconds for seconds, _ in found), basis
            )
        )
    return rows


def _seconds(run: TimedRun, measured: Sequence[TimedRun]) -> tuple[float, str]:
    cell = run.cell
    same_k = [other for other in measured if other.cell.k == cell.k]
    same = [other for other in same_k if other.cell.case == cell.case]
    if same or same_k:
        return _mean(same or same_k), SAME if same else OTHER_TASKS
    if not measured:
        return 0.0, UNKNOWN
    nearest = min((other.cell.k for other in measured), key=lambda k: abs(k - cell.k))
    factor = max(1.0, cell.k / nearest) if run.trainer == "kernel" else 1.0
    return factor * _mean(other for other in measured if other.cell.k == nearest), SCALED


def _mean(runs: Iterable[TimedRun]) -> float:
    return mean(float(run.record.get("seconds", 0.0)) for run in runs)


def format_estimate(rows: Sequence[KindEstimate], jobs: int) -> str:
    """Write a table of kinds, and the time of all that are to do.

    Args:
        rows: The kinds.
        jobs: How many run at a time.
    """
    table = format_table(
        [
            {
                "runs": row.kind, "in all": row.done + row.todo, "to do": row.todo,
                "one takes": duration(row.seconds / row.todo) if row.todo and row.basis != UNKNOWN else "",
                "basis": row.basis if row.todo else "",
            }
            for row in rows
        ],
        words=("runs", "basis"),
    )  # fmt: skip
    unknown = [row for row in rows if row.todo and row.basis == UNKNOWN]
    total = duration(sum(row.seconds for row in rows) / jobs)
    at_a_time = f", {jobs} at a time" if jobs > 1 else ""
    if len(unknown) == len([row for row in rows if row.todo]) and unknown:
        return f"{table}how long they take is not known: no run of their kinds is there"
    more = f", without {quantity(len(unknown), 'kind')} of which no run is there" if unknown else ""
    return f"{table}about {total} in all{at_a_time}{more}"


def unmeasured(done: Sequence[TimedRunT], todo: Sequence[TimedRunT]) -> list[TimedRunT]:
    """Return a run of each kind of which none is done: that with the smallest K.

    Args:
        done: The runs that are done.
        todo: Those that are not, among which they are chosen.
    """
    kinds = {run.kind for run in todo} - {run.kind for run in done}
    return [min((run for run in todo if run.kind == kind), key=lambda run: run.cell.k) for kind in sorted(kinds)]
