"""The `jacobian` engine: per-example Jacobians, contracted by matrix products.

This is Novak et al. 2022's ("Fast Finite Width Neural Tangent Kernel") *Jacobian contraction*: the gradients of a train
tile and of an X tile are formed whole, by `vmap` of `jacrev`, and multiplied.

* Time: C backward passes for each of the N + X examples with small batches, and 2 · P · C² flops for each of the N · X
  pairs (P parameters).
* Memory: P · C numbers for each example of both tiles. A small budget takes the parameters in groups, each of which
  propagates all examples again.
* Used for functions of parameters, and for the parameters of modules that the `factored` engine does not know. It takes
  any model that autograd differentiates.
"""

import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmntk.kernels.batching import Examples, bytes_of, equal_shape_batches
from lmntk.kernels.contraction import (
    broken_rows,
    contract,
    contract_each,
    hide_diagonal_of_broken,
    hide_signs_of_broken,
    summation_dtype,
)
from lmntk.kernels.engines.base import ANY_TILES, ComputedTile, Engine, MemoryBudgetError
from lmntk.kernels.engines.derivatives import Differentiator
from lmntk.kernels.problem import Parameters, PartialRows
from lmntk.kernels.tiling import (
    CostModel,
    Plan,
    Tile,
    TileRequest,
    TileSize,
    even_tile_size,
    make_plan,
    tiles_per_axis,
)
from lmntk.kernels.timing import product_flops, seconds_of


@dataclass(frozen=True)
class Gradients:
    """The gradients of some examples for one group of parameters.

    Attributes:
        of_parameter: The gradients by parameter, ``[n · C, p]``.
        broken: Which of them hold NaN or infinity, bool ``[n, C]``; None if no signs are taken.
    """

    of_parameter: Parameters
    broken: Tensor | None


