"""LayerNorm and RMSNorm: gradients are vectors, small enough to be kept whole."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract_each, widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Gradients, Layer, Workspace, stack_vectors, vector_kernel


class LayerNormLayer(Layer):
    """``y = x̂ · w + b`` with x̂ the normalised input: ∂w = Σ_l G_l · x̂_l and ∂b = Σ_l G_l."""

    module: nn.LayerNorm
    separable = True

    def factors(self, inputs: Tensor, gradients: Gradients) -> Tensor:
        """Return the gradients of the layer's parameters, concatenated: ``[B, C, p]``."""
        vectors = []
        if "weight" in self.parameter_names:
            vectors.append(stack_vectors(gradients, self._normalised(widened(inputs))))
        if "bias" in self.parameter_names:
            vectors.append(stack_vectors(gradients))
        return torch.cat(vectors, dim=2)

    def kernel(
        self, train: Sequence[Tensor], x: Sequence[Tensor], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Multiply the vectors: float64 ``[D, n, C, x, C]``."""
        return vector_kernel(train, x, directions)

    def kernel_parts(
        self, train: Sequence[Tensor], x: Sequence[Tensor], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> dict[str, Tensor]:
        """Multiply the vectors of the weight, and those of the bias: float64 ``[D, n, C, x, C]`` each."""
        names = [name for name in ("weight", "bias") if name in self.parameter_names]
        sizes = [getattr(self.module, name).numel() for name in names]
        left, right = ([batch.split(sizes, dim=2) for batch in side] for side in (train, x))
        return {
            name: vector_kernel([batch[place] for batch in left], [batch[place] for batch in right], directions)
            for place, name in enumerate(names)
        }

    def diagonal(self, x: Sequence[Tensor], directions: Sequence[SignPlacement], workspace: Workspace) -> Tensor:
        """Multiply each example's vectors: float64 ``[D, x, C, C]``."""
        return contract_each(torch.cat(list(x)), directions)

    def _normalised(self, inputs: Tensor) -> Tensor:
        return nn.functional.layer_norm(inputs, self.module.normalized_shape, eps=self.module.eps)


class RMSNormLayer(LayerNormLayer):
    """``y = w · x / rms(x)``."""

    parameters = frozenset({"weight"})

    def _normalised(self, inputs: Tensor) -> Tensor:
        return nn.functional.rms_norm(inputs, inputs.shape[-1:], eps=self.module.eps)
