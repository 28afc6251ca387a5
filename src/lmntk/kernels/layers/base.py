"""What a layer type is to the factored engine."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract
from lmntk.kernels.formulas import SignPlacement

Gradients = Sequence[Tensor]
"""For each of the C logits its gradient at a module's output, ``[B, L, d]`` (``[B, d]`` counts as L = 1)."""


class Workspace:
    """Buffers that are allocated once and written again and again: fresh ones would cost more than the products.

    Args:
        capacity: How many numbers the largest buffer may hold.
        dtype: Of the gradients.
        device: Where they live.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity = capacity
        self._dtype = dtype
        self._device = device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the buffer `name` in this shape; what it held before is gone."""
        size = 1
        for length in shape:
            size *= length
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            self._buffers[name] = buffer = torch.empty(size, dtype=self._dtype, device=self._device)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Cost:
    """What it takes to multiply the gradients of two examples; vectors take nothing worth counting.

    Attributes:
        dense_numel: How many numbers an example's gradient of one logit has, where it is formed.
        gram_flops_per_position_pair: Floating-point operations for every pair of their positions, where it is not.
    """

    dense_numel: int = 0
    gram_flops_per_position_pair: float = 0.0


class Layer(ABC):
    """One module's part of the kernel.

    Args:
        module: The module.
        parameter_names: Which of its own parameters count: ``"weight"``, ``"bias"``.
    """

    parameters: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})
    """The module's own parameters that the class can differentiate."""

    def __init__(self, module: nn.Module, parameter_names: frozenset[str]) -> None:
        self.module = module
        self.parameter_names = parameter_names

    @staticmethod
    def select_input(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Return what of a module's arguments `factors` is to be told of: its first one."""
        return arguments[0] if arguments else None

    @abstractmethod
    def factors(self, inputs: Tensor, gradients: Gradients) -> Any:
        """Keep of a batch what the products need.

        Args:
            inputs: What the module was given, ``[B, L, d]``, or indices ``[B, L]``.
            gradients: Of each logit at the module's output.
        """

    def cost(self, factors: Any, train: int, x: int, signed: bool) -> Cost:
        """Tell what multiplying costs, with so many examples like this one on either side, and perhaps their signs."""
        return Cost()

    def buffer(self, factors: Any, train: int) -> int:
        """Return how many numbers the largest buffer best holds, with so many train examples; 0 for any."""
        return 0

    @abstractmethod
    def kernel(
        self, train: Sequence[Any], x: Sequence[Any], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Return this module's part of a tile.

        Args:
            train: The factors of the train tile's batches.
            x: The same for the X tile.
            directions: Which side takes the sign.
            workspace: Buffers to use.

        Returns:
            float64 ``[D, n, C, x, C]``.
        """


def stack_vectors(gradients: Gradients, scale: Tensor | None = None) -> Tensor:
    """Sum output gradients over positions, each first multiplied by `scale`: ``[B, C, d]``."""
    return torch.stack([with_positions(g if scale is None else g * scale).sum(dim=1) for g in gradients], dim=1)


def with_positions(tensor: Tensor) -> Tensor:
    """Give what is ``[B, d]`` an axis of one position; what has more than one becomes ``[B, L, d]``."""
    return tensor[:, None] if tensor.dim() == 2 else tensor.flatten(1, -2)


def vector_kernel(train: Sequence[Tensor], x: Sequence[Tensor], directions: Sequence[SignPlacement]) -> Tensor:
    """Multiply whole gradients ``[B, C, p]``, as small as biases are; returns float64 ``[D, n, C, x, C]``."""
    left, right = torch.cat(list(train)), torch.cat(list(x))
    product = contract(left.flatten(0, 1), right.flatten(0, 1), directions)
    return product.unflatten(2, right.shape[:2]).unflatten(1, left.shape[:2])
