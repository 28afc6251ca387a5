"""What every engine is given and gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from lmntk.kernels.problem import Block, KernelProblem
from lmntk.kernels.tiling import CostModel, Plan


class Engine(ABC):
    """One way to compute kernels.

    Args:
        problem: The kernel.
        memory_bytes: What the engine may take beside the model itself.
    """

    name: ClassVar[str]

    keeps_layers_apart: ClassVar[bool] = True
    """Whether the engine can return each layer's part of a kernel."""

    def __init__(self, problem: KernelProblem, memory_bytes: int) -> None:
        if problem.layer_of is not None and not self.keeps_layers_apart:
            raise ValueError(f"the {self.name} engine takes all layers at once: it cannot keep them apart")
        self.problem = problem
        self.memory_bytes = memory_bytes

    @abstractmethod
    def plan(self, train_tile: int | None = None, x_tile: int | None = None, processes: int = 1) -> Plan:
        """Lay the tiles.

        Args:
            train_tile: Train examples in a tile; not given: what suits the engine and fits its memory.
            x_tile: The same for the X examples.
            processes: How many will share the plan: where sizes are not given, each gets its part.

        Raises:
            MemoryBudgetError: The tiles asked for do not fit, or not even the smallest.
        """

    def blocks(self, plan: Plan) -> Iterator[Block]:
        """Compute the tiles of `plan`, a block at a time."""
        for part in range(self.num_parameter_groups(plan)):
            yield from self.blocks_of_group(plan, part)

    @abstractmethod
    def blocks_of_group(self, plan: Plan, part: int) -> Iterator[Block]:
        """Compute one part of the tiles of `plan`: that of some of the parameters.

        Args:
            plan: What `plan` returned, or some of its tiles.
            part: Which of `parts`; those of a tile add up to it.
        """

    @abstractmethod
    def expected_bytes(self, plan: Plan) -> int:
        """Return what the engine will take at its peak, beside the model itself."""

    @abstractmethod
    def estimate_cost(self, plan: Plan) -> CostModel:
        """Measure a few examples, and return about how long the rows and tiles of `plan` take, all parts together."""

    def summary(self, plan: Plan) -> str:
        """Say in a few words which engine this is, and which parameters take which way."""
        return f"{self.name} engine"

    def num_parameter_groups(self, plan: Plan) -> int:
        """Return how many parts a tile comes in."""
        return 1


class MemoryBudgetError(Exception):
    """The memory budget is too small for one tile.

    Args:
        needed: The least number of bytes that works.
        given: The budget.
    """

    def __init__(self, needed: int, given: int) -> None:
        self.needed = needed
        self.given = given
        super().__init__(f"the smallest tile takes {needed / 2**30:.2f} GB, and {given / 2**30:.2f} GB are allowed")
