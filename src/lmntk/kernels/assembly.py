"""Choose an engine for a problem, and assemble its blocks to the whole kernel."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lmntk.kernels.engines import ENGINES, ESTIMATES, Engine
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import Block, KernelProblem, ModuleModel
from lmntk.kernels.tiling import Plan, Tile
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning


def make_engine(
    problem: KernelProblem,
    engine: str = "auto",
    budget: MemoryBudget | None = None,
    tuning: Tuning = DEFAULT_TUNING,
    earlier: Engine | None = None,
) -> Engine:
    """Build an engine for a kernel.

    Args:
        problem: The kernel to compute.
        engine: A key of `ENGINES` or `ESTIMATES`, or ``"auto"`` for the fastest that is exact: `factored`, or
            `jacobian` if there is no module.
        budget: The memory that it may take beside the model itself; by default `MemoryBudget.default`.
        tuning: Numbers that trade time for memory.
        earlier: An engine that has computed another kernel of the same model, train examples and formula: what it has
            found out and still holds is used again.
    """
    if budget is None:
        budget = MemoryBudget.default(next(iter(problem.params.values())).device)
    if engine == "auto":
        engine = "factored" if isinstance(problem.model, ModuleModel) else "jacobian"
    chosen = (ENGINES | ESTIMATES)[engine]
    if issubclass(chosen, FactoredEngine):
        known = earlier if isinstance(earlier, FactoredEngine) and type(earlier) is chosen else None
        return chosen(problem, budget, tuning, earlier=known)
    return chosen(problem, budget, tuning)


def assemble_diagonal(parts: Iterable[tuple[tuple[int, ...], Tensor]], problem: KernelProblem) -> Tensor:
    """Sum the diagonals of tiles and parameter groups into K(x, x) of all X examples.

    Args:
        parts: The X examples of a tile, and what an engine computes of them, float64 ``[D, x, C, C]``.
        problem: The kernel that is computed.

    Returns:
        float64 ``[D, X, C, C]`` on the CPU; zero where there was no part.
    """
    c, size = problem.num_logits, len(problem.x_examples)
    diagonal = torch.zeros(len(problem.formula.directions), size, c, c, dtype=torch.float64)
    for x, values in parts:
        diagonal[:, torch.tensor(x)] += values.cpu()
    return diagonal


class _Places(NamedTuple):
    """Where the examples of tiles stand if each tile's are consecutive, and the place of each example."""

    slices: dict[tuple[int, ...], slice]
    order: Tensor


def _places(tiles: Iterable[tuple[int, ...]], size: int) -> _Places | None:
    """Put tiles one after the other, and then the examples of none; None if two tiles have an example in common.

    Adding to consecutive examples is many times as fast as adding to scattered ones, which matters for many slices.
    """
    slices: dict[tuple[int, ...], slice] = {}
    placed: list[int] = []
    for tile in tiles:
        slices[tile] = slice(len(placed), len(placed) + len(tile))
        placed += tile
    missing = sorted({*range(size)} - {*placed})
    if len(placed) + len(missing) > size:
        return None
    return _Places(slices, torch.argsort(torch.tensor([*placed, *missing], dtype=torch.int64)))


def assemble(blocks: Iterable[Block], plan: Plan, problem: KernelProblem) -> Tensor:
    """Sum the blocks of a kernel, or of one process's share of it, into the whole.

    Args:
        blocks: The blocks that an engine yields, float64 ``[S, n, C, x, C]`` each.
        plan: The plan of these blocks.
        problem: The kernel that is computed.

    Returns:
        float64 ``[S, N, C, X, C]`` on the CPU; zero where there was no block.
    """
    c = problem.num_logits
    kernel = torch.zeros(problem.num_slices, plan.train_size, c, plan.x_size, c, dtype=torch.float64)
    rows = _places({row.train: None for row in plan.tile_rows}, plan.train_size)
    columns = _places({x: None for row in plan.tile_rows for x in row.x_tiles}, plan.x_size)
    if not plan.symmetric and rows is not None and columns is not None:
        for tile, values in blocks:
            kernel[:, rows.slices[tile.train], :, columns.slices[tile.x]] += values.cpu()
        for part in kernel:
            part.copy_(part[rows.order][:, :, columns.order])
        return kernel
    for tile, values in blocks:
        train, x = torch.tensor(tile.train), torch.tensor(tile.x)
        block = values.cpu()
        mirrored = block.permute(0, 3, 4, 1, 2)  # "siajb -> sjbia"
        if plan.symmetric and tile.train == tile.x:
            # The products are in another order, so that the block is symmetric up to rounding only.
            block = (block + mirrored) / 2
        # Indexing by two arrays puts their axes first: "ijsab".
        kernel[:, train[:, None], :, x[None, :], :] += block.permute(1, 3, 0, 2, 4)
        if plan.symmetric and tile.train != tile.x:
            kernel[:, x[:, None], :, train[None, :], :] += mirrored.permute(1, 3, 0, 2, 4)
    return kernel


