"""The runs of a table of behaviour, in their order: first those that need no other, then those that need them."""

import contextlib
import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lmntk.errors import DataError
from lmntk.interrupts import Stopped
from lmntk.runs.behaviour_plan import BehaviourPlan, BehaviourRun, Cell
from lmntk.runs.learning_rate import ChosenRate, choose_rate, dev_score
from lmntk.runs.processes import Progress, run_all


@dataclass(frozen=True)
class CellRuns:
    """The folders of the runs of one cell: its training with snapshots, its kernel, and that with f₀ if it is there."""

    training: Path
    kernel: Path
    with_f0: Path | None


@dataclass
class Finished:
    """What is there after all runs have ended.

    Attributes:
        cells: The runs of each cell that is complete.
        choices: The learning rate of each cell with several.
        problems: What is wrong with each run that failed, or could not start.
        num_done: How many runs this call has done.
    """

    cells: dict[Cell, CellRuns] = field(default_factory=dict)
    choices: dict[Cell, ChosenRate] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    num_done: int = 0


@dataclass(frozen=True)
class Status:
    """How far the runs are.

    Attributes:
        done: The runs that are done.
        todo: The runs that are not.
        waiting: How many further runs wait for the choice of a learning rate.
    """

    done: list[BehaviourRun]
    todo: list[BehaviourRun]
    waiting: list[BehaviourRun]

    @property
    def total(self) -> int:
        """How many runs there are."""
        return len(self.done) + len(self.todo) + len(self.waiting)


def status_of(plan: BehaviourPlan) -> Status:
    """Return how far the runs are; a run that waits has the first learning rate in place of the chosen one."""
    choices = {}
    for cell in filter(plan.searches, plan.cells):
        trainings = _trainings(plan, cell)
        if all(run.is_done() for run in trainings.values()):
            with contextlib.suppress(DataError):  # all have diverged
                choices[cell] = _choose(trainings)
    rates = _rates(plan, choices)
    runs = [*plan.first_runs(), *plan.second_runs(rates)]
    waiting = [plan.snapshots(cell, plan.rates[cell.pair.optimizer][0]) for cell in plan.cells if cell not in rates]
    done = [run for run in runs if run.is_done()]
    return Status(done, [run for run in runs if run not in done], waiting)


def finish_runs(plan: BehaviourPlan, jobs: int, progress: Progress[BehaviourRun]) -> Finished:
    """Do the runs that are not done, some at a time.

    Args:
        plan: The runs.
        jobs: How many run at a time.
        progress: Shows how far they are.

    Raises:
        Stopped: A signal arrived; it says how many runs are done.
    """
    found = Finished()
    _do(plan, [run for run in plan.first_runs() if not run.is_done()], jobs, progress, found)
    for cell in filter(plan.searches, plan.cells):
        try:
            found.choices[cell] = _choose(_trainings(plan, cell))
        except DataError as error:
            found.problems[str(cell)] = str(error)
    second = []
    for run in plan.second_runs(_rates(plan, found.choices)):
        if run.trainer == "kernel" and not plan.kernel(run.cell).is_done():
            found.problems[str(run)] = "the run that computes its kernel has failed"
        elif not run.is_done():
            second.append(run)
    _do(plan, second, jobs, progress, found)
    found.cells = _complete_cells(plan, found.choices)
    return found


def _do(
    plan: BehaviourPlan, runs: list[BehaviourRun], jobs: int, progress: Progress[BehaviourRun], found: Finished
) -> None:
    outcome = run_all(runs, jobs, progress)
    found.num_done += outcome.num_finished
    found.problems |= {str(run): problem for run, problem in outcome.failures}
    if outcome.signals:
        stop = Stopped(signal.Signals(outcome.signals[0]))
        status = status_of(plan)
        stop.kept_summary = f"{len(status.done)} of {status.total} runs are done"
        raise stop


def _trainings(plan: BehaviourPlan, cell: Cell) -> dict[str, BehaviourRun]:
    return {rate: plan.training(cell, rate) for rate in plan.rates[cell.pair.optimizer]}


def _choose(runs: Mapping[str, BehaviourRun]) -> ChosenRate:
    """Choose a learning rate; a training that has failed is worse than any other."""
    return choose_rate({rate: dev_score(run.record) if run.is_done() else math.nan for rate, run in runs.items()})


def _rates(plan: BehaviourPlan, choices: Mapping[Cell, ChosenRate]) -> dict[Cell, str]:
    """The learning rate of each cell that has one: the chosen one, or the only one."""
    only = {cell: plan.rates[cell.pair.optimizer][0] for cell in plan.cells if not plan.searches(cell)}
    return only | {cell: choice.rate for cell, choice in choices.items()}


def _complete_cells(plan: BehaviourPlan, choices: Mapping[Cell, ChosenRate]) -> dict[Cell, CellRuns]:
    found = {}
    for cell, rate in _rates(plan, choices).items():
        kernel, training, with_f0 = plan.kernel(cell), plan.snapshots(cell, rate), plan.with_f0(cell)
        if kernel.is_done() and training.is_done():
            around_f0 = with_f0.folder if with_f0 is not None and with_f0.is_done() else None
            found[cell] = CellRuns(training.folder, kernel.folder, around_f0)
    return {cell: found[cell] for cell in plan.cells if cell in found}
