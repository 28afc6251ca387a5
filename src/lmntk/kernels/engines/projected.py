"""The `projected` engine: an unbiased estimate of the kernel of many examples, from random projections of gradients.

It propagates as the `factored` engine does, and keeps of a linear layer's weight the projection of each gradient to
k × k numbers, see `lmntk.kernels.projection`. Embeddings, norms and biases are exact, and so are weights whose
gradients have a single position, as those after the last layer's attention: their products cost next to nothing.

* Time: (1 + C) passes over N + X examples, and k² numbers in place of d_out · d_in for each weight and pair.
* Memory: k² · C numbers for each weight and example, whatever the number of tokens.
* The kernel is an inner product of features, positive semidefinite, and the mean over seeds is the exact kernel. Its
  error falls as 1 / k; `lmntk.kernels.projection_check` measures it.
* Never chosen by itself: the numbers are estimates.
"""

import math
from dataclasses import replace
from typing import Any

from lmntk.kernels import capture
from lmntk.kernels.batching import Examples
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.engines.factored_planner import KeptDemands, LayerDemands, num_bytes, tokens_of
from lmntk.kernels.layers import Layer
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.layers.projected_linear import ProjectedLinear, ProjectedTile
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import Plan

# The block of a tile, a layer's products and those of its bias, both float64, and products that are being added.
COPIES_OF_A_BLOCK, BYTES_OF_A_PRODUCT = 4, 8


class ProjectedEngine(FactoredEngine):
    """Structured derivatives whose largest ones are projected; it needs `KernelProblem.projection`."""

    name = "projected"

    def _layers_to_keep(self, found: dict[str, Layer]) -> dict[str, Layer]:
        problem = self.problem
        if problem.projection is None:
            raise ValueError("the projected engine needs `KernelProblem.projection`: its width and seed")
        if problem.formula.signed:
            raise ValueError("a projection does not keep the signs of gradients: the projected engine is for sgd")
        if problem.low_rank:
            raise ValueError("a projection does not keep what the kernels of adapters need")
        typical = problem.train.batch([problem.typical_example])
        factors = capture.factors(found, self._model, typical, signed=False).of_layer if found else {}
        self._propagated_bytes = num_bytes(list(factors.values()))
        return {
            name: projected_layer(layer, name, factors.get(name), problem.projection) or layer
            for name, layer in found.items()
        }

    @property
    def exact_layers(self) -> dict[str, Layer]:
        """The layers by module name, as they are without a projection."""
        return self._found

    def summary(self, plan: Plan) -> str:
        """Return the engine's name, the width and seed, and how many weights are projected."""
        projection, layers = self.problem.projection, self._layers.values()
        assert projection is not None
        weights = [layer for layer in self._found.values() if isinstance(layer, LinearLayer)]
        number = sum(isinstance(layer, ProjectedLinear) for layer in layers)
        what = "an estimate" if number else "exact here"
        return (
            f"{super().summary(plan)} of width {projection.width} and seed {projection.seed}, {what} "
            f"({number} of {len(weights)} weights are projected)"
        )

    def _collection(self, name: str, size: int) -> Any:
        return (
            ProjectedTile(size) if isinstance(self._layer(name), ProjectedLinear) else super()._collection(name, size)
        )

    def _measure_demands(self) -> LayerDemands:
        """Measure what is kept of two examples, and take what their propagation needs from the exact factors."""
        problem, typical = self.problem, self.problem.typical_example
        demands = super()._measure_demands()
        side = max((problem.train, problem.x_examples), key=lambda examples: max(examples.shapes))
        (tokens,), (most,) = tokens_of(problem.train, [typical]), tokens_of(side, [longest := _longest(side)])
        projected, others = self._bytes_kept(problem.train, typical)
        # Embeddings keep rows for each token; norms, biases and weights at one position keep as much for any length.
        per_token = (self._bytes_kept(side, longest)[1] - others) / (most - tokens) if most > tokens else 0.0
        per_token = min(max(per_token, 0.0), others / tokens)
        layers = [layer for layer in self._layers.values() if isinstance(layer, ProjectedLinear)]
        return replace(
            demands,
            per_token=max(1, -(-self._propagated_bytes // tokens)),
            kept=KeptDemands(
                per_example=projected + math.ceil(others - per_token * tokens),
                per_token=math.ceil(per_token),
                optional=False,
            ),
            fixed_bytes=sum(layer.matrix_bytes for layer in layers),
            pair_bytes=COPIES_OF_A_BLOCK * BYTES_OF_A_PRODUCT * problem.num_logits**2,
        )

    def _bytes_kept(self, examples: Examples, index: int) -> tuple[int, int]:
        """Return the bytes of an example's projections, and of what else is kept of it."""
        kept = self._propagate(examples, [index], self.tuning.batch_tokens).of_layer
        sizes = {name: num_bytes(list(batches)) for name, batches in kept.items()}
        projected = sum(size for name, size in sizes.items() if isinstance(self._layer(name), ProjectedLinear))
        return projected, sum(sizes.values()) - projected


def _longest(examples: Examples) -> int:
    return max(range(len(examples)), key=lambda index: examples.shapes[index])


def projected_layer(layer: Layer, name: str, factors: Any, projection: Projection) -> ProjectedLinear | None:
    """Return the projected form of a layer; None if it stays exact.

    Args:
        layer: The layer.
        name: Its name.
        factors: Its factors of a typical train example.
        projection: The width and the seed.
    """
    if not isinstance(layer, LinearLayer) or not isinstance(factors, OuterProducts) or factors.inputs is None:
        return None
    d_out, d_in = factors.out_features, factors.inputs.shape[2]
    if factors.positions <= 1 or projection.projected_size(d_out, d_in) >= d_out * d_in:
        return None
    return ProjectedLinear(layer, name, d_out, d_in, projection)