def sum_of_parts(parts: Sequence[Tensor]) -> Tensor:
    """Add up the parts of a kernel, or of some of its rows, in their order, which fixes the bits of the sum."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


BAND_BYTES = 2**28
"""The largest size of the rows that `Bands` assembles at once."""


class Band(NamedTuple):
    """Consecutive train examples of one tile, and the tiles that hold their rows of the kernel.

    Attributes:
        whole: All train examples of the tile.
        among: Which of them are in the band.
        tiles: The tiles with their numbers in the plan. Of a symmetric kernel some are mirrored: the band's examples
            are among their X examples.
    """

    whole: tuple[int, ...]
    among: slice
    tiles: tuple[tuple[int, Tile], ...]

    @property
    def examples(self) -> tuple[int, ...]:
        """The train examples of the band."""
        return self.whole[self.among]


class Bands:
    """Assembles a kernel band by band, so that it need not fit into memory: the entries are those of `assemble`.

    Args:
        plan: The plan of the whole kernel.
        problem: The kernel that is computed.

    Raises:
        ValueError: Two tiles of the plan have an example in common along one axis, and another one there.
    """

    def __init__(self, plan: Plan, problem: KernelProblem) -> None:
        self._plan = plan
        self._shape = problem.num_slices, problem.num_logits
        columns = _places({x: None for row in plan.tile_rows for x in row.x_tiles}, plan.x_size)
        if columns is None:
            raise ValueError("the tiles of a plan overlap")
        self._columns = columns

    @property
    def most_examples(self) -> int:
        """The largest number of train examples in a band."""
        slices, c = self._shape
        row = slices * c * self._plan.x_size * c * 8
        return max(1, min(self._plan.tile_size.row, BAND_BYTES // row))

    @property
    def num_bytes(self) -> int:
        """The memory that assembling a band takes: its rows, in the order of the tiles and in that of the examples."""
        slices, c = self._shape
        return 2 * self.most_examples * slices * c * self._plan.x_size * c * 8

    def __iter__(self) -> Iterator[Band]:
        """Go through the bands of all train examples."""
        tiles = defaultdict(list)
        for number, tile in enumerate(self._plan):
            tiles[tile.train].append((number, tile))
            if self._plan.symmetric and tile.x != tile.train:
                tiles[tile.x].append((number, tile))
        step = self.most_examples
        for whole, own in tiles.items():
            yield from (Band(whole, slice(start, start + step), tuple(own)) for start in range(0, len(whole), step))

    def assemble(self, band: Band, blocks: Iterable[Block]) -> Tensor:
        """Sum the blocks of a band.

        Args:
            band: The band.
            blocks: The blocks of its tiles, float64 ``[S, n, C, x, C]`` each: for every parameter group all of them.

        Returns:
            float64 ``[S, rows, C, X, C]`` on the CPU, a row for each of the band's examples.
        """
        slices, c = self._shape
        rows = torch.zeros(slices, len(band.examples), c, self._plan.x_size, c, dtype=torch.float64)
        for tile, values in blocks:
            block, x = values.cpu(), tile.x
            if self._plan.symmetric:
                mirrored = block.permute(0, 3, 4, 1, 2)  # "siajb -> sjbia"
                if tile.train == tile.x:
                    block = (block + mirrored) / 2
                elif tile.x == band.whole:
                    block, x = mirrored, tile.train
            rows[:, :, :, self._columns.slices[x]] += block[:, band.among]
        return rows.index_select(3, self._columns.order)
