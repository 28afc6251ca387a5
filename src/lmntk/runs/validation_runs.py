"""The trainings of a validation in their order: first those that choose the learning rate, then those on subsets."""

import contextlib
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from lmntk.errors import DataError
from lmntk.interrupts import Stopped
from lmntk.runs.learning_rate import ChosenRate, choose_rate, dev_score
from lmntk.runs.processes import Progress, run_all
from lmntk.runs.validation_plan import SubsetRun, ValidationPlan


@dataclass(frozen=True)
class Status:
    """How far the trainings are.

    Attributes:
        done: Those that are done.
        todo: Those that are not; until a learning rate is chosen, subsets have the first.
    """

    done: list[SubsetRun]
    todo: list[SubsetRun]


@dataclass
class Finished:
    """What is there after all trainings have ended.

    Attributes:
        choice: The learning rate; None if all trainings that choose it have failed.
        runs: The trainings of each subset whose trainings are all done, by its number.
        problems: What is wrong with each training that failed.
    """

    choice: ChosenRate | None = None
    runs: dict[int, list[SubsetRun]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def status_of(plan: ValidationPlan) -> Status:
    """Return how far the trainings are."""
    rate = plan.rates[0]
    if all(run.is_done() for run in plan.choosing_runs.values()):
        with contextlib.suppress(DataError):  # all have diverged
            rate = _choose(plan).rate
    runs = [*plan.choosing_runs.values(), *(run for runs in plan.subset_runs(rate) for run in runs)]
    done = [run for run in runs if run.is_done()]
    return Status(done, [run for run in runs if run not in done])


def finish_runs(plan: ValidationPlan, jobs: int, progress: Progress[SubsetRun]) -> Finished:
    """Do the trainings that are not done, some at a time.

    Args:
        plan: The trainings.
        jobs: How many run at a time.
        progress: Shows how far they are.

    Raises:
        Stopped: A signal arrived; it says how many trainings are done.
    """
    found = Finished()
    _do(plan, [*plan.choosing_runs.values()], jobs, progress, found)
    try:
        found.choice = _choose(plan)
    except DataError as error:
        found.problems["the learning rate"] = str(error)
        return found
    subsets = plan.subset_runs(found.choice.rate)
    _do(plan, [run for runs in subsets for run in runs], jobs, progress, found)
    found.runs = {index: runs for index, runs in enumerate(subsets) if all(run.is_done() for run in runs)}
    return found


def _do(
    plan: ValidationPlan, runs: Sequence[SubsetRun], jobs: int, progress: Progress[SubsetRun], found: Finished
) -> None:
    outcome = run_all([run for run in runs if not run.is_done()], jobs, progress)
    found.problems |= {str(run): problem for run, problem in outcome.failures}
    if outcome.signals:
        stop = Stopped(signal.Signals(outcome.signals[0]))
        status = status_of(plan)
        stop.kept_summary = f"{len(status.done)} of {len(status.done) + len(status.todo)} trainings are done"
        raise stop


def _choose(plan: ValidationPlan) -> ChosenRate:
    """Choose the learning rate; a training that has failed is worse than any other."""
    if not plan.searches:
        return ChosenRate(plan.rates[0], math.nan, (), {plan.rates[0]: math.nan})
    return choose_rate(
        {rate: dev_score(run.record) if run.is_done() else math.nan for rate, run in plan.choosing_runs.items()}
    )
