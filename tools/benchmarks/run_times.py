"""How long an engine takes for the kernels of a run, measured on all tiles or on some."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from benchmarks.inputs import Job
from lmntk.kernels import ESTIMATES, Engine, KernelProblem, make_engine
from lmntk.kernels.tiling import Plan, Tile
from lmntk.kernels.timing import clock

T = TypeVar("T")


@dataclass(frozen=True)
class RunTimes:
    """How long kernels take.

    Attributes:
        seconds: By the clock.
        cpu_seconds: What the processor spent on them; None where that was not measured.
        by_stage: The seconds of the engine's stages in the tiles that were computed, not scaled up.
    """

    seconds: float
    cpu_seconds: float | None
    by_stage: dict[str, float]


def time_run(job: Job, engine: str, problem: KernelProblem) -> RunTimes:
    """Time the kernel of train × X, and before it that of train × train if the job has it, as a run computes them.

    The second engine takes over what the first one still holds of the train examples. An exact engine is timed on
    `job.sample_tiles` tiles of either kernel, an estimate always on all of them.
    """
    found: list[RunTimes] = []
    earlier: Engine | None = None
    for sides in (replace(problem, x=None), problem)[0 if job.train_kernel else 1 :]:
        made = make_engine(sides, engine, job.budget, earlier=earlier)
        seconds = seconds_of_kernel(made, 0 if engine in ESTIMATES else job.sample_tiles, earlier is not None)
        found.append(RunTimes(*seconds, dict(made.timer.seconds)))
        earlier = made
    stages = {name for times in found for name in times.by_stage}
    return RunTimes(
        sum(times.seconds for times in found),
        sum(times.cpu_seconds or 0.0 for times in found),
        {name: sum(times.by_stage.get(name, 0.0) for times in found) for name in sorted(stages)},
    )


def seconds_of_kernel(engine: Engine, sample_tiles: int, train_known: bool = False) -> tuple[float, float]:
    """Time a whole kernel, or some of its tiles and scale up by the engine's own model of costs.

    Args:
        engine: The engine.
        sample_tiles: How many tiles to time; 0 for all.
        train_known: Whether an earlier engine has left the factors of the only train tile, if there is but one.

    Returns:
        The seconds by the clock, and those that the processor spent on them.
    """
    plan = engine.plan()
    if not sample_tiles or sample_tiles >= len(list(plan)):
        sampled, scale = plan, 1.0
    else:
        sampled, cost = sample_plan(plan, sample_tiles), engine.estimate_cost(plan)
        if train_known and len(plan.tile_rows) == 1:
            scale = sum(map(cost.tile, plan)) / sum(map(cost.tile, sampled))
        else:
            scale = plan.seconds(cost) / sampled.seconds(cost)
    engine.timer.seconds.clear()
    start, cpu_start = now(engine), time.process_time()
    for _ in engine.blocks(sampled):
        pass
    return scale * (now(engine) - start), scale * (time.process_time() - cpu_start)


def now(engine: Engine) -> float:
    """Return the seconds of a clock, after the engine's device has finished its work."""
    return clock(next(iter(engine.problem.params.values())).device)


def sample_plan(plan: Plan, tiles: int) -> Plan:
    """Return some tiles of `plan`, evenly spaced in its order, which is by length: one tile is of middle length.

    They are tiles of as few train tiles as possible, whose examples are propagated once.
    """
    rows = -(-tiles // max(len(row.x_tiles) for row in plan.tile_rows))
    chosen = []
    for row in _evenly_spaced(plan.tile_rows, rows):
        chosen += [Tile(row.train, x) for x in _evenly_spaced(row.x_tiles, min(tiles - len(chosen), -(-tiles // rows)))]
    return plan.restricted_to(set(chosen))


def _evenly_spaced(items: Sequence[T], number: int) -> list[T]:
    """Return the middles of so many equal parts of `items`."""
    return [items[(2 * part + 1) * len(items) // (2 * number)] for part in range(min(number, len(items)))]
