"""Features of examples whose inner products estimate the kernel without bias: projected gradients of all parameters.

With φ_a(x), ``[d]``, the features of logit a of an example, E ⟨φ_a(x), φ_b(y)⟩ = K(x, y)_ab over seeds. A parameter has
columns of its own, of which none depends on other examples:

* the weight of a linear layer: the two-sided projection of `lmntk.kernels.projection` to k · k numbers, that of the
  `projected` engine. Weights whose gradients have a single position keep 2k · 2k: there are few of them, near the end.
* embeddings: a row's gradient counts to one of 2k buckets, with a random sign that each row has of its own, and is
  projected to 2k numbers, so that no random matrix of the vocabulary's size is ever held: feature hashing (Weinberger
  et al. 2009, "Feature Hashing for Large Scale Multitask Learning"), whose inner products have no bias.
* weights of few rows or columns, as of the label words: more of the other side, see `feature_columns.kept_sides`.
* vectors, such as biases and the scales of norms: 4k numbers at most.
* parameters of modules that no layer type knows: the same projections of gradients that autograd forms.

All columns may be hashed further to a chosen number, which has no bias either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels import capture
from lmntk.kernels.batching import Examples, equal_shape_batches
from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.engines.derivatives import Differentiator
from lmntk.kernels.engines.layer_selection import find_layers, parameters_of
from lmntk.kernels.feature_columns import KNOWN, Buckets, Columns, Sides, columns_of, kept_sides
from lmntk.kernels.layers import EmbeddingLayer, Layer
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelProblem, ModuleModel
from lmntk.kernels.projection import Projection
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

NUM_PROBES = 12
"""Train examples that show how many rows of an embedding are used."""

ALL_COLUMNS = "all"
"""The name of the only part of features that were hashed to a chosen number."""


@dataclass(frozen=True)
class Part:
    """The columns of a parameter.

    Attributes:
        name: The parameter.
        start: The first column.
        stop: The column after the last one.
    """

    name: str
    start: int
    stop: int


class FeatureMap:
    """Maps examples to features, ``[C, d]``.

    Args:
        problem: The model, its parameters, and train examples by which its layers are checked; no signs.
        projection: The width k of each side of a weight, and the seed.
        budget: The memory of the checks.
        dimension: The number of columns to hash all to; None keeps a part for each parameter.
        tuning: Bounds of batches and checks.

    Attributes:
        parts: The columns of each parameter.
        dimension: d, the number of columns.
        num_columns: The number before all columns were hashed, or d.

    Raises:
        ValueError: The formula takes signs, or the model is not a module, or a gradient cannot be projected.
    """

    def __init__(
        self,
        problem: KernelProblem,
        projection: Projection,
        budget: MemoryBudget,
        dimension: int | None = None,
        tuning: Tuning = DEFAULT_TUNING,
    ) -> None:
        if not isinstance(problem.model, ModuleModel):
            raise ValueError("features need the module, not a function alone")
        if problem.formula.signed:
            raise ValueError("a projection does not keep the signs of gradients: features are for sgd")
        self._problem, self._model, self._tuning = problem, problem.model, tuning
        self._like = next(problem.model.module.parameters())
        found, _ = find_layers(problem, self._model, budget, tuning)
        factors = self._factors(found, problem.typical_example)
        self._layers = {name: layer for name, layer in found.items() if isinstance(layer, KNOWN)}
        used = self._used_rows()
        self._columns: dict[str, Columns] = {
            name: columns_of(layer, name, factors[name], used.get(name, 0), projection, self._like)
            for name, layer in self._layers.items()
        }
        taken = {name for prefix, layer in self._layers.items() for name in parameters_of(prefix, layer)}
        self._others = {name: self._other(name, projection) for name in problem.params if name not in taken}
        self._differentiator = Differentiator(problem.model.logits_fn)
        sizes = {name: size for columns in self._columns.values() for name, (size, _) in columns.items()}
        sizes |= {name: other.size for name, other in self._others.items()}
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        own = [Part(name, *places) for name, *places in zip(sizes, ends, ends[1:], strict=False)]
        self._of_name, self.num_columns = {part.name: part for part in own}, ends[-1]
        total = self.num_columns
        self._buckets: Buckets | None = None
        if dimension is not None and dimension < total:
            self._buckets = Buckets.of_columns(projection, total, dimension).to(self._like.device)
            own, total = [Part(ALL_COLUMNS, 0, dimension)], dimension
        self.parts: tuple[Part, ...] = tuple(own)
        self.dimension: int = total

    def _factors(self, layers: Mapping[str, Layer], example: int) -> dict[str, Any]:
        """Return the factors of a train example in every layer."""
        if not layers:
            return {}
        batch = self._problem.train.batch([example])
        return capture.factors(layers, self._model, batch, signed=False).of_layer

    def _used_rows(self) -> dict[str, int]:
        """Return how many rows of each embedding some train examples use, from the shortest to the longest."""
        train, tables = self._problem.train, {n: la for n, la in self._layers.items() if isinstance(la, EmbeddingLayer)}
        order = sorted(range(len(train)), key=train.shapes.__getitem__)
        count = min(NUM_PROBES, len(order))
        probes = {order[round(number * (len(order) - 1) / max(count - 1, 1))] for number in range(count)}
        rows: dict[str, set[int]] = {name: set() for name in tables}
        for example in sorted(probes):
            for name, factors in self._factors(tables, example).items():
                rows[name].update(token for token in factors.token.flatten().tolist() if token >= 0)
        return {name: len(found) for name, found in rows.items()}

    @property
    def num_fallback_parameters(self) -> int:
        """How many parameters belong to modules that no layer type knows, whose gradients are formed."""
        return sum(self._problem.params[name].numel() for name in self._others)

    def features(self, examples: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the features ``[B, C, d]`` of examples that go into one batch, and their logits ``[B, C]``.

        Args:
            examples: The examples of a split.
            indices: B of them.

        Raises:
            ValueError: The model uses a layer in another way than in the examples by which it was checked.
        """
        captured = capture.forward_backward(self._layers, self._model, examples.batch(indices))
        if captured.irregular:
            which = sorted(captured.irregular)[0]
            raise ValueError(f"some examples use {which} in another way than those that were tried")
        dtype = summation_dtype(self._like.dtype)
        found = torch.empty(*captured.logits.shape, self.num_columns, dtype=dtype, device=captured.logits.device)
        for name in list(captured.gradients):
            factors = self._layers[name].factors(captured.inputs[name], captured.gradients.pop(name))
            for parameter, (_, project) in self._columns[name].items():
                part = self._of_name[parameter]
                found[:, :, part.start : part.stop] = project(factors)
        if self._others:
            self._add_others(found, examples, indices)
        logits = captured.logits.detach()
        return (found if self._buckets is None else self._buckets.sums(found)), logits

    def _add_others(self, found: Tensor, examples: Examples, indices: Sequence[int]) -> None:
        params = {name: self._problem.params[name] for name in self._others}
        fixed = {name: tensor for name, tensor in self._problem.params.items() if name not in params}
        start = 0
        for batch in equal_shape_batches(examples, indices, self._tuning.jacobian_batch):
            jacobian = self._differentiator.jacobian(params, examples.batch(batch), fixed)
            stop = start + len(batch)
            for name, gradients in jacobian.items():
                part, other = self._of_name[name], self._others[name]
                matrices = gradients.reshape(*gradients.shape[:2], other.shape[0], other.shape[1])
                found[start:stop, :, part.start : part.stop] = other.of_gradients(matrices)
            start = stop

    def _other(self, name: str, projection: Projection) -> Sides:
        """Return the projection of a parameter that no layer type knows."""
        partial = self._model.partial_rows
        if partial is not None and name in partial.names:
            raise ValueError(f"{name} is used in a way that no layer type knows, and has a row for each token")
        shape = self._problem.params[name].shape
        if len(shape) < 2:
            return Sides.of_vector(projection, name, shape.numel(), self._like)
        sides = shape[0], shape[1:].numel()
        return Sides(projection, name, sides, kept_sides(projection.width, *sides), self._like)
