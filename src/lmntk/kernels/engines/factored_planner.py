"""The plan of the `factored` engine: tiles that fit a model of its memory, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmntk.kernels.batching import Examples
from lmntk.kernels.engines.base import MemoryBudgetError
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelSides
from lmntk.kernels.tiling import CostModel, Plan, Tile, TileRequest, TileSize, even_tile_size, make_plan, tiles_per_axis
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

# Allowance for sizes that are rounded down to whole bytes.
ROUNDING_BYTES = 1024
# The part of the time of floating-point products of signs that those of bits save.
SAVED_BY_BITS = 0.8


@dataclass(frozen=True)
class KeptDemands:
    """What stays of a batch's factors where linear layers keep something else in their place.

    That are the signs of their gradients, as two planes of bits, or the projections of these.

    Attributes:
        per_example: Bytes of an example's signs or projections in all layers together.
        per_token: Bytes of the other factors of one token in all layers together.
        largest: Those of an example in the largest layer, whose batches are joined.
        optional: Whether factors are kept if there is no room.
    """

    per_example: int
    per_token: int
    largest: int = 0
    optional: bool = True


@dataclass(frozen=True)
class LayerDemands:
    """What a model's layers need, measured on one example or counted from the model's shape.

    Attributes:
        per_token: Bytes of the factors of one token in all layers together.
        buffer_bytes: Best size of the largest buffer for dense gradients, in bytes.
        dense_numel: Numbers in an example's gradient of one logit in all layers that form it.
        gram_flops: Flops for each pair of positions in all layers that do not.
        kept: What would be kept in place of factors; None if these are kept in any case.
        fixed_bytes: What the layers hold whatever the tiles are.
        pair_bytes: What a pair of examples takes in a tile's block and while products are added to it, where factors
            are so small that it matters.
    """

    per_token: int
    buffer_bytes: int
    dense_numel: int
    gram_flops: float = 0.0
    kept: KeptDemands | None = None
    fixed_bytes: int = 0
    pair_bytes: int = 0


@dataclass(frozen=True)
class Fallback:
    """The memory of the jacobian engine for parameters of unknown layers.

    Attributes:
        bytes: Its share of the budget.
        minimum_bytes: The smallest share that it can work with.
    """

    bytes: int
    minimum_bytes: int


@dataclass(frozen=True)
class MemoryModel:
    """The memory of the factored engine's tiles, in bytes.

    Attributes:
        per_token: Bytes of the factors of one token in all layers together.
        buffer: Bytes of each of the three buffers for dense gradients: of the train side, of X, of the train signs.
        batch_tokens: Tokens that are propagated together.
        max_x_bytes: Largest factors of an X tile in bytes.
        kept: What is kept of a batch once it is propagated; None if all factors are.
        tuning: Allowances for activations and for fragmentation.
    """

    per_token: int
    buffer: int
    batch_tokens: int
    max_x_bytes: int
    kept: KeptDemands | None = None
    tuning: Tuning = DEFAULT_TUNING

    @classmethod
    def divide(
        cls, budget: MemoryBudget, demands: LayerDemands, sides: KernelSides, tuning: Tuning = DEFAULT_TUNING
    ) -> "MemoryModel":
        """Divide a budget among buffers and activations; the rest is left for factors."""
        lengths = side_lengths(sides)
        n, m, c = len(sides.train), min(len(sides.x_examples), tuning.max_x_tile), sides.num_logits
        length = tokens_of(sides.train, [sides.typical_example])[0]
        dense_flops = 2 * demands.dense_numel * c * ((n + m) * length + c * n * m)
        mostly_dense = dense_flops > demands.gram_flops * n * m * length**2
        activations = min(budget.bytes * tuning.activation_share, tuning.max_activation_bytes)
        affordable = int(activations / (tuning.activation_factor * demands.per_token))
        wanted = max(tuning.min_buffer_bytes, demands.buffer_bytes)
        return cls(
            demands.per_token,
            buffer=int(min(tuning.max_buffer_bytes, budget.bytes * tuning.buffer_share, wanted)),
            batch_tokens=max(*lengths, min(_best_batch_tokens(demands.per_token, tuning), affordable)),
            max_x_bytes=tuning.max_x_tile_bytes if mostly_dense else tuning.gram_x_tile_bytes,
            tuning=tuning,
        )

    def factors(self, tokens: float, examples: int = 1) -> float:
        """Return the bytes of the factors of so many examples that have so many tokens together."""
        if self.kept is None:
            return self.tuning.fragmentation * self.per_token * tokens
        per_example = self.kept.per_example + self.kept.largest
        return self.tuning.fragmentation * (self.kept.per_token * tokens + per_example * examples)

    def peak(self, tokens: int, examples: int) -> int:
        """Return the peak with the factors of so many examples of both sides together."""
        activations = self.tuning.activation_factor * self.per_token * self.batch_tokens
        return int(self.factors(tokens, examples) + 3 * self.buffer + activations)


class FactoredPlanner:
    """Lays tiles as large as the memory allows.

    Args:
        sides: The examples of both sides.
        budget: The memory that the engine may take beside the model.
        demands: What the model's layers need.
        fallback: The memory of the engine that takes the other parameters.
        tuning: Numbers that trade time for memory.
        slice_bytes: Bytes for each pair of examples of a tile, if slices are kept apart, see
            `KernelProblem.slice_bytes`.
    """

    def __init__(
        self,
        sides: KernelSides,
        budget: MemoryBudget,
        demands: LayerDemands,
        fallback: Fallback | None = None,
        tuning: Tuning = DEFAULT_TUNING,
        slice_bytes: int = 0,
    ) -> None:
        self.memory = MemoryModel.divide(budget, demands, sides, tuning)
        self._sides = sides
        self._budget = budget
        self.demands = demands
        self._fallback = fallback
        self._fixed_bytes = demands.fixed_bytes + (fallback.bytes if fallback else 0)
        self._tuning = tuning
        self._pair_bytes = slice_bytes + demands.pair_bytes
        self._lengths = side_lengths(sides)
        self._longest = max(self._lengths)
        kept = demands.kept
        if kept is not None and (not kept.optional or self._have_room(kept)):
            self.memory = replace(self.memory, kept=kept)

    def plan(self, tiles: TileRequest, processes: int) -> Plan:
        """Lay the tiles, train examples first, whose factors stay.

        Args:
            tiles: Largest numbers of examples in a tile; what is None is chosen here.
            processes: Number of processes that share the plan.

        Raises:
            MemoryBudgetError: The requested tiles do not fit, or not even two examples.
        """
        if self._examples_that_fit(self._longest) < 2 or self._budget_for_fallback > self._budget.bytes:
            raise MemoryBudgetError(self._smallest_budget(), self._budget.bytes)
        # Tiles take examples by length, so how many fit is tried from the average length up to the longest, in steps
        # of a quarter; examples as long as the longest are sure to fit.
        tokens = max(1, sum(self._lengths) // len(self._lengths))
        plan = self._plan(self._examples_that_fit(tokens), tiles, processes)
        while self.expected_bytes(plan) > self._budget.bytes and tokens < self._longest:
            tokens = min(tokens * 5 // 4 + 1, self._longest)
            plan = self._plan(self._examples_that_fit(tokens), tiles, processes)
        if self.expected_bytes(plan) > self._budget.bytes and (tiles.row or tiles.column):
            raise MemoryBudgetError(self.expected_bytes(plan), self._budget.bytes)
        return plan

    def _have_room(self, signs: KeptDemands) -> bool:
        """Return whether signs take no more than factors, or the train tiles that they fit into are large enough.

        For each train tile of n examples, X is propagated and its gradients are formed again: 2 · L · (1 + 2 C) flops
        for each weight and example. Products of floating-point signs would take 2 · n · C² instead of next to nothing.
        """
        with_signs, c = replace(self.memory, kept=signs), self._sides.num_logits
        tokens = sum(self._lengths) / len(self._lengths)
        enough = min(len(self._sides.train), tokens * (1 + 2 * c) / (SAVED_BY_BITS * c**2))
        train_tile = 3 / 4 * self._room / with_signs.factors(tokens)
        return train_tile >= enough or with_signs.factors(tokens) <= self.memory.factors(tokens)

    @property
    def _room(self) -> int:
        """The bytes that are left for factors."""
        return self._budget.bytes - self.memory.peak(0, 0) - self._fixed_bytes

    def _examples_that_fit(self, tokens: int) -> int:
        """Return how many examples of so many tokens the budget has room for, beside the slices of a pair."""
        return int((self._room - self._pair_bytes) // self.memory.factors(tokens))

    def _plan(self, examples: int, tiles: TileRequest, processes: int) -> Plan:
        """Lay tiles where so many examples of both sides together fit."""
        sides = self._sides
        n, m = len(sides.train), len(sides.x_examples)
        # X is propagated again for each train tile. So all train examples form one tile if that leaves a quarter of the
        # room to X; else both sides get half.
        max_train = 3 * examples // 4 if 4 * n <= 3 * examples else examples // 2
        tokens = sum(self._lengths) / len(self._lengths)
        rows, columns = tiles_per_axis(n, m, processes, sides.symmetric, tokens, sides.num_logits)
        max_train = self._with_slices(max(1, min(max_train, n)), examples) if self._pair_bytes else max(1, max_train)
        train = min(tiles.row or even_tile_size(max_train, n, rows), n)
        max_x = int(self.memory.max_x_bytes // self.memory.factors(tokens))
        max_x = max(1, min(self._beside(train, examples), self._tuning.max_x_tile, max_x))
        x = min(tiles.column or even_tile_size(max_x, m, columns), m)
        return make_plan(sides.train.shapes, sides.x_examples.shapes, TileSize(train, x), sides.symmetric)

    def _beside(self, train: int, examples: int) -> int:
        """Return how many X examples fit beside a train tile, where so many examples of both sides would fit alone."""
        if not self._pair_bytes:
            return examples - train
        # Each takes its factors and its slices with every train example.
        factors = self._room / examples
        return int((self._room - train * factors) / (factors + train * self._pair_bytes))

    def _with_slices(self, train: int, examples: int) -> int:
        """Return the size of a train tile, made smaller where slices would leave room to few X examples only."""
        enough = min(self._tuning.min_x_tile, len(self._sides.x_examples))
        while train > 1 and self._beside(train, examples) < (train if self._sides.symmetric else enough):
            train -= -(-train // 8)
        return train

    def expected_bytes(self, plan: Plan) -> int:
        """Return the peak memory: factors of both tiles, buffers, activations, slices, and the fallback's share."""
        sides = self._sides
        x_tokens = {x: sum(tokens_of(sides.x_examples, x)) for row in plan.tile_rows for x in row.x_tiles}
        needed = 0
        for train, x_tiles in plan.tile_rows:
            # A tile on the diagonal holds the factors of one side only.
            own = sum(tokens_of(sides.train, train))
            for x in x_tiles:
                tokens, count = (0, 0) if sides.on_diagonal(Tile(train, x)) else (x_tokens[x], len(x))
                slices = self._pair_bytes * len(train) * len(x)
                needed = max(needed, self.memory.peak(own + tokens, len(train) + count) + slices)
        return needed + self._fixed_bytes

    @property
    def keeps_signs(self) -> bool:
        """Whether linear layers keep the signs of their gradients, in place of factors."""
        return self.memory.kept is not None and self.memory.kept.optional

    @property
    def keeps_projections(self) -> bool:
        """Whether linear layers keep projections of their gradients, which no product forms again."""
        return self.memory.kept is not None and not self.memory.kept.optional

    def cost_model(
        self,
        seconds_per_token: float,
        product_flops: float,
        fallback: CostModel | None = None,
        sign_rate: float | None = None,
    ) -> CostModel:
        """Return how long tiles take: propagation is given, products are counted.

        Args:
            seconds_per_token: Seconds to propagate a token, forward and backward for each logit, and to take signs or
                projections if they are kept.
            product_flops: Rate of large matrix products, in floating-point operations a second.
            fallback: The cost of the parameters of unknown layers.
            sign_rate: Products of two signs in a second, if signs are kept.
        """
        sides, logits, directions = self._sides, self._sides.num_logits, len(self._sides.formula.directions)
        efficiency = self._tuning.product_efficiency

        def row(train: tuple[int, ...]) -> float:
            return seconds_per_token * sum(tokens_of(sides.train, train))

        def tile_seconds(tile: Tile) -> float:
            train_tokens, x_tokens = sum(tokens_of(sides.train, tile.train)), sum(tokens_of(sides.x_examples, tile.x))
            propagated = 0 if sides.on_diagonal(tile) else x_tokens
            seconds = seconds_per_token * propagated
            if sign_rate is not None:
                seconds += self.demands.dense_numel * logits**2 * tile.pairs / sign_rate
            else:
                formed = 0 if self.keeps_projections else train_tokens + propagated
                flops = 2.0 * self.demands.dense_numel * logits * (formed + logits * tile.pairs * directions)
                # Gram matrices' products are larger, and nearer to the best rate.
                flops += efficiency * self.demands.gram_flops * train_tokens * x_tokens
                seconds += flops / (efficiency * product_flops)
            # The fallback forms its train gradients again for every tile.
            return seconds if fallback is None else seconds + fallback.row(tile.train) + fallback.tile(tile)

        return CostModel(row, tile_seconds)

    def _smallest_budget(self) -> int:
        """Return a budget that is sure to hold the two longest examples, and as little as the shares allow.

        Buffers and fallback take their shares of it. Activations take theirs, or what the longest example needs.
        """
        tuning = self._tuning
        left = 1 - 3 * tuning.buffer_share - (tuning.fallback_share if self._fallback else 0)
        longest = self.memory.factors(self._longest)
        pair = 2 * longest + self._pair_bytes
        pair += self.demands.fixed_bytes
        own = max(pair / (left - tuning.activation_share), (pair + tuning.activation_factor * longest) / left)
        return max(self._budget_for_fallback, ROUNDING_BYTES + int(own))

    @property
    def _budget_for_fallback(self) -> int:
        """The smallest budget whose share is enough for the fallback; 0 if that of today's budget is."""
        if self._fallback is None or self._fallback.minimum_bytes <= self._fallback.bytes:
            return 0
        return int(self._fallback.minimum_bytes / self._tuning.fallback_share) + 1


def _best_batch_tokens(per_token: int, tuning: Tuning) -> int:
    """Return how many tokens are best propagated together if each has factors of so many bytes."""
    return max(tuning.batch_tokens, min(tuning.small_model_batch_tokens, tuning.batch_bytes // per_token))


def tokens_of(examples: Examples, indices: Sequence[int]) -> list[int]:
    """Return the lengths of some examples; each counts as one token where shapes are not lengths."""
    return [examples.shapes[index] if examples.padded else 1 for index in indices]


def side_lengths(sides: KernelSides) -> list[int]:
    """Return the lengths of the train examples and then of the X examples."""
    return [
        length for examples in (sides.train, sides.x_examples) for length in tokens_of(examples, range(len(examples)))
    ]


def num_bytes(factors: Sequence[Any]) -> int:
    """Return the bytes of the factors of several layers, whose inputs may be one tensor."""
    storages = [tensor.untyped_storage() for of_layer in factors for tensor in _tensors(of_layer)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(factors: Any) -> list[Tensor]:
    fields = vars(factors).values() if hasattr(factors, "__dataclass_fields__") else [factors]
    return [leaf for leaf in tree_leaves(list(fields)) if isinstance(leaf, torch.Tensor)]
