"""Linear layers whose weight gradients are projected as soon as a batch is propagated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from lmntk.kernels.contraction import contract_each, summation_dtype
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Cost, Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.projection import Projection, Side, projected


@dataclass(frozen=True)
class ProjectedGradients:
    """The gradients of a batch.

    Attributes:
        weights: Those of the weight, projected, ``[B, C, k · k']``.
        biases: Those of the bias, whole, ``[B, C, d_out]``; None if gradients are not taken over it.
    """

    weights: Tensor
    biases: Tensor | None


class ProjectedTile(Sequence[ProjectedGradients]):
    """The gradients of a tile, as one batch in memory that is taken at once: each batch is copied to its place.

    Small tensors that stay between a batch's activations would keep the memory of these from being used again.

    Args:
        size: The number of examples.
    """

    def __init__(self, size: int) -> None:
        self._size, self._filled = size, 0
        self._whole: ProjectedGradients | None = None
        self._found: ProjectedGradients | None = None

    def append(self, batch: ProjectedGradients) -> None:
        """Copy the gradients of the next examples."""
        if self._whole is None:
            biases = None if batch.biases is None else self._room_for(batch.biases)
            self._whole = ProjectedGradients(self._room_for(batch.weights), biases)
        place = slice(self._filled, self._filled + len(batch.weights))
        self._whole.weights[place] = batch.weights
        if self._whole.biases is not None and batch.biases is not None:
            self._whole.biases[place] = batch.biases
        self._filled, self._found = place.stop, None

    def __len__(self) -> int:
        return 0 if self._whole is None else 1

    @overload
    def __getitem__(self, index: int) -> ProjectedGradients: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ProjectedGradients]: ...

    def __getitem__(self, index: int | slice) -> ProjectedGradients | Sequence[ProjectedGradients]:
        if self._found is None and self._whole is not None:
            whole, size = self._whole, self._filled
            self._found = ProjectedGradients(
                whole.weights[:size], None if whole.biases is None else whole.biases[:size]
            )
        return ([] if self._found is None else [self._found])[index]

    def _room_for(self, batch: Tensor) -> Tensor:
        return batch.new_empty(self._size, *batch.shape[1:])


class ProjectedLinear(Layer):
    """A linear layer of which only the projections of the weight's gradients are kept; those of the bias are exact.

    Args:
        exact: The layer, with its weight among the parameters.
        name: Its name, on which the projection depends.
        d_out: The length of an output.
        d_in: The length of an input.
        projection: Gives the random matrices of both sides.
    """

    separable = True

    def __init__(self, exact: LinearLayer, name: str, d_out: int, d_in: int, projection: Projection) -> None:
        super().__init__(exact.module, exact.parameter_names, exact.tuning)
        self._size = projection.projected_size(d_out, d_in)
        weight = exact.module.get_parameter("weight")
        self._output_matrix, self._input_matrix = (
            None if matrix is None else matrix.to(weight.device, summation_dtype(weight.dtype))
            for matrix in (projection.matrix(name, Side.OUTPUT, d_out), projection.matrix(name, Side.INPUT, d_in))
        )

    @property
    def matrix_bytes(self) -> int:
        """The bytes of the random matrices."""
        return sum(matrix.nbytes for matrix in (self._output_matrix, self._input_matrix) if matrix is not None)

    def factors(self, inputs: Tensor, gradients: Gradients) -> ProjectedGradients:
        """Project both factors of the weight's gradients and multiply them; sum those of the bias."""
        gradients = [with_positions(gradient) for gradient in gradients]
        right = projected(with_positions(inputs), self._input_matrix)
        weights = right.new_empty(len(right), len(gradients), self._size)
        for logit, gradient in enumerate(gradients):
            left = projected(gradient, self._output_matrix)
            weights[:, logit] = torch.bmm(left.transpose(1, 2), right).flatten(1)
        return ProjectedGradients(weights, stack_vectors(gradients) if "bias" in self.parameter_names else None)

    def cost(self, factors: ProjectedGradients, train: int, x: int, signed: bool) -> Cost:
        """Return the numbers of a projected gradient, which are multiplied for every pair of examples."""
        return Cost(dense_numel=self._size)

    def kernel(
        self,
        train: Sequence[ProjectedGradients],
        x: Sequence[ProjectedGradients],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply projected gradients, and those of the bias: float64 ``[D, n, C, x, C]``."""
        parts = self.kernel_parts(train, x, directions, workspace)
        return parts["weight"].add_(parts["bias"]) if "bias" in parts else parts["weight"]

    def kernel_parts(
        self,
        train: Sequence[ProjectedGradients],
        x: Sequence[ProjectedGradients],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> dict[str, Tensor]:
        """Multiply the projected gradients of the weight, and those of the bias: float64 ``[D, n, C, x, C]`` each."""
        with workspace.timer.stage("contraction"):
            found = {"weight": vector_kernel(_weights(train), _weights(x), directions)}
            if "bias" in self.parameter_names:
                found["bias"] = vector_kernel(_biases(train), _biases(x), directions)
        return found

    def diagonal(
        self, x: Sequence[ProjectedGradients], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Multiply each example's projected gradients, and those of the bias: float64 ``[D, x, C, C]``."""
        found = contract_each(torch.cat(_weights(x)), directions)
        return found + contract_each(torch.cat(_biases(x)), directions) if "bias" in self.parameter_names else found


def _weights(batches: Sequence[ProjectedGradients]) -> list[Tensor]:
    return [batch.weights for batch in batches]


def _biases(batches: Sequence[ProjectedGradients]) -> list[Tensor]:
    return [batch.biases for batch in batches if batch.biases is not None]
