"""The `factored` engine: gradients stay factors, and meet layer by layer.

N + X examples are propagated once, instead of N · X pairs; no gradient over all parameters is ever held. What no layer
type knows goes to the `jacobian` engine, parameter by parameter.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmntk.kernels import propagation
from lmntk.kernels.engines.base import Block, Engine, KernelProblem, MemoryBudgetError
from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.examples import Examples, buckets
from lmntk.kernels.layers import LAYERS, Layer, Workspace
from lmntk.kernels.machine import product_flops, seconds_of, stage
from lmntk.kernels.tiling import Plan, Tile, make_plan

# Large X tiles form the train side's gradients less often; beyond this a tile gains nothing and takes long to finish.
MOST_X = 512
# Tokens that are propagated together: enough for large products, few enough for their activations to be small.
MOST_TOKENS = 2048
# What activations take while a batch is propagated, in units of what is kept of it.
ACTIVATIONS = 2.0
# What forming and contraction reach of the rate of large square products.
PRODUCT_EFFICIENCY = 0.65
# Buffers beyond this size make products no faster.
LARGEST_BUFFER = 2**29
# The shares of the budget that each of three buffers, and activations, may take; the rest is for factors.
BUFFER_SHARE, ACTIVATION_SHARE = 0.12, 0.15


@dataclass(frozen=True)
class Memory:
    """What the engine's parts take, in bytes.

    Attributes:
        per_token: The factors of one token, all layers together.
        buffer: The largest of the buffers in which gradients are formed, of which there are three.
        tokens: How many tokens are propagated together.
    """

    per_token: int
    buffer: int
    tokens: int

    def total(self, train_tokens: int, x_tokens: int) -> int:
        """Return the peak with the factors of so many tokens on either side."""
        kept = self.per_token * (train_tokens + x_tokens)
        return int(kept + 3 * self.buffer + ACTIVATIONS * self.per_token * self.tokens)


class FactoredEngine(Engine):
    """Fastest, where the model's modules are known."""

    name = "factored"

    def __init__(self, problem: KernelProblem, memory_bytes: int) -> None:
        super().__init__(problem, memory_bytes)
        if problem.module is None or problem.call is None:
            raise ValueError("the factored engine needs the module, not a function alone")
        self._call = problem.call
        self._layers, unknown = find_layers(problem)
        self._fallback = (
            JacobianEngine(replace(problem, params={name: problem.params[name] for name in unknown}), memory_bytes // 4)
            if unknown
            else None
        )
        self._fallback_tiles = (1, 1)
        self._longest = max(
            max(_tokens(examples, range(len(examples))), default=1) for examples in (problem.train, problem.x_examples)
        )
        self._memory = self._divide_memory()
        dtype, device = self._sample.dtype, self._sample.device
        self._workspace = Workspace(self._memory.buffer // self._sample.element_size(), dtype, device)

    @property
    def summary(self) -> str:
        """Say how many parameters no layer type knows."""
        if self._fallback is None:
            return super().summary
        unknown = sum(tensor.numel() for tensor in self._fallback.problem.params.values())
        return f"{super().summary} (jacobian for {unknown:,} parameters of unknown layers)"

    @property
    def fallback_parameters(self) -> list[str]:
        """The parameters that no layer type knows."""
        return list(self._fallback.problem.params) if self._fallback else []

    def plan(self, train_tile: int | None = None, x_tile: int | None = None) -> Plan:
        """Lay tiles as large as memory allows: train examples first, whose factors stay."""
        problem = self.problem
        n, m = len(problem.train), len(problem.x_examples)
        room = self.memory_bytes - self._memory.total(0, 0)
        examples = int(room // (self._memory.per_token * self._longest))
        if examples < 2:
            raise MemoryBudgetError(self._least_bytes(), self.memory_bytes)
        train_tile = min(train_tile or max(1, examples // 2), n)
        x_tile = min(x_tile or max(1, min(examples - train_tile, max(MOST_X // 2, 2 * train_tile), MOST_X)), m)
        if self._fallback:
            unknown = self._fallback.plan(train_tile, x_tile)
            self._fallback_tiles = unknown.train_tile, unknown.x_tile
        return make_plan(problem.train.shapes, problem.x_examples.shapes, train_tile, x_tile, problem.symmetric)

    def blocks(self, plan: Plan) -> Iterator[Block]:
        """Propagate each train tile once and each X tile once per train tile, and contract layer by layer."""
        for train, x_tiles in plan.rows:
            train_factors = self._factors(self.problem.train, train)
            for x in x_tiles:
                same = self.problem.x is None and x == train
                x_factors = train_factors if same else self._factors(self.problem.x_examples, x)
                tile = Tile(train, x)
                yield tile, sum(self._parts(tile, train_factors, x_factors), start=torch.zeros((), dtype=torch.float64))

    def expected_bytes(self, plan: Plan) -> int:
        """Return the factors of both tiles, the buffers, and the activations of a batch."""
        train_tokens = max(sum(_tokens(self.problem.train, train)) for train, _ in plan.rows)
        x_tokens = max((sum(_tokens(self.problem.x_examples, tile.x)) for tile in plan), default=0)
        rest = self._fallback.memory_bytes if self._fallback else 0
        return self._memory.total(train_tokens, x_tokens) + rest

    def expected_seconds(self, plan: Plan) -> float:
        """Time the propagation of a few examples, and count the products."""
        problem = self.problem
        few = [problem.typical_example] * 8
        tokens = sum(_tokens(problem.train, few))
        propagation_seconds = seconds_of(lambda: self._factors(problem.train, few)) / tokens
        propagated = sum(
            sum(_tokens(problem.train, train)) + sum(sum(_tokens(problem.x_examples, x)) for x in x_tiles)
            for train, x_tiles in plan.rows
        )
        formed = sum(
            sum(_tokens(problem.train, tile.train)) + sum(_tokens(problem.x_examples, tile.x)) for tile in plan
        )
        c = problem.num_logits
        flops = 2 * self._formed * c * (formed + c * plan.pairs * len(problem.formula.directions))
        rate = product_flops(self._sample.device, self._sample.dtype)
        rest = self._fallback.expected_seconds(plan) if self._fallback else 0.0
        return propagation_seconds * propagated + flops / (PRODUCT_EFFICIENCY * rate) + rest

    @property
    def _sample(self) -> Tensor:
        assert self.problem.module is not None
        return next(self.problem.module.parameters())

    def _divide_memory(self) -> Memory:
        one = [self.problem.typical_example]
        kept = self._factors(self.problem.train, one) if self._layers else {}
        self._formed = sum(self._layers[name].formed(found[0]) for name, found in kept.items())
        # Inputs that several modules share are one tensor.
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for found in kept.values()
            for factor in found
            for tensor in _tensors(factor)
        }
        per_token = max(1, -(-sum(storages.values()) // _tokens(self.problem.train, one)[0]))
        affordable = int(self.memory_bytes * ACTIVATION_SHARE / (ACTIVATIONS * per_token))
        return Memory(
            per_token,
            buffer=int(min(LARGEST_BUFFER, self.memory_bytes * BUFFER_SHARE)),
            tokens=min(MOST_TOKENS, max(self._longest, affordable)),
        )

    def _least_bytes(self) -> int:
        """Return the smallest budget that holds the two longest examples."""
        left, longest = 1 - 3 * BUFFER_SHARE, self._memory.per_token * self._longest
        return 1024 + int(max(2 * longest / (left - ACTIVATION_SHARE), (2 + ACTIVATIONS) * longest / left))

    def _factors(self, examples: Examples, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Return every layer's factors of some examples, batch by batch."""
        collected: dict[str, list[Any]] = {name: [] for name in self._layers}
        most_tokens = self._memory.tokens if hasattr(self, "_memory") else MOST_TOKENS
        for bucket in buckets(examples, indices, most_tokens):
            with stage("propagation"):
                batch = propagation.factors(self._layers, self._call, examples.batch(bucket))
            for name, factor in batch.items():
                collected[name].append(factor)
        return collected

    def _parts(self, tile: Tile, train: Mapping[str, list[Any]], x: Mapping[str, list[Any]]) -> Iterator[Tensor]:
        """Yield what each layer, and the fallback, adds to a tile: float64 ``[D, n, C, x, C]``."""
        for name, layer in self._layers.items():
            yield layer.kernel(train[name], x[name], self.problem.formula.directions, self._workspace)
        if self._fallback is not None:
            yield self._rest(self._fallback, tile)

    def _rest(self, fallback: JacobianEngine, tile: Tile) -> Tensor:
        """Return the part of a tile that the parameters unknown to all layer types make."""
        size, x_size = self._fallback_tiles
        trains = [tile.train[start : start + size] for start in range(0, len(tile.train), size)]
        xs = tuple(tile.x[start : start + x_size] for start in range(0, len(tile.x), x_size))
        rows = tuple((train, xs) for train in trains)
        parts: dict[Tile, Tensor] = {}
        for part, values in fallback.blocks(Plan(rows, len(tile.train), len(tile.x), symmetric=False)):
            parts[part] = parts[part] + values if part in parts else values
        return torch.cat([torch.cat([parts[Tile(train, x)] for x in xs], dim=3) for train in trains], dim=1)


def find_layers(problem: KernelProblem) -> tuple[dict[str, Layer], list[str]]:
    """Find out which parameters which layer type can take, by looking at the modules and at one small batch.

    Returns:
        The layers by module name, and the parameters that are left: of modules of unknown type, of modules called
        twice or not with one tensor for each example, and parameters that several modules share.
    """
    assert problem.module is not None
    assert problem.call is not None
    wanted = set(problem.params)
    parameters = dict(problem.module.named_parameters())
    uses = Counter(id(p) for module in problem.module.modules() for p in module.parameters(recurse=False))
    layers: dict[str, Layer] = {}
    owned: dict[str, set[str]] = {}
    for name, module in problem.module.named_modules():
        own = {f"{name}.{local}".lstrip("."): local for local, _ in module.named_parameters(recurse=False)}
        counted = {full: local for full, local in own.items() if full in wanted and uses[id(parameters[full])] == 1}
        layer = LAYERS.get(type(module))
        if layer is not None and counted and set(counted.values()) <= layer.parameters:
            layers[name] = layer(module, frozenset(counted.values()))
            owned[name] = set(counted)
    if layers:
        typical = problem.typical_example
        record, _ = propagation.run(
            {name: layer.module for name, layer in layers.items()},
            problem.call,
            problem.train.batch([typical, typical]),
        )
        for name in list(layers):
            passage = record.passages.get(name)
            if passage is None or passage.calls != 1 or passage.output.shape[0] != 2 or passage.output.dim() < 2:
                del layers[name]
    known = {full for name in layers for full in owned[name]}
    return layers, [name for name in problem.params if name not in known]


def _tokens(examples: Examples, indices: Sequence[int]) -> list[int]:
    """The lengths of some examples; where shapes are no lengths every example counts alike."""
    return [examples.shapes[index] if examples.padded else 1 for index in indices]


def _tensors(factor: Any) -> list[Tensor]:
    found = vars(factor).values() if hasattr(factor, "__dataclass_fields__") else [factor]
    return [leaf for leaf in tree_leaves(list(found)) if isinstance(leaf, torch.Tensor)]
