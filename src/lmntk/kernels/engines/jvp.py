"""The `jvp` engine: Jacobians of one tile, then one Jacobian-vector product per train logit; the published method.

This is Novak et al. 2022's ("Fast Finite Width Neural Tangent Kernel") *NTK-vector products* in the form of Malladi et
al. 2023: `K[i, a, :, :] = ∂f(X)/∂θ · v` with `v = ∂f_a(i)/∂θ` or its sign, by forward-mode differentiation. If both
sides take the sign there is no such product, and the gradients of both tiles are formed.

* Time: C backward passes for each example of both sides, and C forward-mode passes for each of the N · X pairs.
* Memory: the gradients of one tile, P · C numbers for each of its examples, which are one by default.
* Used on request, where memory is short and the model unknown. It is the yardstick of the benchmark.
"""

import functools
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmntk.kernels.batching import Examples, equal_shape_batches
from lmntk.kernels.contraction import contract, contract_each, hide_diagonal_of_broken
from lmntk.kernels.engines.base import ANY_TILES, ComputedTile, Engine, MemoryBudgetError
from lmntk.kernels.engines.derivatives import Differentiator
from lmntk.kernels.formulas import UNSIGNED, SignPlacement
from lmntk.kernels.problem import Parameters
from lmntk.kernels.tiling import CostModel, Plan, Tile, TileRequest, TileRow, TileSize, make_plan
from lmntk.kernels.timing import seconds_of


class JvpEngine(Engine):
    """NTK-vector products: least memory on any model, and slow."""

    name = "jvp"
    keeps_parts_apart = False
    multiplies_gradients = False

    @functools.cached_property
    def _differentiator(self) -> Differentiator:
        return Differentiator(self.problem.model.logits_fn)

    def plan(self, tiles: TileRequest = ANY_TILES, processes: int = 1) -> Plan:
        """Lay tiles of one example along each axis, as published, where no sizes are given."""
        problem, size = self.problem, TileSize(tiles.row or 1, tiles.column or 1)
        plan = make_plan(problem.train.shapes, problem.x_examples.shapes, size, problem.symmetric)
        needed = self.expected_bytes(plan)
        if needed > self.budget.bytes:
            raise MemoryBudgetError(needed, self.budget.bytes)
        return plan

    def tiles_of_group(
        self, plan: Plan, group: int, with_diagonal: Container[Tile] = frozenset()
    ) -> Iterator[ComputedTile]:
        """Differentiate each train tile once and multiply its gradients with the Jacobians of every X tile."""
        problem = self.problem
        for train, x_tiles in plan.tile_rows:
            train_gradients = self._gradients(problem.train, train)
            for x in x_tiles:
                tile = Tile(train, x)
                found = [self._direction(train_gradients, tile, way) for way in problem.formula.directions]
                diagonal = self.diagonal(plan, x, group) if tile in with_diagonal else None
                yield ComputedTile(tile, torch.stack(found), diagonal)

    def diagonal(self, plan: Plan, x: tuple[int, ...], group: int) -> Tensor:
        """Form the gradients of one example after the other, C backward passes each, and multiply them."""
        return torch.cat([self._own_products(index) for index in x], dim=1)

    def _own_products(self, index: int) -> Tensor:
        """Return K(x, x) of one X example, float64 ``[D, 1, C, C]``."""
        batch, partial = self.problem.x_examples.batch([index]), self.problem.model.partial_rows
        logits_fn, params = (self.problem.model.logits_fn, self.problem.params)
        if partial is not None:
            logits_fn, params = partial.of_batch(batch)
        found_by_name = Differentiator(logits_fn).jacobian(params, batch, {})
        gradients = [values.flatten(2) for values in found_by_name.values()]
        found = [contract_each(values, self.problem.formula.directions) for values in gradients]
        broken = None
        if self.problem.formula.signed:
            broken = torch.stack([~values.isfinite().all(dim=2) for values in gradients]).any(dim=0)
        return hide_diagonal_of_broken(torch.stack(found).sum(dim=0), broken)

    def expected_bytes(self, plan: Plan) -> int:
        """Return the bytes of the gradients of the train tile, raw and signed, and of the X tile if they are formed."""
        held = 2 * plan.tile_size.row + 1
        if self._forms_x:
            held += 2 * plan.tile_size.column
        return held * self.problem.gradient_bytes

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Time one example's gradients and one pair of examples."""
        one = (self.problem.typical_example,)
        pair = replace(plan, tile_rows=(TileRow(one, (one,)),))
        alone = JvpEngine(replace(self.problem, x=None), self.budget, self.tuning)
        gradient_seconds = seconds_of(lambda: self._gradients(self.problem.train, one))
        formed_seconds = gradient_seconds if self._forms_x else 0.0
        pair_seconds = max(seconds_of(lambda: list(alone.blocks(pair))) - gradient_seconds - formed_seconds, 0.0)
        return CostModel(
            lambda train: gradient_seconds * len(train),
            lambda tile: formed_seconds * len(tile.x) + pair_seconds * tile.pairs,
        )

    @property
    def _forms_x(self) -> bool:
        """Whether gradients of X are formed too."""
        return any(direction.sign_x for direction in self.problem.formula.directions)

    def _gradients(self, examples: Examples, indices: Sequence[int]) -> Parameters:
        """Return the gradients of some examples, by parameter: ``[n, C, *shape]``."""
        batches = equal_shape_batches(examples, indices, limit=1)
        found = [self._differentiator.jacobian(self.problem.params, examples.batch(batch), {}) for batch in batches]
        return {name: torch.cat([jacobian[name] for jacobian in found]) for name in self.problem.params}

    def _direction(self, train_gradients: Parameters, tile: Tile, direction: SignPlacement) -> Tensor:
        """Return one direction of a tile, float64 ``[n, C, x, C]``."""
        problem = self.problem
        if not direction.sign_x:
            tangents = _signed(train_gradients) if direction.sign_train else train_gradients
            return self._push(tangents, problem.x_examples, tile.x)
        x_gradients = self._gradients(problem.x_examples, tile.x)
        if not direction.sign_train:
            return self._push(_signed(x_gradients), problem.train, tile.train).permute(2, 3, 0, 1)
        train_signs, x_signs = _signed(train_gradients), _signed(x_gradients)
        total = sum(
            contract(train_signs[name].flatten(0, 1).flatten(1), signs.flatten(0, 1).flatten(1), [UNSIGNED])
            for name, signs in x_signs.items()
        )
        assert isinstance(total, torch.Tensor)
        return total.reshape(len(tile.train), problem.num_logits, len(tile.x), problem.num_logits)

    def _push(self, tangents: Parameters, examples: Examples, indices: Sequence[int]) -> Tensor:
        """Take the derivative of some examples' logits along each tangent.

        Args:
            tangents: Directions in parameter space, ``[n, C, *shape]``.
            examples: The examples to differentiate.
            indices: Which of them.

        Returns:
            float64 ``[n, C, len(indices), C]``.
        """
        flat = {name: tensor.flatten(0, 1) for name, tensor in tangents.items()}
        derivatives = [
            self._differentiator.push(self.problem.params, flat, examples.batch(batch))
            for batch in equal_shape_batches(examples, indices, limit=len(indices))
        ]
        return torch.cat(derivatives, dim=1).unflatten(0, (-1, self.problem.num_logits))


def _signed(gradients: Parameters) -> Parameters:
    """Take signs; NaN and infinity, which have a sign for torch, become NaN."""
    return {name: tensor.sign().masked_fill_(~tensor.isfinite(), torch.nan) for name, tensor in gradients.items()}
