"""The interface of every engine."""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from typing import ClassVar, NamedTuple

from torch import Tensor

from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import Block, KernelProblem
from lmntk.kernels.tiling import CostModel, Plan, Tile, TileRequest
from lmntk.kernels.timing import StageTimer
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

ANY_TILES = TileRequest()


class ComputedTile(NamedTuple):
    """What an engine computes of a tile over one group of the parameters.

    Attributes:
        tile: The tile.
        block: Its part of the kernel, float64 ``[S, n, C, x, C]``.
        diagonal: K(x, x) of its X examples, all parts together, float64 ``[D, x, C, C]``; None where not wanted.
    """

    tile: Tile
    block: Tensor
    diagonal: Tensor | None


class Engine(ABC):
    """One way to compute kernels.

    Args:
        problem: The kernel.
        budget: The memory that the engine may take beside the model itself.
        tuning: Numbers that trade time for memory.
        timer: Adds up the seconds of the engine's stages, if given.
    """

    name: ClassVar[str]

    keeps_parts_apart: ClassVar[bool] = True
    """Whether the engine can return the contributions of parameters, such as a layer's, to a kernel."""

    multiplies_gradients: ClassVar[bool] = True
    """Whether it multiplies gradients itself, bfloat16 in float32; else the model does, in its own dtype."""

    def __init__(
        self,
        problem: KernelProblem,
        budget: MemoryBudget,
        tuning: Tuning = DEFAULT_TUNING,
        timer: StageTimer | None = None,
    ) -> None:
        if not self.keeps_parts_apart and (problem.part_of is not None or problem.low_rank):
            raise ValueError(f"the {self.name} engine sums over all parameters at once: it cannot keep them apart")
        if any(summation_dtype(tensor.dtype) != tensor.dtype for tensor in problem.params.values()):
            if problem.formula.signed:
                raise ValueError(
                    "of signs of bfloat16 gradients one in some hundred is wrong: take parameters in float32, or 'sgd'"
                )
            if not self.multiplies_gradients:
                raise ValueError(
                    f"the {self.name} engine lets the model add products, which rounds them to bfloat16: take "
                    "parameters in float32, or another engine"
                )
        self.problem = problem
        self.budget = budget
        self.tuning = tuning
        self.timer = timer or StageTimer()

    @abstractmethod
    def plan(self, tiles: TileRequest = ANY_TILES, processes: int = 1) -> Plan:
        """Lay the tiles.

        Args:
            tiles: Largest numbers of examples in a tile; what is None suits the engine and fits its memory.
            processes: Number of processes that share the plan: tiles of unrequested size are enough for all.

        Raises:
            MemoryBudgetError: The requested tiles do not fit, or not even the smallest.
        """

    def blocks(self, plan: Plan) -> Iterator[Block]:
        """Compute the tiles of `plan`, a block at a time."""
        for group in range(self.num_parameter_groups(plan)):
            yield from self.blocks_of_group(plan, group)

    def blocks_of_group(self, plan: Plan, group: int) -> Iterator[Block]:
        """Compute the tiles of `plan` over one group of the parameters, see `tiles_of_group`."""
        return ((tile, block) for tile, block, _ in self.tiles_of_group(plan, group))

    @abstractmethod
    def tiles_of_group(
        self, plan: Plan, group: int, with_diagonal: Container[Tile] = frozenset()
    ) -> Iterator[ComputedTile]:
        """Compute the tiles of `plan` over one group of the parameters.

        Args:
            plan: The result of `plan`, or some of its tiles.
            group: The number of the group; the blocks of a tile's groups add up to the tile, and so do the diagonals.
            with_diagonal: The tiles with which the diagonal of their X examples is computed too.
        """

    @abstractmethod
    def diagonal(self, plan: Plan, x: tuple[int, ...], group: int) -> Tensor:
        """Compute K(x, x) of some X examples alone, over one group of the parameters.

        Args:
            plan: The result of `plan`.
            x: The examples, of one of its X tiles.
            group: The number of the group.

        Returns:
            float64 ``[D, x, C, C]``.
        """

    @abstractmethod
    def expected_bytes(self, plan: Plan) -> int:
        """Return the engine's peak memory beside the model itself, in bytes."""

    @abstractmethod
    def estimate_cost(self, plan: Plan) -> CostModel:
        """Measure a few examples and return about how long the tiles of `plan` take, over all parameter groups."""

    def summary(self, plan: Plan) -> str:
        """Return the engine's name, and which parameters are computed in another way, in a few words."""
        return f"{self.name} engine"

    def num_parameter_groups(self, plan: Plan) -> int:
        """Return the number of parameter groups, each of which yields every tile once."""
        return 1


class MemoryBudgetError(Exception):
    """The memory budget is too small for one tile.

    Args:
        needed: The smallest budget that works, in bytes.
        given: The budget, in bytes.
    """

    def __init__(self, needed: int, given: int) -> None:
        self.needed = needed
        self.given = given
        super().__init__(f"the smallest tile takes {needed / 2**30:.2f} GB, and {given / 2**30:.2f} GB are allowed")
