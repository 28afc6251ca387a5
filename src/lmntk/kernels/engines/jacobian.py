"""The `jacobian` engine: per-example Jacobians, contracted by matrix products. Takes any model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmntk.kernels.batching import Examples, bytes_of, equal_shape_runs
from lmntk.kernels.contraction import broken_rows, contract, hide_signs_of_broken
from lmntk.kernels.engines.base import Engine, MemoryBudgetError
from lmntk.kernels.engines.derivatives import Differentiator
from lmntk.kernels.problem import Block, KernelProblem, Parameters
from lmntk.kernels.tiling import CostModel, Plan, Tile, even_tile_size, make_plan, tiles_per_axis
from lmntk.kernels.timing import product_flops, seconds_of

# X examples whose gradients are held at a time: more gain little, since gradients are formed a few examples at a time.
X_TILE = 32
# Where examples have no lengths.
MEAN_TOKENS = 30
# So many at a time: their Jacobians stand in memory twice, once as `vmap` forms them and once in their place.
FORMED_TOGETHER = 8


@dataclass(frozen=True)
class Gradients:
    """The gradients of some examples for one group of parameters.

    Attributes:
        of: By parameter, ``[n · C, p]``.
        broken: Which rows hold NaN or infinity, bool ``[n, C]``; None where no signs are taken.
    """

    of: Parameters
    broken: Tensor | None


class JacobianEngine(Engine):
    """Gradients of a train tile and of an X tile are formed whole, for one group of parameters at a time."""

    name = "jacobian"

    def __init__(self, problem: KernelProblem, memory_bytes: int) -> None:
        super().__init__(problem, memory_bytes)
        self._differentiator = Differentiator(problem.logits_fn)

    def plan(self, train_tile: int | None = None, x_tile: int | None = None, processes: int = 1) -> Plan:
        """Lay tiles over all train examples at once; memory decides on the groups of parameters instead."""
        problem = self.problem
        n, m = len(problem.train), len(problem.x_examples)
        # A gradient costs what it costs to form it, which is about a pass over an example's tokens for every logit.
        tokens = MEAN_TOKENS if not problem.train.padded else sum(problem.train.shapes) / n
        rows, columns = tiles_per_axis(n, m, processes, problem.symmetric, tokens, problem.num_logits)
        train_tile = min(train_tile or even_tile_size(n, n, rows), n)
        x_tile = min(x_tile or even_tile_size(X_TILE, m, columns), m)
        largest = problem.num_logits * max(bytes_of([tensor]) for tensor in problem.params.values())
        # A parameter larger than all others (the word embeddings) may force smaller tiles than grouping can give.
        while self._bytes(largest, train_tile, x_tile) > self.memory_bytes and train_tile * x_tile > 1:
            train_tile, x_tile = (train_tile, (x_tile + 1) // 2) if x_tile > 1 else ((train_tile + 1) // 2, x_tile)
        if self._bytes(largest, 1, 1) > self.memory_bytes:
            raise MemoryBudgetError(self._bytes(largest, 1, 1), self.memory_bytes)
        return make_plan(problem.train.shapes, problem.x_examples.shapes, train_tile, x_tile, problem.symmetric)

    def blocks_of_group(self, plan: Plan, part: int) -> Iterator[Block]:
        """Form the train tile's gradients for one group of parameters and meet all X tiles with them."""
        group = self._groups(plan)[part]
        for train, x_tiles in plan.tile_rows:
            train_gradients = self._gradients(self.problem.train, train, group)
            for x in x_tiles:
                same = self.problem.on_diagonal(Tile(train, x))
                yield Tile(train, x), self._block(train_gradients, train, x, group, same)

    def expected_bytes(self, plan: Plan) -> int:
        """Return the gradients of both tiles and what forming and signing them takes for a moment."""
        largest = max(bytes_of(self.problem.params[name] for name in group) for group in self._groups(plan))
        return self._bytes(self.problem.num_logits * largest, plan.train_tile, plan.x_tile)

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Time the gradients of as many examples as there are together on average, and count the products."""
        problem = self.problem
        groups = self._groups(plan)
        tiles = [tile.x for tile in plan]
        runs = sum(len(equal_shape_runs(problem.x_examples, x, FORMED_TOGETHER)) for x in tiles)
        few = [problem.typical_example] * max(1, round(sum(map(len, tiles)) / max(runs, 1)))
        gradient_seconds = seconds_of(lambda: [self._gradients(problem.train, few, group) for group in groups])
        gradient_seconds /= len(few)
        parameters = sum(tensor.numel() for tensor in problem.params.values())
        weight = next(iter(problem.params.values()))
        flops = 2 * parameters * problem.num_logits**2 * len(problem.formula.directions)
        pair_seconds = flops / product_flops(weight.device, weight.dtype)

        def tile_seconds(tile: Tile) -> float:
            formed = 0 if self.problem.on_diagonal(tile) else len(tile.x)
            return gradient_seconds * formed + pair_seconds * tile.pairs

        return CostModel(lambda train: gradient_seconds * len(train), tile_seconds)

    def summary(self, plan: Plan) -> str:
        """Say how many groups the parameters are taken in."""
        parts = self.num_parameter_groups(plan)
        return super().summary(plan) + (f" with parameters in {parts} groups" if parts > 1 else "")

    def num_parameter_groups(self, plan: Plan) -> int:
        """Return how many groups the parameters are taken in."""
        return len(self._groups(plan))

    def _bytes(self, per_example: int, train_tile: int, x_tile: int) -> int:
        formed = min(FORMED_TOGETHER, max(train_tile, x_tile))
        return per_example * (train_tile + x_tile + formed)

    def _groups(self, plan: Plan) -> list[list[str]]:
        """Return groups of parameters whose gradients, of both tiles, fit together."""
        groups: list[list[str]] = [[]]
        size = 0
        for name, tensor in self.problem.params.items():
            added = self.problem.num_logits * bytes_of([tensor])
            if groups[-1] and self._bytes(size + added, plan.train_tile, plan.x_tile) > self.memory_bytes:
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
        for run in equal_shape_runs(examples, indices, limit=FORMED_TOGETHER):
            jacobian = self._differentiator.jacobian(params, examples.batch(run), fixed)
            stop = start + len(run) * self.problem.num_logits
            for name, values in jacobian.items():
                gradients[name][start:stop] = values.reshape(stop - start, -1)
            start = stop
        broken = None
        if self.problem.formula.signed:
            broken = torch.stack([broken_rows(values) for values in gradients.values()]).any(dim=0)
            broken = broken.unflatten(0, (-1, self.problem.num_logits))
        return Gradients(gradients, broken)

    def _block(
        self, train_side: Gradients, train: tuple[int, ...], x: tuple[int, ...], group: list[str], same: bool
    ) -> Tensor:
        x_side = train_side if same else self._gradients(self.problem.x_examples, x, group)
        directions, c = self.problem.formula.directions, self.problem.num_logits
        total = self.problem.sum_by_layer(
            (name, contract(train_side.of[name], x_side.of[name], directions)) for name in group
        )
        return hide_signs_of_broken(total.reshape(-1, len(train), c, len(x), c), train_side.broken, x_side.broken)
