"""Seconds, memory and error of one engine on one job."""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from numpy import ndarray
from transformers.pytorch_utils import Conv1D

from benchmarks.inputs import Inputs, Job, load_inputs, load_model, make_problem, true_kernel
from lmntk.errors import UsageError
from lmntk.kernels import ENGINES, Engine, KernelProblem, MemoryBudget, TileRequest, assemble
from lmntk.kernels.memory import peak_bytes, retain_freed_memory
from lmntk.kernels.tiling import Plan, Tile, TileRow
from lmntk.kernels.timing import clock, product_flops
from lmntk.models.prompt_model import PromptModel

T = TypeVar("T")

PUBLISHED = "published"
# Other libraries that make the gradients, where they are installed.
PEERS = ["opacus"] if find_spec("opacus") else []
SAMPLED_PAIRS = 8
ERROR_EXAMPLES = {PUBLISHED: 2, "jvp": 2}  # on either side, by engine: these two take a second a pair
MOST_ERROR_EXAMPLES = 8


def make_engine(job: Job, engine: str, problem: KernelProblem) -> Engine:
    """Return an engine with the job's budget; the yardstick has no choice of tiles, and takes the memory it needs."""
    if engine in (PUBLISHED, "jvp"):
        return ENGINES["jvp"](problem, MemoryBudget(2**60))
    if engine in PEERS:
        from benchmarks.peers import OpacusEngine

        return OpacusEngine(problem, job.budget)
    return ENGINES[engine](problem, job.budget)


def measure(job: Job, engine: str, truth: ndarray | None) -> tuple[dict[str, Any], ndarray | None]:
    """Measure one engine, in a process that does nothing else.

    Args:
        job: The model, examples and formula.
        engine: A key of `ENGINES`, one of `PEERS`, or `PUBLISHED`.
        truth: The result of `true_kernel`, if it is known already.

    Returns:
        A row of the table, and `truth`.
    """
    torch.set_num_threads(job.threads)
    inputs = load_inputs(job)
    model = load_model(job, inputs, torch.float32)
    problem = make_problem(job, model, inputs, published=engine == PUBLISHED)
    pairs = job.train_examples * job.x_examples
    before = peak_bytes(job.torch_device)
    cpu_seconds = None
    made = make_engine(job, engine, problem)
    if engine in (PUBLISHED, "jvp"):
        seconds = pairs * seconds_per_sampled_pair(made)
    elif engine == "jacobian" or engine in PEERS:
        seconds = seconds_of_sampled_jacobians(made)
    else:
        with retain_freed_memory():  # as run.py does; the published program does not
            seconds, cpu_seconds = seconds_of_kernel(made, job.sample_tiles)
    peak = peak_bytes(job.torch_device)
    rate = product_flops(job.torch_device, torch.float32)
    row = {
        "engine": engine,
        "formula": job.formula,
        "model": job.model,
        "n_train": job.train_examples,
        "n_x": job.x_examples,
        "logits": problem.num_logits,
        "threads": job.threads,
        "slices": len(problem.slices),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_per_pair": seconds / pairs,
        "peak_memory_gb": peak / 2**30,
        "model_memory_gb": before / 2**30,
        "matmul_gflops": rate / 1e9,
        "roofline_fraction": dense_flops(model, problem) / seconds / rate,
        "seconds_by_stage": {name: round(value, 3) for name, value in made.timer.seconds.items()},
    }
    if job.times_only:
        return row | {"relative_error": None}, truth
    if truth is None:
        truth = true_kernel(job, inputs.first(MOST_ERROR_EXAMPLES)).numpy()
    return row | {"relative_error": relative_error(job, engine, model, inputs, truth)}, truth


def seconds_of_kernel(engine: Engine, sample_tiles: int) -> tuple[float, float]:
    """Time a whole kernel, or some of its tiles and scale up by the engine's own model of costs.

    Returns:
        The seconds by the clock, and those that the processor spent on them.
    """
    plan = engine.plan()
    if not sample_tiles or sample_tiles >= len(list(plan)):
        sampled, scale = plan, 1.0
    else:
        sampled, cost = sample_plan(plan, sample_tiles), engine.estimate_cost(plan)
        scale = plan.seconds(cost) / sampled.seconds(cost)
    engine.timer.seconds.clear()
    start, cpu_start = _now(engine), time.process_time()
    for _ in engine.blocks(sampled):
        pass
    return scale * (_now(engine) - start), scale * (time.process_time() - cpu_start)


