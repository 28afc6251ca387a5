"""The kernel that is asked for, as engines see it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmntk.kernels.batching import Batch, Examples, bytes_of
from lmntk.kernels.formulas import Formula
from lmntk.kernels.tiling import Tile

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
    def num_slices(self) -> int:
        """S, the length of a block's first axis: every layer's directions, G · D."""
        return len(self.layers) * len(self.formula.directions)

    def layer_name(self, parameter: str) -> str:
        """Return which of `layers` a parameter belongs to."""
        return self.layers[0] if self.layer_of is None else self.layer_of[parameter]

    def sum_by_layer(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        """Add parts of a block up, those of each layer by themselves.

        Args:
            parts: The name of a parameter, and what it and others of its layer make: ``[D, n, C, x, C]``.

        Returns:
            float64 ``[S, n, C, x, C]``.
        """
        sums: dict[str, Tensor] = {}
        for name, values in parts:
            layer = self.layer_name(name)
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
