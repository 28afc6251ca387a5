"""The `factored` engine: gradients stay factors, and meet layer by layer.

N + X examples are propagated once, instead of N · X pairs; no gradient over all parameters is ever held. What no layer
type knows goes to the `jacobian` engine, parameter by parameter; so does, tile by tile, a layer that some examples use
in another way than the others.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmntk.kernels import capture
from lmntk.kernels.batching import Examples, buckets
from lmntk.kernels.contraction import hide_signs_of_broken
from lmntk.kernels.engines.base import Engine, MemoryBudgetError
from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.engines.layer_selection import find_layers, parameters_of
from lmntk.kernels.layers import Layer, Workspace
from lmntk.kernels.layers.linear import LinearLayer, LinearPair, group_by_shared_input, shared_input_kernel
from lmntk.kernels.layers.linear_factors import pack_contiguous
from lmntk.kernels.memory import retain_freed_memory
from lmntk.kernels.problem import Block, KernelProblem
from lmntk.kernels.tiling import CostModel, Plan, Tile, even_tile_size, make_plan, tiles_per_axis
from lmntk.kernels.timing import product_flops, seconds_of, stage

logger = logging.getLogger(__name__)

# Large X tiles form the train side's gradients less often; beyond this that gains less than memory costs that a process
# touches for the first time. Where next to nothing is formed, a few X examples' factors do.
MAX_X_TILE, MOST_X_BYTES, FEW_X_BYTES = 256, 2**31, 2**29
# Tokens that are propagated together: enough for large products, few enough for their activations to be small.
MOST_TOKENS, MOST_ACTIVATION_BYTES = 1024, 2**30
# What activations take while a batch is propagated, in units of what is kept of it.
ACTIVATIONS = 2.0
# The share of the budget for the gradients of parameters of unknown layers, where there are any.
FALLBACK_SHARE = 0.25
# What memory in pieces takes beyond what is in the pieces.
FRAGMENTATION = 1.1
# What forming and contraction reach of the rate of large square products.
PRODUCT_EFFICIENCY = 0.65
# Buffers beyond this size make products no faster.
LARGEST_BUFFER = 2**29
# Products of vectors and single outer products, which form no gradients, are made in buffers too.
LEAST_BUFFER = 2**22
# The shares of the budget that each of three buffers, and activations, may take; the rest is for factors.
BUFFER_SHARE, ACTIVATION_SHARE = 0.12, 0.15


@dataclass(frozen=True)
class Memory:
    """What the engine's parts take, in bytes.

    Attributes:
        per_token: The factors of one token, all layers together.
        buffer: The largest of the buffers in which gradients are formed, of which there are three: of the train side,
            of X, and of the train side's signs.
        tokens: How many tokens are propagated together.
    """

    per_token: int
    buffer: int
    tokens: int

    def total(self, train_tokens: int, x_tokens: int) -> int:
        """Return the peak with the factors of so many tokens on either side."""
        kept = FRAGMENTATION * self.per_token * (train_tokens + x_tokens)
        return int(kept + 3 * self.buffer + ACTIVATIONS * self.per_token * self.tokens)


@dataclass(frozen=True)
class Side:
    """One side of a tile.

    Attributes:
        factors: Every regular layer's, batch by batch.
        irregular: The layers that are not, in one batch at least.
        broken: Which examples' gradients hold NaN or infinity, bool ``[n]``; None where no signs are taken.
    """

    factors: dict[str, list[Any]]
    irregular: frozenset[str]
    broken: Tensor | None


class FactoredEngine(Engine):
    """Fastest, where the model's modules are known."""

    name = "factored"

    def __init__(self, problem: KernelProblem, memory_bytes: int) -> None:
        super().__init__(problem, memory_bytes)
        if problem.module is None or problem.call is None:
            raise ValueError("the factored engine needs the module, not a function alone")
        self._call = problem.call
        self._layers, unknown = find_layers(problem)
        self._unknown = unknown
        self._fallbacks: dict[tuple[str, ...], JacobianEngine] = {}
        self._told: frozenset[str] = frozenset()
        self._fallback = self._fallback_for(unknown) if unknown else None
        self._lengths = [
            tokens
            for examples in (problem.train, problem.x_examples)
            for tokens in _tokens(examples, range(len(examples)))
        ]
        self._longest = max(self._lengths)
        self._memory = self._divide_memory()
        dtype, device = self._sample.dtype, self._sample.device
        self._workspace = Workspace(self._memory.buffer // self._sample.element_size(), dtype, device)

    def summary(self, plan: Plan) -> str:
        """Say how many parameters no layer type knows."""
        if self._fallback is None:
            return super().summary(plan)
        unknown = sum(tensor.numel() for tensor in self._fallback.problem.params.values())
        return f"{super().summary(plan)} (jacobian for {unknown:,} parameters of unknown layers)"

    @property
    def fallback_parameters(self) -> list[str]:
        """The parameters that no layer type knows."""
        return list(self._fallback.problem.params) if self._fallback else []

    def plan(self, train_tile: int | None = None, x_tile: int | None = None, processes: int = 1) -> Plan:
        """Lay tiles as large as memory allows: train examples first, whose factors stay."""
        if self._examples_of(self._longest) < 2 or self._fallback_least > self.memory_bytes:
            raise MemoryBudgetError(self._least_bytes(), self.memory_bytes)
        # Tiles take examples by length: how many fit is tried from the average length up to the longest, a sure thing.
        tokens = max(1, sum(self._lengths) // len(self._lengths))
        plan = self._plan(self._examples_of(tokens), train_tile, x_tile, processes)
        while self.expected_bytes(plan) > self.memory_bytes and tokens < self._longest:
            tokens = min(tokens * 5 // 4 + 1, self._longest)
            plan = self._plan(self._examples_of(tokens), train_tile, x_tile, processes)
        if self.expected_bytes(plan) > self.memory_bytes and (train_tile or x_tile):
            raise MemoryBudgetError(self.expected_bytes(plan), self.memory_bytes)
        return plan

    def _examples_of(self, tokens: int) -> int:
        """Return how many examples of so many tokens the budget has room for."""
        room = self.memory_bytes - self._memory.total(0, 0) - self._fallback_bytes
        return int(room // (FRAGMENTATION * self._memory.per_token * tokens))

    def _plan(self, examples: int, train_tile: int | None, x_tile: int | None, processes: int) -> Plan:
        """Lay tiles of `examples` in all, where sizes are not given."""
        problem = self.problem
        n, m = len(problem.train), len(problem.x_examples)
        # All train examples at once, where X is left a quarter of the room: else X is propagated again for each tile.
        most = max(1, 3 * examples // 4 if 4 * n <= 3 * examples else examples // 2)
        tokens = sum(self._lengths) / len(self._lengths)
        rows, columns = tiles_per_axis(n, m, processes, problem.symmetric, tokens, problem.num_logits)
        train = min(train_tile or even_tile_size(most, n, rows), n)
        most_x = int(self._most_x_bytes // (FRAGMENTATION * self._memory.per_token * tokens))
        own_x = max(1, min(examples - train, MAX_X_TILE, most_x))
        x = min(x_tile or even_tile_size(own_x, m, columns), m)
        return make_plan(problem.train.shapes, problem.x_examples.shapes, train, x, problem.symmetric)

    def blocks_of_group(self, plan: Plan, part: int) -> Iterator[Block]:
        """Propagate each train tile once and each X tile once per train tile, and contract layer by layer."""
        with retain_freed_memory():
            for train, x_tiles in plan.tile_rows:
                yield from self._tile_row(train, x_tiles)

    def _tile_row(self, train: tuple[int, ...], x_tiles: tuple[tuple[int, ...], ...]) -> Iterator[Block]:
        """Compute the tiles of one train tile, whose factors are gone when the next one's are made."""
        side = self._side(self.problem.train, train)
        side = replace(side, factors=pack_contiguous(side.factors))
        for x in x_tiles:
            yield Tile(train, x), self._compute_tile(Tile(train, x), side)

    def _compute_tile(self, tile: Tile, train: Side) -> Tensor:
        """Compute one tile, float64 ``[S, n, C, x, C]``; the factors of its X examples are gone when it is done."""
        x = train if self.problem.on_diagonal(tile) else self._side(self.problem.x_examples, tile.x)
        irregular = train.irregular | x.irregular
        broken = train.broken, x.broken
        layers = {name: layer for name, layer in self._layers.items() if name not in irregular}
        known = (
            [self.problem.sum_by_layer(self._module_contributions(layers, train.factors, x.factors))] if layers else []
        )
        del x  # the fallback may take its room
        fallback = self._fallback_beside(irregular)
        rest = [] if fallback is None else [self._fallback_block(fallback, tile)]
        return hide_signs_of_broken(torch.stack([*known, *rest]).sum(dim=0), *broken)

    def _fallback_for(self, names: Sequence[str]) -> JacobianEngine:
        key = tuple(names)
        if key not in self._fallbacks:
            params = {name: self.problem.params[name] for name in names}
            share = int(self.memory_bytes * FALLBACK_SHARE)
            self._fallbacks[key] = JacobianEngine(replace(self.problem, params=params), share)
        return self._fallbacks[key]

    def _fallback_beside(self, irregular: frozenset[str]) -> JacobianEngine | None:
        """Return what takes the parameters that no layer type knows, and those of some layers more."""
        if not irregular:
            return self._fallback
        if irregular - self._told:
            self._told |= irregular
            which = ", ".join(sorted(irregular)[:3]) + (" and others" if len(irregular) > 3 else "")
            logger.warning(
                "some examples use %s in another way than those that were tried: the jacobian engine takes its "
                "parameters there",
                which,
            )
        more = {name for prefix in irregular for name in parameters_of(prefix, self._layers[prefix])}
        return self._fallback_for([name for name in self.problem.params if name in more or name in self._unknown])

    def expected_bytes(self, plan: Plan) -> int:
        """Return the factors of both tiles, the buffers, and the activations of a batch."""
        needed = 0
        x_tokens = {x: sum(_tokens(self.problem.x_examples, x)) for _, x_tiles in plan.tile_rows for x in x_tiles}
        for train, x_tiles in plan.tile_rows:
            # The train set with itself: the factors of a tile on the diagonal are one side's.
            others = [x_tokens[x] for x in x_tiles if not self.problem.on_diagonal(Tile(train, x))]
            kept = self._memory.total(sum(_tokens(self.problem.train, train)), max(others, default=0))
            needed = max(needed, kept)
        return needed + self._fallback_bytes

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Time the propagation of a few examples, and count the products."""
        problem = self.problem
        few = [problem.typical_example] * 8
        few_tokens = sum(_tokens(problem.train, few))
        propagation_seconds = seconds_of(lambda: self._side(problem.train, few)) / few_tokens
        rate = PRODUCT_EFFICIENCY * product_flops(self._sample.device, self._sample.dtype)
        logits, directions = problem.num_logits, len(problem.formula.directions)
        rest = self._fallback.estimate_cost(plan) if self._fallback else CostModel(lambda train: 0.0, lambda tile: 0.0)

        def tokens_of(examples: Examples, indices: Sequence[int]) -> int:
            return sum(_tokens(examples, indices))

        def row(train: tuple[int, ...]) -> float:
            return propagation_seconds * tokens_of(problem.train, train)

        def tile_seconds(tile: Tile) -> float:
            x_tokens = tokens_of(problem.x_examples, tile.x)
            propagated = 0 if self.problem.on_diagonal(tile) else x_tokens
            formed = tokens_of(problem.train, tile.train) + propagated
            flops = 2.0 * self._formed * logits * (formed + logits * tile.pairs * directions)
            # Gram matrices' products are larger, and nearer to the best rate.
            flops += PRODUCT_EFFICIENCY * self._entry * tokens_of(problem.train, tile.train) * x_tokens
            # The fallback begins anew with every tile.
            return propagation_seconds * propagated + flops / rate + rest.row(tile.train) + rest.tile(tile)

        return CostModel(row, tile_seconds)

    @property
    def _sample(self) -> Tensor:
        assert self.problem.module is not None
        return next(self.problem.module.parameters())

    def _divide_memory(self) -> Memory:
        one = [self.problem.typical_example]
        kept = self._side(self.problem.train, one).factors if self._layers else {}
        signed = self.problem.formula.signed
        n, m = len(self.problem.train), min(len(self.problem.x_examples), MAX_X_TILE)
        costs = [self._layers[name].cost(found[0], n, m, signed) for name, found in kept.items()]
        self._formed, self._entry = (
            sum(cost.dense_numel for cost in costs),
            sum(cost.gram_flops_per_position_pair for cost in costs),
        )
        length, c = _tokens(self.problem.train, one)[0], self.problem.num_logits
        dense = 2 * self._formed * c * ((n + m) * length + c * n * m)
        self._most_x_bytes = MOST_X_BYTES if dense > self._entry * n * m * length**2 else FEW_X_BYTES
        # Inputs that several modules share are one tensor.
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for found in kept.values()
            for factor in found
            for tensor in _tensors(factor)
        }
        per_token = max(1, -(-sum(storages.values()) // _tokens(self.problem.train, one)[0]))
        activations = min(self.memory_bytes * ACTIVATION_SHARE, MOST_ACTIVATION_BYTES)
        affordable = int(activations / (ACTIVATIONS * per_token))
        largest = max(
            (self._layers[name].buffer(found[0], len(self.problem.train)) for name, found in kept.items()), default=0
        )
        wanted = max(LEAST_BUFFER, largest * self._sample.element_size())
        return Memory(
            per_token,
            buffer=int(min(LARGEST_BUFFER, self.memory_bytes * BUFFER_SHARE, wanted)),
            tokens=max(self._longest, min(MOST_TOKENS, affordable)),
        )

    def _least_bytes(self) -> int:
        """Return a budget that is sure to hold the two longest examples, and as little as the shares allow."""
        left = 1 - 3 * BUFFER_SHARE - (FALLBACK_SHARE if self._fallback else 0)
        longest = FRAGMENTATION * self._memory.per_token * self._longest
        own = max(2 * longest / (left - ACTIVATION_SHARE), (2 + ACTIVATIONS) * longest / left)
        return max(self._fallback_least, 1024 + int(own))

    @property
    def _fallback_least(self) -> int:
        """The smallest budget of which the fallback's share is enough for it."""
        try:
            if self._fallback is not None:
                self._fallback.plan()
        except MemoryBudgetError as error:
            return int(error.needed / FALLBACK_SHARE) + 1
        return 0

    @property
    def _fallback_bytes(self) -> int:
        return self._fallback.memory_bytes if self._fallback else 0

    def _side(self, examples: Examples, indices: Sequence[int]) -> Side:
        """Return every layer's factors of some examples, batch by batch."""
        collected: dict[str, list[Any]] = {name: [] for name in self._layers}
        irregular: set[str] = set()
        broken: list[Tensor] = []
        most_tokens = self._memory.tokens if hasattr(self, "_memory") else MOST_TOKENS
        for bucket in buckets(examples, indices, most_tokens) if self._layers else []:
            layers = {name: layer for name, layer in self._layers.items() if name not in irregular}
            try:
                with stage("propagation"):
                    batch = capture.factors(layers, self._call, examples.batch(bucket), self.problem.formula.signed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("no layer can be factored in some examples (%s): the jacobian engine takes them", error)
                return Side({}, frozenset(self._layers), None)
            irregular |= batch.irregular
            for name, factor in batch.of_layer.items():
                collected[name].append(factor)
            if batch.broken is not None:
                broken.append(batch.broken)
        regular = {name: found for name, found in collected.items() if name not in irregular}
        return Side(regular, frozenset(irregular), torch.cat(broken) if broken else None)

    def _module_contributions(
        self, layers: Mapping[str, Layer], train: Mapping[str, list[Any]], x: Mapping[str, list[Any]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what each module adds to a tile, float64 ``[D, n, C, x, C]``, and a parameter of it."""
        directions = self.problem.formula.directions
        first = {name: parameters_of(name, layer)[0] for name, layer in layers.items()}
        for apart in self.problem.layers:
            own = {name: layers[name] for name in first if self.problem.layer_name(first[name]) == apart}
            for names in group_by_shared_input(own, train, x):
                if len(names) == 1:
                    part = own[names[0]].kernel(train[names[0]], x[names[0]], directions, self._workspace)
                else:
                    members = [LinearPair(cast(LinearLayer, own[name]), train[name], x[name]) for name in names]
                    part = shared_input_kernel(members, directions, self._workspace)
                yield first[names[0]], part

    def _fallback_block(self, fallback: JacobianEngine, tile: Tile) -> Tensor:
        """Return the part of a tile that the parameters unknown to all layer types make."""
        sizes = fallback.plan(len(tile.train), len(tile.x))
        size, x_size = sizes.train_tile, sizes.x_tile
        trains = [tile.train[start : start + size] for start in range(0, len(tile.train), size)]
        xs = tuple(tile.x[start : start + x_size] for start in range(0, len(tile.x), x_size))
        rows = tuple((train, xs) for train in trains)
        parts: dict[Tile, Tensor] = {}
        for part, values in fallback.blocks(replace(sizes, tile_rows=rows, symmetric=False)):
            parts[part] = parts[part] + values if part in parts else values
        return torch.cat([torch.cat([parts[Tile(train, x)] for x in xs], dim=3) for train in trains], dim=1)


def _tokens(examples: Examples, indices: Sequence[int]) -> list[int]:
    """The lengths of some examples; where shapes are no lengths every example counts alike."""
    return [examples.shapes[index] if examples.padded else 1 for index in indices]


def _tensors(factor: Any) -> list[Tensor]:
    found = vars(factor).values() if hasattr(factor, "__dataclass_fields__") else [factor]
    return [leaf for leaf in tree_leaves(list(found)) if isinstance(leaf, torch.Tensor)]
