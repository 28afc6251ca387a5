"""The interface of layer types, through which the factored engine uses them."""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract, summation_dtype, widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.timing import StageTimer
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

Gradients = Sequence[Tensor]
"""The gradient of each of the C logits at a module's output, ``[B, L, d]`` (``[B, d]`` counts as L = 1)."""


class Buffer(Enum):
    """The buffers of a `Workspace`; names of one value share their memory and are never in use together."""

    TRAIN = 1
    X = 2
    SIGNED_TRAIN = 3
    PRODUCT = 4
    WIDE_GRADIENTS = 5
    WIDE_INPUTS = 6
    # The Gram path and the embeddings form no gradients.
    INPUT_GRAM = 1
    GRADIENT_GRAM = 2
    TOKEN_PRODUCTS = 2


class Workspace:
    """Buffers that are allocated once and reused: fresh ones would cost more than the products.

    Args:
        capacity: How many numbers the largest buffer may hold.
        dtype: The dtype of the gradients; buffers hold their products, and have its `summation_dtype`.
        device: The device of the gradients.
        timer: Adds up the seconds of forming and contraction.
    """

    def __init__(
        self, capacity: int, dtype: torch.dtype, device: torch.device, timer: StageTimer | None = None
    ) -> None:
        self.capacity = capacity
        self.timer = timer or StageTimer()
        self._dtype = summation_dtype(dtype)
        self._device = device
        self._buffers: dict[Buffer, Tensor] = {}
        self._diagonals: dict[object, Tensor] | None = None

    @contextlib.contextmanager
    def keeping_diagonals(self, wanted: bool) -> Iterator[None]:
        """Within this block, if `wanted`, keep the diagonals of gradients that are formed for products anyway."""
        self._diagonals = {} if wanted else None
        try:
            yield
        finally:
            self._diagonals = None

    @property
    def keeps_diagonals(self) -> bool:
        """Whether diagonals of formed gradients are wanted."""
        return self._diagonals is not None

    def keep_diagonal(self, key: object, diagonal: Tensor) -> None:
        """Keep the diagonal ``[D, x, C, C]`` of the X examples whose factors have a key."""
        if self._diagonals is not None:
            self._diagonals[key] = diagonal

    def kept_diagonal(self, key: object) -> Tensor | None:
        """Return what `keep_diagonal` has kept, which is then forgotten; None for nothing."""
        return self._diagonals.pop(key, None) if self._diagonals else None

    def take(self, buffer: Buffer, *shape: int) -> Tensor:
        """Return a buffer in this shape; its previous contents are lost."""
        size = math.prod(shape)
        held = self._buffers.get(buffer)
        if held is None or held.numel() < size:
            self._buffers[buffer] = held = torch.empty(size, dtype=self._dtype, device=self._device)
        return held[:size].view(shape)

    def widened(self, buffer: Buffer, tensor: Tensor) -> Tensor:
        """Return numbers in their `summation_dtype`: those of half its size are copied to a buffer."""
        return tensor if tensor.dtype == self._dtype else self.take(buffer, *tensor.shape).copy_(tensor)

    def release(self) -> None:
        """Give the memory of all buffers back."""
        self._buffers.clear()


@dataclass(frozen=True)
class Cost:
    """The cost of multiplying the gradients of two examples; that of vectors is negligible.

    Attributes:
        dense_numel: Numbers in an example's gradient of one logit, if it is formed; else 0.
        gram_flops_per_position_pair: Floating-point operations for each pair of positions, if it is not formed.
    """

    dense_numel: int = 0
    gram_flops_per_position_pair: float = 0.0


