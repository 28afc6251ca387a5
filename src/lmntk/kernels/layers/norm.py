"""LayerNorm and RMSNorm: gradients are vectors, small enough to be kept whole."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Gradients, Layer, Workspace, stack_vectors, vector_kernel


class LayerNormLayer(Layer):
    """``y = x̂ · w + b`` with x̂ the normalised input: ∂w = Σ_l G_l · x̂_l and ∂b = Σ_l G_l."""

    module: nn.LayerNorm

    def factors(self, inputs: Tensor, gradients: Gradients) -> Tensor:
        """Return the gradients of the layer's parameters, concatenated: ``[B, C, p]``."""
        vectors = []
        if "weight" in self.parameter_names:
            vectors.append(stack_vectors(gradients, self._normalised(inputs)))
        if "bias" in self.parameter_names:
            vectors.append(stack_vectors(gradients))
        return torch.cat(vectors, dim=2)

    def kernel(
        self, train: Sequence[Tensor], x: Sequence[Tensor], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Multiply the vectors: float64 ``[D, n, C, x, C]``."""
        return vector_kernel(train, x, directions)

    def _normalised(self, inputs: Tensor) -> Tensor:
        return nn.functional.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


class RMSNormLayer(LayerNormLayer):
    """``y = w · x / rms(x)``."""

    parameters = frozenset({"weight"})

    def _normalised(self, inputs: Tensor) -> Tensor:
        return nn.functional.rms_norm(inputs, inputs.shape[-1:], eps=self.module.eps)
