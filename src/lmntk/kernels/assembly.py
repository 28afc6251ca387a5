"""From a problem to an engine, and from an engine's blocks to the whole kernel."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lmntk.kernels.engines import ENGINES, Engine, KernelProblem
from lmntk.kernels.memory import DEFAULT_FRACTION, free_bytes
from lmntk.kernels.problem import Block
from lmntk.kernels.tiling import Plan


def make_engine(problem: KernelProblem, engine: str = "auto", memory_gb: float | None = None) -> Engine:
    """Build the engine of that name for a kernel.

    Args:
        problem: The kernel.
        engine: A key of `ENGINES`, or ``"auto"`` for the fastest: `factored`, or `jacobian` where there is no module.
        memory_gb: What it may take beside the model itself, in 2**30 bytes; by default 60% of what is free.
    """
    device = next(iter(problem.params.values())).device
    budget = memory_gb * 2**30 if memory_gb is not None else DEFAULT_FRACTION * free_bytes(device)
    if engine == "auto":
        engine = "jacobian" if problem.module is None else "factored"
    return ENGINES[engine](problem, int(budget))


def assemble(blocks: Iterable[Block], plan: Plan, problem: KernelProblem) -> Tensor:
    """Put the blocks of a kernel, or of one process's share of it, in their places.

    Args:
        blocks: What an engine yields.
        plan: The plan they belong to.
        problem: The kernel.

    Returns:
        float64 ``[S, N, C, X, C]`` on the CPU; zero where no block came.
    """
    c = problem.num_logits
    kernel = torch.zeros(problem.num_slices, plan.train_size, c, plan.x_size, c, dtype=torch.float64)
    for tile, values in blocks:
        train, x = torch.tensor(tile.train), torch.tensor(tile.x)
        block = values.cpu()
        mirrored = block.permute(0, 3, 4, 1, 2)
        if plan.symmetric and tile.train == tile.x:
            # Products of floats in another order: what is symmetric but for rounding is made so to the bit.
            block = (block + mirrored) / 2
        kernel[:, train[:, None], :, x[None, :], :] += block.permute(1, 3, 0, 2, 4)
        if plan.symmetric and tile.train != tile.x:
            kernel[:, x[:, None], :, train[None, :], :] += mirrored.permute(1, 3, 0, 2, 4)
    return kernel
