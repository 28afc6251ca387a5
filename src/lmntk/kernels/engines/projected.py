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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmntk.kernels import capture
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.engines.factored_planner import KeptDemands, LayerDemands, num_bytes, tokens_of
from lmntk.kernels.layers import Layer
from lmntk.kernels.layers.linear import LinearLayer
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.layers.projected_linear import ProjectedLinear
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import Plan


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
        return (
            f"{super().summary(plan)} of width {projection.width} and seed {projection.seed}, an estimate "
            f"({number} of {len(weights)} weights are projected)"
        )

    def _joined(self, factors: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        joined: dict[str, Sequence[Any]] = {}
        for name in list(factors):
            layer, batches = self._layer(name), factors.pop(name)
            joined[name] = layer.join(batches) if isinstance(layer, ProjectedLinear) and batches else batches
        return joined

    def _measure_demands(self) -> LayerDemands:
        """Measure what is kept of a typical example, and take what its propagation needs from the exact factors."""
        problem, one = self.problem, [self.problem.typical_example]
        demands = super()._measure_demands()
        tokens = tokens_of(problem.train, one)[0]
        kept = self._propagate(problem.train, one, self.tuning.batch_tokens).of_layer
        projected = {n: num_bytes(b) for n, b in kept.items() if isinstance(self._layer(n), ProjectedLinear)}
        others = num_bytes([batch for name, batches in kept.items() if name not in projected for batch in batches])
        return replace(
            demands,
            per_token=max(1, -(-self._propagated_bytes // tokens)),
            kept=KeptDemands(
                per_example=sum(projected.values()),
                per_token=-(-others // tokens),
                largest=max(projected.values(), default=0),
                optional=False,
            ),
        )


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
