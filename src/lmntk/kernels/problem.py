"""The kernel to compute, as planners and engines see it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lmntk.kernels.batching import Batch, Examples, bytes_of
from lmntk.kernels.formulas import Formula
from lmntk.kernels.low_rank import LowRankAdapter
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import Plan, Tile

Block = tuple[Tile, Tensor]
Parameters = dict[str, Tensor]

# Contributions to slices that are held at once while they are added: those of layers that share inputs.
NUM_CONTRIBUTIONS = 4


@dataclass(frozen=True)
class PartialRows:
    """Parameters of which a function takes only the rows that both sides of a kernel can have gradients of.

    K(x, x) needs the others too, such as the embeddings of words that no train example has.

    Attributes:
        names: Their names.
        of_batch: Returns the function and its parameters with all rows of these that a batch has gradients of.
    """

    names: frozenset[str]
    of_batch: Callable[[Batch], tuple[Callable[[Parameters, Batch], Tensor], Parameters]]


@dataclass(frozen=True)
class FunctionModel:
    """A model that is known as a function of its parameters only.

    Attributes:
        logits_fn: `f(params, batch) -> [B, C]`, differentiable by `torch.func`, in which examples do not see each
            other. For a parameter of which only some rows can matter it may take these rows.
        partial_rows: These parameters; None if it takes all of them whole.
    """

    logits_fn: Callable[[Parameters, Batch], Tensor]
    partial_rows: PartialRows | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class ModuleModel(FunctionModel):
    """A model whose module is known too, so that its layers' gradients can be kept as factors.

    Attributes:
        module: The module that `logits_fn` computes, at its own parameters, which have the same names.
    """

    module: nn.Module

    def __call__(self, batch: Batch) -> Tensor:
        """Call the module with a batch and return its logits, ``[B, C]``."""
        return logits_of(call_with(self.module, batch))


def call_with(function: Callable[..., Any], batch: Batch) -> Any:
    """Call a function with a batch: a dict by keyword, a tuple by position, anything else as its only argument."""
    if isinstance(batch, dict):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple) else function(batch)


def logits_of(outputs: Any) -> Any:
    """Return the attribute `logits` of a model's outputs, which transformers' models have, else the outputs."""
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


@dataclass(frozen=True, kw_only=True)
class KernelSides:
    """The examples along both axes and what is computed of them: all that a plan depends on.

    Attributes:
        train: The N examples along the first axis.
        x: The X examples along the other axis; None for the kernel of the train examples with themselves.
        formula: Which sides take the sign of the gradient.
        num_logits: C, the logits of an example.
    """

    train: Examples
    x: Examples | None
    formula: Formula
    num_logits: int

    @property
    def x_examples(self) -> Examples:
        """The examples along the other axis, which may be the train examples again."""
        return self.train if self.x is None else self.x

    @property
    def symmetric(self) -> bool:
        """Whether one of two mirrored tiles is enough."""
        return self.x is None and self.formula.symmetric

    def on_diagonal(self, tile: Tile) -> bool:
        """Return whether both sides of a tile are the same examples."""
        return self.x is None and tile.x == tile.train

    def tiles_with_diagonal(self, plan: Plan) -> frozenset[Tile]:
        """Return the tiles of a plan with which K(x, x) of their X examples is computed: those of the first train tile.

        A kernel of the train examples with themselves has its diagonal in it: none of its tiles.
        """
        if self.x is None or not plan.tile_rows:
            return frozenset()
        train, x_tiles = plan.tile_rows[0]
        return frozenset(Tile(train, x) for x in x_tiles)

    @property
    def typical_example(self) -> int:
        """The index of the train example of median shape."""
        return sorted(range(len(self.train)), key=lambda index: self.train.shapes[index])[len(self.train) // 2]


@dataclass(frozen=True, kw_only=True)
class KernelProblem(KernelSides):
    """The kernel to compute, whatever the engine.

    Attributes:
        model: The model as a function or a module.
        params: The parameters θ at which, and over which, gradients are taken.
        part_of: The part of the kernel that each parameter contributes to, if parts are kept apart, such as its layer.
        low_rank: LoRA adapters, by the names of the weights in `params` that they would adapt: each has a kernel of its
            own beside the parts, which is not in their sum.
        projection: How the `projected` engine estimates the kernel; None for an exact one.
    """

    model: FunctionModel
    params: Parameters
    part_of: Mapping[str, str] | None = None
    low_rank: Mapping[str, LowRankAdapter] | None = None
    projection: Projection | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The G parts that are kept apart, in the order of `part_of`; one name if none are. They sum to the kernel."""
        return ("all",) if self.part_of is None else tuple(dict.fromkeys(self.part_of.values()))

    @property
    def slices(self) -> tuple[str, ...]:
        """What a block holds: the parts, and then the adapters by the names of their weights."""
        return (*self.parts, *(self.low_rank or ()))

    @property
    def num_slices(self) -> int:
        """S, the length of a block's first axis: the directions of every part and of every adapter."""
        return len(self.slices) * len(self.formula.directions)

    def slice_bytes(self, fallback: bool = False) -> int:
        """Return the bytes that slices add to the memory of a tile, for each pair of its examples.

        Held at once are the block that is computed, the one before it, and some contributions that are being added. One
        slice is small beside the gradients of its examples, and does not count.

        Args:
            fallback: Whether two engines compute a block each, one of which is put together from smaller ones.
        """
        if len(self.slices) == 1:
            return 0
        directions = len(self.formula.directions)
        return 8 * self.num_logits**2 * (self.num_slices * (4 if fallback else 2) + NUM_CONTRIBUTIONS * directions)

    def part_name(self, parameter: str) -> str:
        """Return which of `parts` a parameter belongs to."""
        return "all" if self.part_of is None else self.part_of[parameter]

    def sum_by_slice(self, contributions: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Sum contributions to a block, those to each of `slices` separately.

        Args:
            contributions: Pairs of a slice's name and what a module or parameter adds to it, ``[D, n, C, x, C]``.

        Returns:
            float64 ``[S, n, C, x, C]``.
        """
        places = {name: number for number, name in enumerate(self.slices)}
        sums: Tensor | None = None
        for name, values in contributions:
            if sums is None:
                sums = values.new_zeros(len(places), *values.shape)
            sums[places[name]] += values
        if sums is None:
            raise ValueError("a block without contributions has no shape")
        return sums.flatten(0, 1)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of one example's C logits."""
        return self.num_logits * bytes_of(self.params.values())