class JacobianEngine(Engine):
    """Jacobian contraction: takes any model, one group of parameters at a time."""

    name = "jacobian"

    @functools.cached_property
    def _differentiator(self) -> Differentiator:
        return Differentiator(self.problem.model.logits_fn)

    def plan(self, tiles: TileRequest = ANY_TILES, processes: int = 1) -> Plan:
        """Lay tiles over all train examples at once; memory decides on the groups of parameters instead."""
        problem = self.problem
        n, m = len(problem.train), len(problem.x_examples)
        # Forming a gradient costs about a pass over an example's tokens for every logit.
        tokens = self.tuning.mean_tokens if not problem.train.padded else sum(problem.train.shapes) / n
        rows, columns = tiles_per_axis(n, m, processes, problem.symmetric, tokens, problem.num_logits)
        train = min(tiles.row or even_tile_size(n, n, rows), n)
        x = min(tiles.column or even_tile_size(self.tuning.jacobian_x_tile, m, columns), m)
        # A parameter larger than all others (the word embeddings) may force smaller tiles than grouping can give.
        while self._bytes(self._largest_gradient, train, x) > self.budget.bytes and train * x > 1:
            train, x = (train, (x + 1) // 2) if x > 1 else ((train + 1) // 2, x)
        # Each group of parameters forms gradients anew, so that slices must leave most of the memory to these.
        largest = self.tuning.slice_share * self.budget.bytes
        while problem.slice_bytes() * train * (train if problem.symmetric else x) > largest and train * x > 1:
            train, x = (train, (x + 1) // 2) if x > 1 and not problem.symmetric else ((train + 1) // 2, x)
        if self.minimum_bytes > self.budget.bytes:
            raise MemoryBudgetError(self.minimum_bytes, self.budget.bytes)
        return make_plan(problem.train.shapes, problem.x_examples.shapes, TileSize(train, x), problem.symmetric)

    @property
    def minimum_bytes(self) -> int:
        """The smallest budget that works, in bytes: two examples' gradients of the largest parameter."""
        return self._bytes(self._largest_gradient, 1, 1)

    @property
    def _largest_gradient(self) -> int:
        """Bytes of an example's gradients of the largest parameter."""
        return self.problem.num_logits * max(bytes_of([tensor]) for tensor in self.problem.params.values())

    def tiles_of_group(
        self, plan: Plan, group: int, with_diagonal: Container[Tile] = frozenset()
    ) -> Iterator[ComputedTile]:
        """Form a train tile's gradients for one group of parameters, and multiply them with those of its X tiles."""
        names = self._groups(plan)[group]
        for train, x_tiles in plan.tile_rows:
            train_gradients = self._gradients(self.problem.train, train, names)
            for tile in (Tile(train, x) for x in x_tiles):
                yield self._tile(train_gradients, tile, names, tile in with_diagonal)

    def diagonal(self, plan: Plan, x: tuple[int, ...], group: int) -> Tensor:
        """Form the gradients of X examples for one group of parameters, and multiply those of each."""
        names = self._groups(plan)[group]
        return self._diagonal(self._gradients(self.problem.x_examples, x, names), x)

    def expected_bytes(self, plan: Plan) -> int:
        """Return the bytes of the gradients of both tiles and of what `vmap` forms before it is copied."""
        largest = max(bytes_of(self.problem.params[name] for name in group) for group in self._groups(plan))
        return self._bytes(self.problem.num_logits * largest, plan.tile_size.row, plan.tile_size.column)

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Time the gradients of a batch of average size, and count the products."""
        problem = self.problem
        groups = self._groups(plan)
        tiles = [tile.x for tile in plan]
        batches = sum(len(equal_shape_batches(problem.x_examples, x, self.tuning.jacobian_batch)) for x in tiles)
        few = [problem.typical_example] * max(1, round(sum(map(len, tiles)) / max(batches, 1)))
        gradient_seconds = seconds_of(lambda: [self._gradients(problem.train, few, group) for group in groups])
        gradient_seconds /= len(few)
        parameters = sum(tensor.numel() for tensor in problem.params.values())
        weight = next(iter(problem.params.values()))
        flops = 2 * parameters * problem.num_logits**2 * len(problem.formula.directions)
        pair_seconds = flops / product_flops(weight.device, summation_dtype(weight.dtype))

        def tile_seconds(tile: Tile) -> float:
            formed = 0 if self.problem.on_diagonal(tile) else len(tile.x)
            return gradient_seconds * formed + pair_seconds * tile.pairs

        return CostModel(lambda train: gradient_seconds * len(train), tile_seconds)

    def summary(self, plan: Plan) -> str:
        """Return the engine's name, and the number of groups that the parameters are taken in."""
        groups = self.num_parameter_groups(plan)
        return super().summary(plan) + (f" with parameters in {groups} groups" if groups > 1 else "")

    def num_parameter_groups(self, plan: Plan) -> int:
        """Return how many groups the parameters are taken in."""
        return len(self._groups(plan))

    def _bytes(self, per_example: int, train: int, x: int) -> int:
        """Return the bytes of two tiles' gradients, of a batch that `vmap` forms before it is copied, and of slices."""
        gradients = per_example * (train + x + min(self.tuning.jacobian_batch, max(train, x)))
        return gradients + self.problem.slice_bytes() * train * x

    def _groups(self, plan: Plan) -> list[list[str]]:
        """Return groups of parameters whose gradients, of both tiles, fit together."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in self.problem.params.items():
            added = self.problem.num_logits * bytes_of([tensor])
            if groups[-1] and self._bytes(size + added, plan.tile_size.row, plan.tile_size.column) > self.budget.bytes:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += added
        return groups

    def _gradients(self, examples: Examples, indices: Sequence[int], group: list[str]) -> Gradients:
        """Return the gradients of some examples for one group."""
        params = {name: self.problem.params[name] for name in group}
        fixed = {name: tensor for name, tensor in self.problem.params.items() if name not in params}
        rows = len(indices) * self.problem.num_logits
        gradients = {name: tensor.new_empty(rows, tensor.numel()) for name, tensor in params.items()}
        start = 0
        for batch in equal_shape_batches(examples, indices, limit=self.tuning.jacobian_batch):
            jacobian = self._differentiator.jacobian(params, examples.batch(batch), fixed)
            stop = start + len(batch) * self.problem.num_logits
            for name, values in jacobian.items():
                gradients[name][start:stop] = values.reshape(stop - start, -1)
            start = stop
        broken = None
        if self.problem.formula.signed:
            broken = torch.stack([broken_rows(values) for values in gradients.values()]).any(dim=0)
            broken = broken.unflatten(0, (-1, self.problem.num_logits))
        return Gradients(gradients, broken)

    def _tile(self, train_side: Gradients, tile: Tile, group: list[str], with_diagonal: bool) -> ComputedTile:
        same = self.problem.on_diagonal(tile)
        x_side = train_side if same else self._gradients(self.problem.x_examples, tile.x, group)
        block = self._block(train_side, x_side, tile)
        return ComputedTile(tile, block, self._diagonal(x_side, tile.x) if with_diagonal else None)

    def _diagonal(self, side: Gradients, x: tuple[int, ...]) -> Tensor:
        directions, c, partial = (
            self.problem.formula.directions,
            self.problem.num_logits,
            self.problem.model.partial_rows,
        )
        found = [
            self._diagonal_of_all_rows(name, x, partial)
            if partial is not None and name in partial.names
            else contract_each(values.unflatten(0, (-1, c)), directions)
            for name, values in side.of_parameter.items()
        ]
        return hide_diagonal_of_broken(torch.stack(found).sum(dim=0), side.broken)

    def _diagonal_of_all_rows(self, name: str, x: tuple[int, ...], partial: PartialRows) -> Tensor:
        """Return the contribution of a parameter whose gradients were formed for some of its rows only."""
        found = []
        for indices in equal_shape_batches(self.problem.x_examples, x, limit=self.tuning.jacobian_batch):
            batch = self.problem.x_examples.batch(indices)
            logits_fn, params = partial.of_batch(batch)
            own, fixed = {name: params[name]}, {other: params[other] for other in params if other != name}
            values = Differentiator(logits_fn).jacobian(own, batch, fixed)[name].flatten(2)
            broken = ~values.isfinite().all(dim=2) if self.problem.formula.signed else None
            found.append(hide_diagonal_of_broken(contract_each(values, self.problem.formula.directions), broken))
        return torch.cat(found, dim=1)

    def _block(self, train_side: Gradients, x_side: Gradients, tile: Tile) -> Tensor:
        c = self.problem.num_logits
        total = self.problem.sum_by_slice(self._contributions(train_side.of_parameter, x_side.of_parameter))
        block = total.reshape(-1, len(tile.train), c, len(tile.x), c)
        return hide_signs_of_broken(block, train_side.broken, x_side.broken)

    def _contributions(self, train: Parameters, x: Parameters) -> Iterator[tuple[str, Tensor]]:
        """Yield what each parameter, and the adapter of each weight, adds to a slice: float64 ``[D, n · C, x · C]``."""
        directions, adapters = self.problem.formula.directions, self.problem.low_rank or {}
        for name in train:
            yield self.problem.part_name(name), contract(train[name], x[name], directions)
            if name in adapters:
                adapted = adapters[name].gradients
                yield name, contract(adapted(train[name]), adapted(x[name]), directions)
