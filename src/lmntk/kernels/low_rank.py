"""LoRA adapters that are not there yet: the gradients that they would have at their start, from those of the weight.

An adapter (Hu et al. 2021, "LoRA", section 4.1) computes with ``W + (α/r) B A`` in place of W ``[d_out, d_in]``, where
A is ``[r, d_in]`` and B ``[d_out, r]`` begins at zero. At the start ∂f/∂A = (α/r) Bᵀ ∂f/∂W = 0 and

    ∂f/∂B = (α/r) ∂f/∂W Aᵀ = (α/r) Gᵀ (X Aᵀ)

for a weight whose inputs are X ``[L, d_in]`` and whose output gradients are G ``[L, d_out]``: G and X Aᵀ are factors.
"""

from dataclasses import dataclass

from torch import Tensor

from lmntk.kernels.contraction import widened
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning


@dataclass(frozen=True, eq=False)
class LowRankAdapter:
    """An adapter of one weight, at its start.

    Attributes:
        a: A, ``[r, d_in]``, in the weight's dtype and on its device.
        scale: α/r.
        transposed: Whether the module stores its weight as ``[d_in, d_out]``, as GPT-2's `Conv1D` does.
    """

    a: Tensor
    scale: float
    transposed: bool = False

    def factors(self, of_weight: OuterProducts) -> OuterProducts:
        """Return the factors of the gradients of B, from those of the weight's gradients."""
        assert of_weight.inputs is not None
        inputs = widened(of_weight.inputs) @ widened(self.scale * self.a).T
        return OuterProducts(inputs, of_weight.gradients, None)

    def gradients(self, of_weight: Tensor) -> Tensor:
        """Return the gradients of B, ``[n, d_out · r]``, from those of the weight as it is stored, ``[n, p]``."""
        d_in = self.a.shape[1]
        weight = of_weight.unflatten(1, (d_in, -1)).mT if self.transposed else of_weight.unflatten(1, (-1, d_in))
        return (widened(weight) @ widened(self.scale * self.a).T).flatten(1)


class LowRankLayer(LinearLayer):
    """The layer of an adapter's B, whose factors come from those of the weight's layer and not from a module.

    Args:
        layer: The weight's layer.
        adapter: The adapter.
        tuning: Chooses between ways to multiply.
    """

    def __init__(self, layer: LinearLayer, adapter: LowRankAdapter, tuning: Tuning = DEFAULT_TUNING) -> None:
        super().__init__(layer.module, frozenset({"weight"}), tuning)
        self.adapter = adapter
