"""One kernel, computed by all processes together; each finished tile is stored on disk."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lmntk import distributed, interrupts
from lmntk.kernels import Engine, Plan
from lmntk.kernels.assembly import Bands, assemble_diagonal, sum_of_parts
from lmntk.kernels.tiling import CostModel, Tile
from lmntk.storage.kernel_slices import KernelSlices
from lmntk.storage.kernel_writer import KernelWriter
from lmntk.storage.tile_store import TileShape, TileStore

logger = logging.getLogger(__name__)

# Looking for tiles that other processes have finished may take at most a hundredth of the time.
SECONDS_BETWEEN_LOOKS, LOOKING_SHARE = 1.0, 0.01
# A tile of another machine may take a while to appear in a shared folder.
SECONDS_UNTIL_SEEN = 60.0


def job_settings(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Return the settings, apart from the kernel's definition, that the bits of a tile depend on."""
    tiles = {"train_tile": plan.tile_size.row, "x_tile": plan.tile_size.column}
    return {"engine": engine.name, **tiles, "memory_gb": engine.budget.gb}


@dataclass(frozen=True)
class KernelJob:
    """A kernel to compute.

    Attributes:
        name: The kernel's two splits: ``"train × test"``.
        engine: Computes the tiles.
        plan: All tiles of the kernel.
        pace: How long each takes; all processes use the first one's estimate.
        store: Holds the finished tiles.
    """

    name: str
    engine: Engine
    plan: Plan
    pace: CostModel
    store: TileStore

    @property
    def tile_bytes(self) -> int:
        """The disk space of all tiles, until the kernel is assembled."""
        return self.engine.num_parameter_groups(self.plan) * (
            self.slices_bytes * self.plan.pairs // (self.plan.train_size * self.plan.x_size) + self.diagonal_bytes
        )

    @property
    def slices_bytes(self) -> int:
        """The size of the kernel as slices, one for each part that is kept apart, and of the adapters' kernels."""
        problem = self.engine.problem
        return problem.num_slices * self.plan.train_size * self.plan.x_size * problem.num_logits**2 * 8

    @property
    def tile_shape(self) -> TileShape:
        """What the file of each tile holds."""
        problem = self.engine.problem
        directions, with_diagonal = len(problem.formula.directions), problem.tiles_with_diagonal(self.plan)
        return TileShape(problem.num_slices, directions, problem.num_logits, with_diagonal)

    @property
    def diagonal_bytes(self) -> int:
        """The size of the diagonal; 0 for the train examples with themselves, whose kernel has it."""
        problem = self.engine.problem
        entries = len(problem.formula.directions) * self.plan.x_size * problem.num_logits**2
        return 0 if problem.x is None else 8 * entries

    @property
    def file_bytes(self) -> int:
        """The size of the kernel's file, and of the files of parts, adapters and the diagonal beside it."""
        slices = len(self.engine.problem.slices)
        return self.slices_bytes // slices + (self.slices_bytes if slices > 1 else 0) + self.diagonal_bytes

    @property
    def memory_bytes(self) -> int:
        """The peak memory of one process, beside the model: the kernel itself stays on the disk."""
        return max(self.engine.expected_bytes(self.plan), Bands(self.plan, self.engine.problem).num_bytes)

    def seconds(self) -> float:
        """Estimate how long the tiles that are not stored yet take all processes together."""
        there = Counter(self.store.complete_tiles(self.plan, self.tile_shape))
        parts = self.engine.num_parameter_groups(self.plan)
        rest = self.plan.restricted_to({tile for number, tile in enumerate(self.plan) if there[number] < parts})
        return max(share.seconds(self.pace) for share in rest.partition(self.pace, distributed.world_size()))

    def compute(self, progress: bool) -> int:
        """Compute the tiles that the store lacks.

        Args:
            progress: Whether this process shows a progress bar.

        Returns:
            How many tiles, or parameter groups of tiles, were stored already.
        """
        numbers = {tile: number for number, tile in enumerate(self.plan)}
        parts = self.engine.num_parameter_groups(self.plan)
        distributed.on_all_ranks(self.store.wait_until_created, SECONDS_UNTIL_SEEN)
        done = distributed.on_rank_zero(self.store.verified_tiles, self.plan, parts, self.tile_shape)
        if done:
            logger.info("%d of %d tiles of a run that was stopped are used", len(done), parts * len(numbers))
        bar = _Progress(self, parts, progress)
        try:
            for part in range(parts):
                missing = {tile for tile, number in numbers.items() if (number, part) not in done}
                share, with_diagonal = self._own_share(missing), self.tile_shape.with_diagonal
                for tile, block, diagonal in self.engine.tiles_of_group(share, part, with_diagonal):
                    self.store.write(numbers[tile], part, tile, block, diagonal)
                    del block  # the next one may need its memory
                    bar.add(tile)
                    interrupts.check()
            distributed.barrier()
        finally:
            bar.close()
        return len(done)

    @contextlib.contextmanager
    def reporting_progress_on_interrupt(self) -> Iterator[None]:
        """If the program is interrupted in this block, its message says how many tiles are kept."""
        try:
            yield
        except interrupts.Stopped as stop:
            kept = len(self.store.finished_tiles())
            total = self.engine.num_parameter_groups(self.plan) * sum(1 for _ in self.plan)
            stop.kept_summary = f"{kept} of {total} tiles of the {self.name} kernel are kept in {self.store.folder}"
            raise

    def _own_share(self, missing: Container[Tile]) -> Plan:
        """Return the missing tiles that this process computes, as the first one distributes them."""
        rest = self.plan.restricted_to(missing)
        return distributed.on_rank_zero(rest.partition, self.pace, distributed.world_size())[distributed.rank()]

    def outline(self) -> tuple[Tensor, KernelSlices]:
        """Return tensors without numbers, of the shapes of the kernel and of what is kept beside it.

        Returns:
            The kernel, ``[N, C, X, C]``, or ``[2, N, C, X, C]`` if the formula is asymmetric, and the slices.
        """
        problem, plan = self.engine.problem, self.plan
        shape = (problem.num_slices, plan.train_size, problem.num_logits, plan.x_size, problem.num_logits)
        return self._told_apart(torch.empty(shape, dtype=torch.float64, device="meta"))

    def assemble(self, writer: KernelWriter, progress: bool = False) -> Tensor | None:
        """Write the kernel from the stored tiles; its bits do not depend on which process computed them, or when.

        A few train examples at a time are in memory.

        Args:
            writer: Takes the rows of the kernel, and of what is kept beside it.
            progress: Whether to show a progress bar.

        Returns:
            K(x, x), float64 ``[X, C, C]``, or ``[2, X, C, C]`` if the formula is asymmetric; None for train.
        """
        problem, shape = self.engine.problem, self.tile_shape
        deadline = time.monotonic() + (0.0 if distributed.world_size() == 1 else SECONDS_UNTIL_SEEN)
        diagonal = None if problem.x is None else assemble_diagonal([], problem)
        groups, bands = self.engine.num_parameter_groups(self.plan), Bands(self.plan, problem)
        name = f"{self.name}, assembled"
        with tqdm(total=self.plan.train_size, desc=name, unit="row", disable=not progress, delay=5, leave=False) as bar:
            for band in bands:
                # A tile with a diagonal may have several bands.
                own = diagonal if band.among.start == 0 else None
                rows = bands.assemble(band, self.store.blocks(band.tiles, groups, shape, deadline, own))
                writer.write(band.examples, *self._told_apart(rows))
                bar.update(len(band.examples))
                interrupts.check()
        return diagonal if diagonal is None or problem.formula.is_asymmetric else diagonal[0]

    def _told_apart(self, rows: Tensor) -> tuple[Tensor, KernelSlices]:
        """Divide slices, ``[S, N, C, X, C]``, into the kernel and what is kept beside it."""
        problem = self.engine.problem
        slices = rows.unflatten(0, (len(problem.slices), -1))
        slices = slices if problem.formula.is_asymmetric else slices[:, 0]
        parts, adapters = slices.tensor_split([len(problem.parts)])
        lora = dict(zip(problem.low_rank or (), adapters, strict=True))
        if problem.part_of is None:
            return parts[0], KernelSlices(lora=lora)
        return sum_of_parts(parts.unbind()), KernelSlices(parts=dict(zip(problem.parts, parts, strict=True)), lora=lora)

    def diagonal_alone(self) -> Tensor:
        """Compute K(x, x) without the kernel, on all processes; they share the X tiles."""
        problem, x_tiles = self.engine.problem, self.plan.tile_rows[0].x_tiles
        own = x_tiles[distributed.rank() :: distributed.world_size()]
        groups = range(self.engine.num_parameter_groups(self.plan))
        parts = ((x, self.engine.diagonal(self.plan, x, group)) for group in groups for x in own)
        found = torch.stack(distributed.gather(assemble_diagonal(parts, problem))).sum(dim=0)
        return found if problem.formula.is_asymmetric else found[0]


class _Progress:
    """One progress bar for all processes: it finds the work of the others in the store."""

    def __init__(self, job: KernelJob, parts: int, show: bool) -> None:
        self._pairs = [tile.pairs for tile in job.plan]
        self._store = job.store
        self._next_look = 0.0
        there, total = self._finished() if show else 0, parts * job.plan.pairs
        self._bar = tqdm(total=total, initial=there, desc=job.name, unit="pair", disable=not show, mininterval=0.5)

    def add(self, tile: Tile) -> None:
        """Count a tile, or a parameter group of it, that this process has finished."""
        if distributed.world_size() == 1:
            self._bar.update(tile.pairs)
        elif not self._bar.disable and time.monotonic() > self._next_look:
            start = time.monotonic()
            self._bar.update(self._finished() - self._bar.n)
            took = time.monotonic() - start
            self._next_look = start + max(SECONDS_BETWEEN_LOOKS, took / LOOKING_SHARE)

    def close(self) -> None:
        """Show the final state and end the bar's line."""
        if not self._bar.disable:
            self._bar.update(self._finished() - self._bar.n)
        self._bar.close()

    def _finished(self) -> int:
        return sum(self._pairs[number] for number in self._store.finished_tiles())
