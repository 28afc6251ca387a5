"""Seconds, memory and error of one engine on one job."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from benchmarks.inputs import Inputs, Job, load_inputs, load_model, make_problem, true_kernel
from benchmarks.run_times import RunTimes, now, time_run
from lmntk.errors import UsageError
from lmntk.kernels import ENGINES, ESTIMATES, Engine, KernelProblem, MemoryBudget, TileRequest, assemble
from lmntk.kernels.memory import peak_bytes, retain_freed_memory
from lmntk.kernels.tiling import TileRow
from lmntk.kernels.timing import product_flops
from lmntk.models.prompt_model import PromptModel

PUBLISHED = "published"
# Other libraries that make the gradients, where they are installed.
PEERS = ["opacus"] if find_spec("opacus") else []
SAMPLED_PAIRS = 8
ERROR_EXAMPLES = {PUBLISHED: 2, "jvp": 2}  # on either side, by engine: these two take a second a pair
MOST_ERROR_EXAMPLES = 8
ERROR_EXAMPLES_OF_ESTIMATES = 64


def make_engine(job: Job, engine: str, problem: KernelProblem) -> Engine:
    """Return an engine with the job's budget; the yardstick has no choice of tiles, and takes the memory it needs."""
    if engine in (PUBLISHED, "jvp"):
        return ENGINES["jvp"](problem, MemoryBudget(2**60))
    if engine in PEERS:
        from benchmarks.peers import OpacusEngine

        return OpacusEngine(problem, job.budget)
    return (ENGINES | ESTIMATES)[engine](problem, job.budget)


def measure(job: Job, engine: str, truth: ndarray | None) -> tuple[dict[str, Any], ndarray | None]:
    """Measure one engine, in a process that does nothing else.

    Args:
        job: The model, examples and formula.
        engine: A key of `ENGINES` or `ESTIMATES`, one of `PEERS`, or `PUBLISHED`.
        truth: The result of `true_kernel`, if it is known already.

    Returns:
        A row of the table, and `truth`.
    """
    torch.set_num_threads(job.threads)
    inputs = load_inputs(job)
    model = load_model(job, inputs, torch.float32)
    problem = make_problem(job, model, inputs, published=engine == PUBLISHED)
    before = peak_bytes(job.torch_device)
    if engine in (PUBLISHED, "jvp", "jacobian", *PEERS):
        made = make_engine(job, engine, problem)
        by_pair = engine in (PUBLISHED, "jvp")
        seconds = job.pairs * seconds_per_sampled_pair(made) if by_pair else seconds_of_sampled_jacobians(made)
        times = RunTimes(seconds, None, dict(made.timer.seconds))
    else:
        with retain_freed_memory():  # as run.py does; the published program does not
            times = time_run(job, engine, problem)
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
        "projection_width": job.projection_width,
        "seconds": times.seconds,
        "cpu_seconds": times.cpu_seconds,
        "seconds_per_pair": times.seconds / job.pairs,
        "peak_memory_gb": peak / 2**30,
        "model_memory_gb": before / 2**30,
        "matmul_gflops": rate / 1e9,
        "roofline_fraction": dense_flops(model, problem, job.pairs) / times.seconds / rate,
        "seconds_by_stage": {name: round(value, 3) for name, value in times.by_stage.items()},
    }
    if job.times_only:
        return row | {"relative_error": None, "median_error": None}, truth
    if engine in ESTIMATES:
        return row | errors_of_estimate(job, engine, model, inputs), truth
    if truth is None:
        truth = true_kernel(job, inputs.first(MOST_ERROR_EXAMPLES)).numpy()
    return row | {"relative_error": relative_error(job, engine, model, inputs, truth), "median_error": None}, truth


def seconds_per_sampled_pair(engine: Engine) -> float:
    """Time 1 × 1 tiles of one train example, whose own gradients count for all its tiles and are left out."""
    problem = engine.problem
    ordered = sorted(range(len(problem.x_examples)), key=lambda index: problem.x_examples.shapes[index])
    step = max(1, len(ordered) // SAMPLED_PAIRS)
    chosen = (ordered[step // 2 :: step] * 2)[:SAMPLED_PAIRS]
    plan = replace(engine.plan(), tile_rows=(TileRow((problem.typical_example,), tuple((index,) for index in chosen)),))
    rounds = []
    for _ in range(3):  # the first one warms up; the better of the others counts, since the machine may be busy
        marks = [now(engine) for _ in engine.blocks(plan)]
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
    marks = [now(engine)]
    for _ in engine.blocks(replace(plan, tile_rows=(TileRow(train, x_tiles[:tiles]),))):
        marks.append(now(engine))
    if tiles == len(x_tiles):
        return marks[-1] - marks[0]
    # One group of parameters after another; the first tile of each includes the train examples' gradients.
    per_tile = sum(marks[first + 2] - marks[first] for first in range(1, len(marks), 3)) / 2
    return marks[-1] - marks[0] + per_tile * (plan.x_size / 8 - 3)


def dense_flops(model: PromptModel, problem: KernelProblem, pairs: int | None = None) -> float:
    """Count the flops of dense gradients: 1 + C passes, forming and contraction, in linear layers only.

    Args:
        model: The model.
        problem: The kernel.
        pairs: How many pairs of examples are contracted, if not those of the kernel alone.
    """
    tokens, c = sum(problem.train.shapes) + sum(problem.x_examples.shapes), problem.num_logits
    decoder = model.lm.get_output_embeddings()
    weights = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not decoder
    )
    per_token = 2 * (1 + c) * weights + 2 * c * weights
    return per_token * tokens + 2 * weights * c**2 * (pairs or len(problem.train) * len(problem.x_examples))


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


def errors_of_estimate(job: Job, engine: str, model: PromptModel, inputs: Inputs) -> dict[str, float]:
    """Compare an estimate with the `factored` engine on the first examples of either side.

    Returns:
        `relative_error`, the relative Frobenius error of entries, and `median_error`, the median relative error.
    """
    problem = make_problem(job, model, inputs.first(ERROR_EXAMPLES_OF_ESTIMATES))
    found = {}
    for name in (engine, "factored"):
        made = make_engine(job, name, problem)
        plan = made.plan()
        found[name] = assemble(made.blocks(plan), plan, problem)
    return entry_errors(found[engine], found["factored"])


def entry_errors(estimate: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the relative Frobenius error of an estimate, and the median of its entries' relative errors."""
    off = estimate - exact
    median = (off / exact).abs().median()
    return {"relative_error": float(off.norm() / exact.norm()), "median_error": float(median)}