def _now(engine: Engine) -> float:
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


def seconds_per_sampled_pair(engine: Engine) -> float:
    """Time 1 × 1 tiles of one train example, whose own gradients count for all its tiles and are left out."""
    problem = engine.problem
    ordered = sorted(range(len(problem.x_examples)), key=lambda index: problem.x_examples.shapes[index])
    step = max(1, len(ordered) // SAMPLED_PAIRS)
    chosen = (ordered[step // 2 :: step] * 2)[:SAMPLED_PAIRS]
    plan = replace(engine.plan(), tile_rows=(TileRow((problem.typical_example,), tuple((index,) for index in chosen)),))
    rounds = []
    for _ in range(3):  # the first one warms up; the better of the others counts, since the machine may be busy
        marks = [_now(engine) for _ in engine.blocks(plan)]
        rounds.append((marks[-1] - marks[0]) / (len(marks) - 1))
    return min(rounds[1:])


def seconds_of_sampled_jacobians(engine: Engine) -> float:
    """Time the gradients of all train examples and of the first three X tiles of eight, and scale the latter up."""
    plan = engine.plan(TileRequest(column=8))
    if len(plan.tile_rows) > 1:
        raise UsageError("`memory_gb`: the gradients of all train examples do not fit at once; give more memory")
    ((train, x_tiles),) = plan.tile_rows
    list(engine.blocks(replace(plan, tile_rows=(TileRow(train[:1], (x_tiles[0][:1],)),))))  # warms everything up
    tiles = min(3, len(x_tiles))
    marks = [_now(engine)]
    for _ in engine.blocks(replace(plan, tile_rows=(TileRow(train, x_tiles[:tiles]),))):
        marks.append(_now(engine))
    if tiles == len(x_tiles):
        return marks[-1] - marks[0]
    # One group of parameters after another; the first tile of each includes the train examples' gradients.
    per_tile = sum(marks[first + 2] - marks[first] for first in range(1, len(marks), 3)) / 2
    return marks[-1] - marks[0] + per_tile * (plan.x_size / 8 - 3)


def dense_flops(model: PromptModel, problem: KernelProblem) -> float:
    """Count the flops of dense gradients: 1 + C passes, forming and contraction, in linear layers only."""
    tokens, c = sum(problem.train.shapes) + sum(problem.x_examples.shapes), problem.num_logits
    decoder = model.lm.get_output_embeddings()
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not decoder
    )
    per_token = 2 * (1 + c) * weights + 2 * c * weights
    return per_token * tokens + 2 * weights * c**2 * len(problem.train) * len(problem.x_examples)


def relative_error(
    job: Job, engine: str, model: PromptModel, inputs: Inputs, truth: ndarray, examples: int | None = None
) -> float:
    """Compare an engine with plain autograd.

    Args:
        job: The formula and the budget.
        engine: As for `measure`.
        model: The model in float32.
        inputs: The examples.
        truth: The kernel of their first ones, float64 ``[D, n, C, x, C]``.
        examples: How many of them count on either side; by default few for slow engines.
    """
    examples = examples or min(ERROR_EXAMPLES.get(engine, MOST_ERROR_EXAMPLES), truth.shape[1])
    inputs = inputs.first(examples)
    problem = make_problem(job, model, inputs, published=engine == PUBLISHED)
    made = make_engine(job, engine, problem)
    plan = made.plan()
    slices = assemble(made.blocks(plan), plan, problem).unflatten(0, (len(problem.slices), -1))
    found = slices[: len(problem.parts)].sum(dim=0)
    expected = torch.from_numpy(truth)[:, : plan.train_size, :, : plan.x_size]
    return float((found - expected).norm() / expected.norm())
