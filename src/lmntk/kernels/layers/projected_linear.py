"""Linear layers whose weight gradients are projected as soon as a batch is propagated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmntk.kernels.contraction import contract_each, summation_dtype, widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Cost, Gradients, Layer, Workspace, stack_vectors, vector_kernel, with_positions
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.projection import Projection, Side


@dataclass(frozen=True)
class ProjectedGradients:
    """The gradients of a batch.

    Attributes:
        weights: Those of the weight, projected, ``[B, C, k · k']``.
        biases: Those of the bias, whole, ``[B, C, d_out]``; None if gradients are not taken over it.
    """

    weights: Tensor
    biases: Tensor | None


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

    def factors(self, inputs: Tensor, gradients: Gradients) -> ProjectedGradients:
        """Project both factors of the weight's gradients and multiply them; sum those of the bias."""
        gradients = [with_positions(gradient) for gradient in gradients]
        right = _projected(with_positions(inputs), self._input_matrix)
        weights = right.new_empty(len(right), len(gradients), self._size)
        for logit, gradient in enumerate(gradients):
            left = _projected(gradient, self._output_matrix)
            weights[:, logit] = torch.bmm(left.transpose(1, 2), right).flatten(1)
        return ProjectedGradients(weights, stack_vectors(gradients) if "bias" in self.parameter_names else None)

    def cost(self, factors: ProjectedGradients, train: int, x: int, signed: bool) -> Cost:
        """Return the numbers of a projected gradient, which are multiplied for every pair of examples."""
        return Cost(dense_numel=self._size)

    def join(self, batches: Sequence[ProjectedGradients]) -> list[ProjectedGradients]:
        """Return the batches of a tile as one."""
        biases = [batch.biases for batch in batches if batch.biases is not None]
        return [ProjectedGradients(torch.cat([b.weights for b in batches]), torch.cat(biases) if biases else None)]

    def kernel(
        self,
        train: Sequence[ProjectedGradients],
        x: Sequence[ProjectedGradients],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply projected gradients, and those of the bias: float64 ``[D, n, C, x, C]``."""
        return sum(self.kernel_parts(train, x, directions, workspace).values(), start=torch.zeros(()))

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


def _projected(factors: Tensor, matrix: Tensor | None) -> Tensor:
    """Return ``[B, L, k]`` of ``[B, L, d]``."""
    return widened(factors) if matrix is None else widened(factors) @ matrix


def _weights(batches: Sequence[ProjectedGradients]) -> list[Tensor]:
    return [batch.weights for batch in batches]


def _biases(batches: Sequence[ProjectedGradients]) -> list[Tensor]:
    return [batch.biases for batch in batches if batch.biases is not None]
