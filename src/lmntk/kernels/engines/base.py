"""What every engine is given and gives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lmntk.kernels.examples import Batch, Examples, bytes_of
from lmntk.kernels.formulas import Formula
from lmntk.kernels.tiling import Pace, Plan, Tile

Block = tuple[Tile, Tensor]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class KernelProblem:
    """The kernel to compute, whatever the engine.

    Attributes:
        logits_fn: `f(params, batch) -> [B, C]`, differentiable by `torch.func`; examples do not see each other. Of a
            parameter of which only some rows can matter it may take these rows.
        params: The parameters θ at which, and over which, gradients are taken.
        train: The N examples along the first axis.
        x: The X examples along the other axis; None for the kernel of the train examples with themselves.
        formula: Which sides take the sign.
        num_logits: C.
        module: The module behind `logits_fn`, whose parameters go by the names in `params`, if there is one.
        call: Calls it with a batch.
        layer_of: The layer that each parameter belongs to, where their parts of the kernel are to be kept apart.
    """

    logits_fn: Callable[[Parameters, Batch], Tensor]
    params: Parameters
    train: Examples
    x: Examples | None
    formula: Formula
    num_logits: int
    module: nn.Module | None = None
    call: Callable[[Batch], Tensor] | None = None
    layer_of: Mapping[str, str] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The G layers whose parts are kept apart, in the order of `layer_of`; a single one where none are."""
        return ("all",) if self.layer_of is None else tuple(dict.fromkeys(self.layer_of.values()))

    @property
    def slices(self) -> int:
        """S, the length of a block's first axis: every layer's directions, G · D."""
        return len(self.layers) * len(self.formula.directions)

    def layer_named(self, parameter: str) -> str:
        """Return which of `layers` a parameter belongs to."""
        return self.layers[0] if self.layer_of is None else self.layer_of[parameter]

    def by_layer(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Add parts of a block up, those of each layer by themselves.

        Args:
            parts: The name of a parameter, and what it and others of its layer make: ``[D, n, C, x, C]``.

        Returns:
            float64 ``[S, n, C, x, C]``.
        """
        sums: dict[str, Tensor] = {}
        for name, values in parts:
            layer = self.layer_named(name)
            sums[layer] = sums[layer] + values if layer in sums else values
        some = next(iter(sums.values()))
        return torch.cat([sums[layer] if layer in sums else torch.zeros_like(some) for layer in self.layers])

    @property
    def x_examples(self) -> Examples:
        """The examples along the other axis, be they the train examples again."""
        return self.train if self.x is None else self.x

    @property
    def symmetric(self) -> bool:
        """Whether one of two mirrored tiles is enough."""
        return self.x is None and self.formula.symmetric

    def on_diagonal(self, tile: Tile) -> bool:
        """Whether both sides of a tile are the same examples."""
        return self.x is None and tile.x == tile.train

    @property
    def typical_example(self) -> int:
        """The index of the train example in the middle, when ordered by shape."""
        return sorted(range(len(self.train)), key=lambda index: self.train.shapes[index])[len(self.train) // 2]

    @property
    def gradient_bytes(self) -> int:
        """What the gradients of one example's C logits take."""
        return self.num_logits * bytes_of(self.params.values())


class Engine(ABC):
    """One way to compute kernels.

    Args:
        problem: The kernel.
        memory_bytes: What the engine may take beside the model itself.
    """

    name: ClassVar[str]

    def __init__(self, problem: KernelProblem, memory_bytes: int) -> None:
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
        for part in range(self.parts(plan)):
            yield from self.blocks_of_part(plan, part)

    @abstractmethod
    def blocks_of_part(self, plan: Plan, part: int) -> Iterator[Block]:
        """Compute one part of the tiles of `plan`: that of some of the parameters.

        Args:
            plan: What `plan` returned, or some of its tiles.
            part: Which of `parts`; those of a tile add up to it.
        """

    @abstractmethod
    def expected_bytes(self, plan: Plan) -> int:
        """Return what the engine will take at its peak, beside the model itself."""

    @abstractmethod
    def pace(self, plan: Plan) -> Pace:
        """Measure a few examples, and return about how long the rows and tiles of `plan` take, all parts together."""

    def summary(self, plan: Plan) -> str:
        """Say in a few words which engine this is, and which parameters take which way."""
        return f"{self.name} engine"

    def parts(self, plan: Plan) -> int:
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
