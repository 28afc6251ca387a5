"""One kernel, computed by all processes together, tile by tile, each kept on disk as it comes."""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lmntk import distributed, interrupts
from lmntk.kernels import Engine, Plan
from lmntk.kernels.assembly import assemble
from lmntk.kernels.tiling import CostModel, Tile
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.tile_store import TileStore

logger = logging.getLogger(__name__)

# Looking at what the other processes have finished may take a hundredth of the time.
SECONDS_BETWEEN_LOOKS, LOOKING_SHARE = 1.0, 0.01
# Another machine's tile may take a while to show on a shared folder.
SECONDS_UNTIL_SEEN = 60.0


@dataclass(frozen=True)
class KernelJob:
    """A kernel that is to be computed.

    Attributes:
        name: What it is called: ``"train × test"``.
        engine: Computes its tiles.
        plan: All of them.
        pace: How long they take; the first process's counts.
        store: Keeps those that are finished.
    """

    name: str
    engine: Engine
    plan: Plan
    pace: CostModel
    store: TileStore

    @property
    def settings(self) -> dict[str, Any]:
        """What of the work the bits of a tile depend on, beside the kernel's definition."""
        gigabytes = self.engine.memory_bytes / 2**30
        tiles = {"train_tile": self.plan.train_tile, "x_tile": self.plan.x_tile}
        return {"engine": self.engine.name, **tiles, "memory_gb": gigabytes}

    @property
    def tile_bytes(self) -> int:
        """What the tiles take on disk, all their parts, until the kernel is there."""
        return (
            self.engine.num_parameter_groups(self.plan)
            * self.slices_bytes
            * self.plan.pairs
            // (self.plan.train_size * self.plan.x_size)
        )

    @property
    def slices_bytes(self) -> int:
        """What the kernel takes in its parts, one for each layer that is kept apart."""
        problem = self.engine.problem
        return problem.num_slices * self.plan.train_size * self.plan.x_size * problem.num_logits**2 * 8

    @property
    def file_bytes(self) -> int:
        """What the kernel takes in its file, and the layers' parts in theirs."""
        layers = len(self.engine.problem.layers)
        return self.slices_bytes // layers + (self.slices_bytes if layers > 1 else 0)

    @property
    def memory_bytes(self) -> int:
        """The peak in one process, beside the model."""
        return self.engine.expected_bytes(self.plan) + 2 * self.file_bytes

    def seconds(self) -> float:
        """Return how long the tiles take that are not in the store, with as many processes as there are."""
        there = Counter(self.store.numbers_there())
        parts = self.engine.num_parameter_groups(self.plan)
        rest = self.plan.restricted_to({tile for number, tile in enumerate(self.plan) if there[number] < parts})
        return max(share.seconds(self.pace) for share in rest.partition(self.pace, distributed.world_size()))

    def compute(self, show: bool) -> int:
        """Compute what the store lacks.

        Args:
            show: Whether this process shows progress.

        Returns:
            How many tiles, or parts of them, were there already.
        """
        numbers = {tile: number for number, tile in enumerate(self.plan)}
        parts = self.engine.num_parameter_groups(self.plan)
        distributed.on_all_ranks(lambda: self.store.wait_until_seen(SECONDS_UNTIL_SEEN))
        done = distributed.on_rank_zero(lambda: self.store.undamaged(self.plan, parts))
        if done:
            logger.info("%d of %d tiles of a run that was stopped are used", len(done), parts * len(numbers))
        progress = _Progress(self, parts, show)
        try:
            for part in range(parts):
                missing = {tile for tile, number in numbers.items() if (number, part) not in done}
                for tile, values in self.engine.blocks_of_group(self._own_share(missing), part):
                    self.store.write(numbers[tile], part, tile, values)
                    progress.add(tile)
                    interrupts.check()
            distributed.barrier()
        finally:
            progress.close()
        return len(done)

    @contextlib.contextmanager
    def kept_when_stopped(self) -> Iterator[None]:
        """Let a stop within say which tiles are kept."""
        try:
            yield
        except interrupts.Stopped as stop:
            kept = len(self.store.numbers_there())
            total = self.engine.num_parameter_groups(self.plan) * sum(1 for _ in self.plan)
            stop.kept_summary = f"{kept} of {total} tiles of the {self.name} kernel are kept in {self.store.folder}"
            raise

    def _own_share(self, missing: Container[Tile]) -> Plan:
        """What this process takes of the missing tiles, as the first one deals them."""
        rest = self.plan.restricted_to(missing)
        return distributed.on_rank_zero(lambda: rest.partition(self.pace, distributed.world_size()))[distributed.rank()]

    def kernel(self) -> tuple[Tensor, LayerKernels]:
        """Return the kernel that the tiles in the store make: to the bit the same, whoever made them and when.

        Returns:
            float64 ``[N, C, X, C]``, or ``[2, N, C, X, C]`` where the formula has two directions, and the layers'
            parts of it, which are none where they are not kept apart.
        """
        problem = self.engine.problem
        shape = problem.num_slices, problem.num_logits
        patience = 0.0 if distributed.world_size() == 1 else SECONDS_UNTIL_SEEN
        blocks = self.store.blocks(self.plan, self.engine.num_parameter_groups(self.plan), shape, patience)
        slices = assemble(blocks, self.plan, problem).unflatten(0, (len(problem.layers), -1))
        slices = slices if problem.formula.is_asymmetric else slices[:, 0]
        if problem.layer_of is None:
            return slices[0], {}
        return slices.sum(dim=0), dict(zip(problem.layers, slices, strict=True))


class _Progress:
    """One bar for all processes: what the others have done shows in the store."""

    def __init__(self, work: KernelJob, parts: int, show: bool) -> None:
        self._pairs = [tile.pairs for tile in work.plan]
        self._store = work.store
        self._next_look = 0.0
        there, total = self._finished() if show else 0, parts * work.plan.pairs
        self._bar = tqdm(total=total, initial=there, desc=work.name, unit="pair", disable=not show, mininterval=0.5)

    def add(self, tile: Tile) -> None:
        """Show that this process has finished a tile, or a part of it."""
        if distributed.world_size() == 1:
            self._bar.update(tile.pairs)
        elif not self._bar.disable and time.monotonic() > self._next_look:
            start = time.monotonic()
            self._bar.update(self._finished() - self._bar.n)
            took = time.monotonic() - start
            self._next_look = start + max(SECONDS_BETWEEN_LOOKS, took / LOOKING_SHARE)

    def close(self) -> None:
        """Show the last state and go on below the bar."""
        if not self._bar.disable:
            self._bar.update(self._finished() - self._bar.n)
        self._bar.close()

    def _finished(self) -> int:
        return sum(self._pairs[number] for number in self._store.numbers_there())
