"""Random projections of linear layers' gradients, by which a kernel is estimated without bias and at less cost.

The gradient of a weight is GᵀA, ``[d_out, d_in]``. With matrices R₁, ``[d_out, k]``, and R₂, ``[d_in, k]``, such that
E R Rᵀ = I, its projection is R₁ᵀGᵀA R₂ = (G R₁)ᵀ(A R₂), and the inner product of two projections has the expectation
of that of the two gradients. The matrices depend on the seed, the layer and the side alone, so that a kernel of any
examples is an inner product of their features: positive semidefinite, and one with any other kernel of the same seed.

Source: two-sided projections of a layer's factors are those of Choe et al. 2024 ("What is Your Data Worth to GPT?",
section 3); random matrices with orthogonal columns estimate inner products with less variance than independent numbers
(Choromanski et al. 2017, "The Unreasonable Effectiveness of Structured Random Orthogonal Embeddings").
"""

import hashlib
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from lmntk.kernels.contraction import widened

DEFAULT_WIDTH = 64


def projected(factors: Tensor, matrix: Tensor | None) -> Tensor:
    """Return ``[..., k]`` of numbers ``[..., d]`` and R, ``[d, k]``, or the numbers themselves where R is None.

    The dtype is that in which sums are taken, see `lmntk.kernels.contraction.summation_dtype`.
    """
    return widened(factors) if matrix is None else widened(factors) @ matrix


class Side(Enum):
    """The side of a weight that is projected."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True)
class Projection:
    """How linear layers' gradients are projected.

    Attributes:
        width: k, the numbers that are left of each side of a weight.
        seed: The seed of the matrices.
    """

    width: int = DEFAULT_WIDTH
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the width."""
        if self.width < 1:
            raise ValueError(f"a projection of width {self.width} keeps nothing: take a width of 1 or more")

    def projected_size(self, d_out: int, d_in: int) -> int:
        """Return how many numbers are left of a weight's gradient."""
        return min(self.width, d_out) * min(self.width, d_in)

    def matrix(self, layer: str, side: Side, size: int) -> Tensor | None:
        """Return R, float64 ``[size, k]`` on the CPU, with RᵀR = size / k · I; None where k is not below the size.

        R spans a uniformly distributed random subspace: an orthonormal basis of the columns of independent normal
        numbers, times √(size / k), for which E R Rᵀ = I.

        Args:
            layer: The name of the layer.
            side: The side of its weight.
            size: d_out or d_in.
        """
        if size <= self.width:
            return None
        generator = self.generator(f"{side.value}/{layer}")
        numbers = torch.randn(size, self.width, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(numbers).Q * (size / self.width) ** 0.5

    def generator(self, name: str) -> torch.Generator:
        """Return a generator that depends on the seed and a name alone."""
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "big", signed=True)
        return torch.Generator().manual_seed(seed)