class Layer(ABC):
    """One module's contribution to the kernel.

    Args:
        module: The module.
        parameter_names: Which of its own parameters gradients are taken over: ``"weight"``, ``"bias"``.
        tuning: Chooses between ways to multiply.
    """

    parameters: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})
    """The module's own parameters that the class can differentiate."""

    separable: ClassVar[bool] = False
    """Whether `kernel_parts` returns the contributions of several parameters apart."""

    def __init__(self, module: nn.Module, parameter_names: frozenset[str], tuning: Tuning = DEFAULT_TUNING) -> None:
        self.module = module
        self.parameter_names = parameter_names
        self.tuning = tuning

    @staticmethod
    def select_input(arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Select the module input passed to `factors`; by default the first positional argument."""
        return arguments[0] if arguments else None

    @abstractmethod
    def factors(self, inputs: Tensor, gradients: Gradients) -> Any:
        """Return what the products of a batch's gradients need.

        Args:
            inputs: The module's input, ``[B, L, d]``, or indices ``[B, L]``.
            gradients: The gradient of each logit at the module's output.
        """

    def cost(self, factors: Any, train: int, x: int, signed: bool) -> Cost:
        """Return the cost of multiplying the gradients of examples like one.

        Args:
            factors: The factors of a batch of one example.
            train: Train examples in a tile.
            x: X examples in a tile.
            signed: Whether signs of gradients are taken.
        """
        return Cost()

    def buffer(self, factors: Any, train: int) -> int:
        """Return the best size of the largest buffer, in numbers, for so many train examples; 0 if none is needed."""
        return 0

    def sign_bytes(self, factors: Any) -> int:
        """Return the bytes of what `signs` keeps of a batch in place of its factors; 0 if it keeps the factors."""
        return 0

    def signs(self, factors: Any, workspace: Workspace) -> Any:
        """Return what is needed of a batch where only the signs of all gradients count; `kernel` takes it as factors.

        Args:
            factors: The factors of the batch, or what this has returned.
            workspace: Buffers that are overwritten.
        """
        return factors

    def join_signs(self, batches: Sequence[Any], workspace: Workspace) -> Sequence[Any]:
        """Return what `signs` kept of several batches as fewer, larger ones, which are multiplied by many X tiles.

        Args:
            batches: What was kept of each batch.
            workspace: Buffers that are overwritten.
        """
        return batches

    @abstractmethod
    def kernel(
        self, train: Sequence[Any], x: Sequence[Any], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Return this module's contribution to a tile.

        Args:
            train: The factors of the train tile's batches.
            x: The factors of the X tile's batches.
            directions: Which side takes the sign, for each of the D results.
            workspace: Buffers that are overwritten.

        Returns:
            float64 ``[D, n, C, x, C]``.
        """

    def kernel_parts(
        self, train: Sequence[Any], x: Sequence[Any], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> dict[str, Tensor]:
        """Return the contribution of each of the module's parameters to a tile, by `parameter_names`.

        Args:
            train: As for `kernel`.
            x: As for `kernel`.
            directions: As for `kernel`.
            workspace: As for `kernel`.

        Returns:
            float64 ``[D, n, C, x, C]`` each; they sum to `kernel`.
        """
        (only,) = self.parameter_names
        return {only: self.kernel(train, x, directions, workspace)}

    def diagonal(self, x: Sequence[Any], directions: Sequence[SignPlacement], workspace: Workspace) -> Tensor:
        """Return this module's contribution to K(x, x) of the examples of an X tile, after `kernel` of it if any.

        By default it multiplies all pairs of these examples, which is right and takes more time than needed.

        Args:
            x: The factors of the X tile's batches.
            directions: Which side takes the sign, for each of the D results.
            workspace: Buffers that are overwritten.

        Returns:
            float64 ``[D, x, C, C]``.
        """
        pairs = self.kernel(x, x, directions, workspace)
        return pairs.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [D, C, C, x] -> [D, x, C, C]


def stack_vectors(gradients: Gradients, scale: Tensor | None = None) -> Tensor:
    """Sum output gradients over positions, each first multiplied by `scale`: ``[B, C, d]``, of bfloat16 in float32."""
    wide = map(widened, gradients)
    return torch.stack([with_positions(g if scale is None else g * scale).sum(dim=1) for g in wide], dim=1)


def with_positions(tensor: Tensor) -> Tensor:
    """Reshape ``[B, d]`` to ``[B, 1, d]``, and ``[B, ..., d]`` to ``[B, L, d]``."""
    return tensor[:, None] if tensor.dim() == 2 else tensor.flatten(1, -2)


def vector_kernel(train: Sequence[Tensor], x: Sequence[Tensor], directions: Sequence[SignPlacement]) -> Tensor:
    """Multiply whole gradients of small parameters, ``[B, C, p]`` a batch; returns float64 ``[D, n, C, x, C]``."""
    left = _joined(train)
    same = len(train) == len(x) and all(one is other for one, other in zip(train, x, strict=True))
    right = left if same else _joined(x)
    rows = left.flatten(0, 1)
    # einsum("iap,jbp->iajb") for each direction.
    product = contract(rows, rows if same else right.flatten(0, 1), directions)
    return product.unflatten(2, right.shape[:2]).unflatten(1, left.shape[:2])


def _joined(batches: Sequence[Tensor]) -> Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(list(batches))
