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
* parameters of modules that no layer type knows: the same projections of gradients that autograd forms. So are, for a
  batch that uses a layer in another way than the examples by which it was checked, the parameters of that layer.

All columns may be hashed further to a chosen number, which has no bias either.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels import capture
from lmntk.kernels.batching import Examples, equal_shape_batches
from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.engines.derivatives import Differentiator
from lmntk.kernels.engines.factored_planner import num_bytes, tokens_of
from lmntk.kernels.engines.layer_selection import find_layers
from lmntk.kernels.feature_columns import KNOWN, Buckets, Columns, ParameterColumns, columns_of, columns_of_gradients
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
        projection: The same.
        parts: The columns of each parameter.
        dimension: d, the number of columns.
        num_columns: The number before all columns were hashed, or d.
        bytes_per_token: The inputs and gradients that are held of a token while a batch is projected.

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
        self._layers = {name: layer for name, layer in found.items() if isinstance(layer, KNOWN)}
        self._used = self._used_rows()
        self._differentiator = Differentiator(problem.model.logits_fn)
        self._asked_dimension = dimension
        self._draw(projection)

    def redrawn(self, projection: Projection) -> "FeatureMap":
        """Return the map of another width or seed, whose layers need no other check.

        Raises:
            ValueError: A gradient cannot be projected.
        """
        other = copy.copy(self)
        other._draw(projection)
        return other

    def _draw(self, projection: Projection) -> None:
        """Draw the random matrices, and lay out the columns."""
        problem, self.projection = self._problem, projection
        typical = self._factors(self._layers, problem.typical_example)
        self.bytes_per_token = (
            num_bytes(list(typical.values())) // tokens_of(problem.train, [problem.typical_example])[0]
        )
        self._columns: dict[str, Columns] = {
            name: columns_of(layer, name, typical[name], self._used.get(name, 0), projection, self._like)
            for name, layer in self._layers.items()
        }
        of_layers = {name: own for columns in self._columns.values() for name, own in columns.items()}
        self._fallback = {
            name: self._fallback_columns(name, projection) for name in problem.params if name not in of_layers
        }
        self._of_parameter: dict[str, ParameterColumns] = of_layers | self._fallback
        sizes = {name: own.size for name, own in self._of_parameter.items()}
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        own = [Part(name, *places) for name, *places in zip(sizes, ends, ends[1:], strict=False)]
        self._part_of, self.num_columns = {part.name: part for part in own}, ends[-1]
        total, dimension = self.num_columns, self._asked_dimension
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
        return sum(self._problem.params[name].numel() for name in self._fallback)

    def features(self, examples: Examples, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the features ``[B, C, d]`` of examples that go into one batch, and their logits ``[B, C]``.

        Args:
            examples: The examples of a split.
            indices: B of them.

        Raises:
            ValueError: Examples use a table of embeddings, of which the model as a function has some rows only, in
                another way than those by which it was checked.
        """
        captured = capture.forward_backward(self._layers, self._model, examples.batch(indices))
        dtype = summation_dtype(self._like.dtype)
        found = torch.empty(*captured.logits.shape, self.num_columns, dtype=dtype, device=captured.logits.device)
        for name in list(captured.gradients):
            factors = self._layers[name].factors(captured.inputs[name], captured.gradients.pop(name))
            for parameter, columns in self._columns[name].items():
                assert columns.of_factors is not None
                self._place(found, parameter)[:] = columns.of_factors(factors)
        by_autograd = [*self._fallback, *(name for layer in captured.irregular for name in self._columns[layer])]
        if by_autograd:
            self._add_gradients(found, by_autograd, examples, indices)
        logits = captured.logits.detach()
        return (found if self._buckets is None else self._buckets.sums(found)), logits

    def _place(self, found: Tensor, parameter: str) -> Tensor:
        """Return the columns of a parameter, a view."""
        part = self._part_of[parameter]
        return found[:, :, part.start : part.stop]

    def _add_gradients(self, found: Tensor, names: Collection[str], examples: Examples, indices: Sequence[int]) -> None:
        """Fill the columns of some parameters from the gradients that autograd forms of them."""
        for name in names:
            self._check_rows(name)
        params = {name: self._problem.params[name] for name in names}
        fixed = {name: tensor for name, tensor in self._problem.params.items() if name not in params}
        start = 0
        for batch in equal_shape_batches(examples, indices, self._tuning.jacobian_batch):
            jacobian = self._differentiator.jacobian(params, examples.batch(batch), fixed)
            stop = start + len(batch)
            for name, gradients in jacobian.items():
                self._place(found[start:stop], name)[:] = self._of_parameter[name].of_gradients(gradients)
            start = stop

    def _fallback_columns(self, name: str, projection: Projection) -> ParameterColumns:
        """Return the columns of a parameter that no layer type knows."""
        self._check_rows(name)
        return columns_of_gradients(name, self._problem.params[name].shape, projection, self._like)

    def _check_rows(self, name: str) -> None:
        """Refuse gradients of a parameter of which the function of the model takes the rows of some tokens only."""
        partial = self._model.partial_rows
        if partial is not None and name in partial.names:
            raise ValueError(
                f"{name} is used in a way that no layer type knows, and has a row for each token: leave it out of the "
                "parameters, or compute a kernel"
            )
