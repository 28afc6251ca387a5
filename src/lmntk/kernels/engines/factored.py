"""The `factored` engine: gradients stay factors, which are multiplied layer by layer.

This is Novak et al. 2022's ("Fast Finite Width Neural Tangent Kernel") *structured derivatives*: a layer's gradient is
kept in the form that its type gives it, such as a sum of outer products, and contracted without autograd ever forming
it. The layers' classes choose between forming it for a moment and Gram matrices.

* Time: (1 + C) passes over N + X examples, and per layer the cheaper of the two contractions. The N · X pairs cost
  matrix products only.
* Memory: the factors of a train tile and an X tile in all layers, about L · Σ (d_in + C · d_out) numbers an example,
  and three buffers for one layer's gradients. No gradient over all parameters is ever held.
* Where all directions take signs on both sides, linear layers' gradients are formed once, after the propagation of a
  batch, and kept as bits in place of factors, if there is enough to do and enough memory.
* Used by default if the model is a module. Parameters of modules that no layer type knows go to the `jacobian` engine;
  so does, tile by tile, a layer that some examples use in another way than the others.
"""

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lmntk.kernels import capture, sign_bits
from lmntk.kernels.batching import Examples, length_buckets
from lmntk.kernels.contraction import hide_diagonal_of_broken, hide_signs_of_broken, summation_dtype
from lmntk.kernels.engines.base import ANY_TILES, ComputedTile, Engine
from lmntk.kernels.engines.factored_planner import (
    FactoredPlanner,
    Fallback,
    KeptDemands,
    LayerDemands,
    num_bytes,
    tokens_of,
)
from lmntk.kernels.engines.fallback import fallback_diagonal, fallback_tile
from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.engines.layer_selection import find_layers, parameters_of
from lmntk.kernels.engines.side_factors import SideFactors, TrainRow
from lmntk.kernels.layers import Layer, Workspace
from lmntk.kernels.layers.linear import LinearLayer, LinearPair, group_by_shared_input, shared_input_parts
from lmntk.kernels.layers.linear_factors import pack_contiguous
from lmntk.kernels.low_rank import LowRankLayer
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelProblem, ModuleModel
from lmntk.kernels.tiling import CostModel, Plan, Tile, TileRequest, TileRow
from lmntk.kernels.timing import StageTimer, product_flops, seconds_of
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

logger = logging.getLogger(__name__)

# Examples whose propagation is timed: enough for a batch.
NUM_TIMED_EXAMPLES = 8


class FactoredEngine(Engine):
    """Structured derivatives: the fastest engine if the model's modules are known.

    Args:
        problem: As for `Engine`.
        budget: As for `Engine`.
        tuning: As for `Engine`.
        timer: As for `Engine`.
        earlier: The engine of another kernel of the same model, train examples and formula, which is not used any
            more: its layers, its measurements and the factors of its last train tile are taken over.
    """

    name = "factored"

    def __init__(
        self,
        problem: KernelProblem,
        budget: MemoryBudget,
        tuning: Tuning = DEFAULT_TUNING,
        timer: StageTimer | None = None,
        earlier: "FactoredEngine | None" = None,
    ) -> None:
        super().__init__(problem, budget, tuning, timer)
        if not isinstance(problem.model, ModuleModel):
            raise ValueError("the factored engine needs the module, not a function alone")
        self._model = problem.model
        self._sample = next(problem.model.module.parameters())
        known: dict[str, Layer] | None = earlier._found if earlier else None
        if earlier:
            earlier._workspace.release()
        self._found: dict[str, Layer]
        self._found, self._unknown = find_layers(problem, self._model, budget, tuning, known)
        self._layers = self._layers_to_keep(self._found)
        self._adapters = self._find_adapters()
        self._row: TrainRow | None = None
        self._seconds_per_token: float | None = None
        same_definition = earlier is not None and (
            earlier.problem.low_rank is problem.low_rank and earlier.problem.projection == problem.projection
        )
        if earlier and known == self._found and same_definition:
            self._row, self._seconds_per_token = earlier._row, earlier._seconds_per_token
            earlier._row = None
        self._fallbacks: dict[tuple[str, ...], JacobianEngine] = {}
        self._warned_of: frozenset[str] = frozenset()
        self._fallback = self._fallback_for(self._unknown) if self._unknown else None
        fallback = Fallback(self._fallback.budget.bytes, self._fallback.minimum_bytes) if self._fallback else None
        slice_bytes = problem.slice_bytes(fallback is not None)
        self._keeps_signs = False  # until it is known what factors take
        self.planner = FactoredPlanner(problem, budget, self._measure_demands(), fallback, tuning, slice_bytes)
        self._keeps_signs = self.planner.keeps_signs
        if earlier and earlier._keeps_signs != self._keeps_signs:
            self._seconds_per_token = None
        capacity = self.planner.memory.buffer // summation_dtype(self._sample.dtype).itemsize
        self._workspace: Workspace = Workspace(capacity, self._sample.dtype, self._sample.device, self.timer)

    def _layers_to_keep(self, found: dict[str, Layer]) -> dict[str, Layer]:
        """Return the layers, by module name, whose factors are kept and multiplied, of those that were found."""
        return found

    def summary(self, plan: Plan) -> str:
        """Return the engine's name, and how many parameters no layer type knows."""
        if self._fallback is None:
            return super().summary(plan)
        unknown = sum(tensor.numel() for tensor in self._fallback.problem.params.values())
        return f"{super().summary(plan)} (jacobian for {unknown:,} parameters of unknown layers)"

    @property
    def fallback_parameters(self) -> list[str]:
        """The parameters that no layer type knows."""
        return list(self._fallback.problem.params) if self._fallback else []

    @property
    def row_bytes(self) -> int:
        """The bytes of the train tile's factors that are kept for the next kernel."""
        batches = self._row.factors.of_layer.values() if self._row else []
        return num_bytes([batch for of_layer in batches for batch in of_layer])

    def plan(self, tiles: TileRequest = ANY_TILES, processes: int = 1) -> Plan:
        """Lay tiles as large as memory allows: train examples first, whose factors stay."""
        return self.planner.plan(tiles, processes)

    def expected_bytes(self, plan: Plan) -> int:
        """Return the factors of both tiles, the buffers, the activations of a batch, and blocks of slices, in bytes."""
        return self.planner.expected_bytes(plan)

    def estimate_cost(self, plan: Plan) -> CostModel:
        """Time the propagation of a few examples, and count the products."""
        examples = self.problem.train
        if self._seconds_per_token is None:
            few = [self.problem.typical_example] * NUM_TIMED_EXAMPLES
            batch_tokens = self.planner.memory.batch_tokens
            seconds = seconds_of(lambda: self._propagate(examples, few, batch_tokens))
            self._seconds_per_token = seconds / sum(tokens_of(examples, few))
        rate = product_flops(self._sample.device, summation_dtype(self._sample.dtype))
        fallback = self._fallback.estimate_cost(plan) if self._fallback else None
        sign_rate = sign_bits.products_per_second() if self._keeps_signs else None
        return self.planner.cost_model(self._seconds_per_token, rate, fallback, sign_rate)

    def tiles_of_group(
        self, plan: Plan, group: int, with_diagonal: Container[Tile] = frozenset()
    ) -> Iterator[ComputedTile]:
        """Propagate each train tile once, and each X tile once per train tile, and multiply layer by layer."""
        for row in plan.tile_rows:
            yield from self._tile_row(row, with_diagonal)

    def diagonal(self, plan: Plan, x: tuple[int, ...], group: int) -> Tensor:
        """Propagate X examples, and multiply the factors of each layer by layer."""
        side = self._propagate(self.problem.x_examples, x, self.planner.memory.batch_tokens)
        found = self._diagonal(side, side.irregular)
        fallback = self._fallback_beside(side.irregular)
        del side  # the fallback may need its memory
        return found if fallback is None else found + fallback_diagonal(fallback, x).to(found)

    def _tile_row(self, row: TileRow, with_diagonal: Container[Tile]) -> Iterator[ComputedTile]:
        """Compute the tiles of one train tile, whose factors are released before the next one's are computed."""
        side = self._train_factors(row.train)
        for tile in (Tile(row.train, x) for x in row.x_tiles):
            yield self._compute_tile(tile, side, tile in with_diagonal)

    def _train_factors(self, train: tuple[int, ...]) -> SideFactors:
        """Return the factors of a train tile, which an earlier kernel may have left, and keep them for the next one."""
        batch_tokens, kept = self.planner.memory.batch_tokens, self._row
        if kept is None or (kept.train, kept.batch_tokens) != (train, batch_tokens) or kept.signs > self._keeps_signs:
            self._row = kept = None  # released first
            side = self._propagate(self.problem.train, train, batch_tokens)
            side = replace(side, of_layer=pack_contiguous(self._joined(side.of_layer)))
        else:
            self._row = None  # until it is whole again
            side = kept.factors
            if self._keeps_signs and not kept.signs:
                side = replace(side, of_layer=self._joined(side.of_layer))
        self._row = TrainRow(train, batch_tokens, side, self._keeps_signs)
        return side

    def _joined(self, factors: dict[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """Return a train tile's factors as all its X tiles need them: if signs are kept, those of a layer are joined.

        Args:
            factors: The factors or signs of every layer; emptied, so that only one layer is held twice.
        """
        if not self._keeps_signs:
            return factors
        joined: dict[str, Sequence[Any]] = {}
        for name in list(factors):
            layer, batches = self._layer(name), factors.pop(name)
            joined[name] = layer.join_signs([layer.signs(batch, self._workspace) for batch in batches], self._workspace)
        return joined

    def _compute_tile(self, tile: Tile, train: SideFactors, with_diagonal: bool) -> ComputedTile:
        """Compute one tile; the factors of its X examples are released at the end."""
        batch_tokens = self.planner.memory.batch_tokens
        on_diagonal = self.problem.on_diagonal(tile)
        x = train if on_diagonal else self._propagate(self.problem.x_examples, tile.x, batch_tokens)
        irregular = train.irregular | x.irregular
        broken = train.broken, x.broken
        layers = {name: self._layer(name) for name in self._names if self._module(name) not in irregular}
        block, diagonal = None, None
        with self._workspace.keeping_diagonals(with_diagonal):
            if layers:
                block = self.problem.sum_by_slice(self._module_contributions(layers, train.of_layer, x.of_layer))
            if with_diagonal:
                diagonal = self._diagonal(x, irregular)
        del x  # the fallback may need its memory
        fallback = self._fallback_beside(irregular)
        if fallback is not None:
            own, of_fallback = fallback_tile(fallback, tile, with_diagonal)
            block = own if block is None else block.add_(own)
            if diagonal is not None and of_fallback is not None:
                diagonal = diagonal + of_fallback.to(diagonal)
        if block is None:
            raise ValueError("no parameter has a gradient to multiply")
        return ComputedTile(tile, hide_signs_of_broken(block, *broken), diagonal)

    def _diagonal(self, x: SideFactors, irregular: frozenset[str]) -> Tensor:
        """Return K(x, x) over the parameters of all regular layers, float64 ``[D, x, C, C]``; a 0 if there are none."""
        directions = self.problem.formula.directions
        total = torch.zeros((), dtype=torch.float64, device=self._sample.device)
        for name, layer in self._layers.items():
            if name not in irregular:
                total = total + layer.diagonal(x.of_layer[name], directions, self._workspace)
        return hide_diagonal_of_broken(total, x.broken) if total.dim() else total

    def _collection(self, name: str, size: int) -> Any:
        """Return what a layer's factors of so many examples are appended to, batch by batch."""
        return []

    def _propagate(self, examples: Examples, indices: Sequence[int], batch_tokens: int) -> SideFactors:
        """Return every layer's factors of some examples, batch by batch of at most so many tokens."""
        collected: dict[str, Any] = {name: self._collection(name, len(indices)) for name in self._names}
        irregular: frozenset[str] = frozenset()
        broken: list[Tensor] = []
        for bucket in length_buckets(examples, indices, batch_tokens, self.tuning) if self._layers else []:
            layers = {name: layer for name, layer in self._layers.items() if name not in irregular}
            try:
                with self.timer.stage("propagation"):
                    batch = capture.factors(layers, self._model, examples.batch(bucket), self.problem.formula.signed)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                logger.warning("no layer can be factored in some examples (%s): the jacobian engine takes them", error)
                return SideFactors({}, frozenset(self._layers), None)
            irregular |= batch.irregular
            of_layer = batch.of_layer
            of_layer |= {
                name: adapted.adapter.factors(of_layer[prefix])
                for name, (prefix, adapted) in self._adapters.items()
                if prefix in of_layer
            }
            for name in list(of_layer):
                factors, layer = of_layer.pop(name), self._layer(name)
                collected[name].append(layer.signs(factors, self._workspace) if self._keeps_signs else factors)
            if batch.broken is not None:
                broken.append(batch.broken)
        regular: dict[str, Sequence[Any]] = {
            name: batches for name, batches in collected.items() if self._module(name) not in irregular
        }
        return SideFactors(regular, irregular, torch.cat(broken) if broken else None)

    def _module_contributions(
        self, layers: Mapping[str, Layer], train: Mapping[str, Sequence[Any]], x: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what each module, or several that share inputs, adds to a part: float64 ``[D, n, C, x, C]``."""
        directions = self.problem.formula.directions
        for names in group_by_shared_input(layers, train, x):
            parts = [self._parts_of(name, layers[name]) for name in names]
            name, layer = names[0], layers[names[0]]
            if len(names) > 1:
                members = [LinearPair(cast(LinearLayer, layers[name]), train[name], x[name]) for name in names]
                yield from shared_input_parts(members, parts, directions, self._workspace).items()
            elif len({*parts[0].values()}) == 1:
                part = next(iter(parts[0].values()))
                yield part, layer.kernel(train[name], x[name], directions, self._workspace)
            else:
                found = layer.kernel_parts(train[name], x[name], directions, self._workspace)
                yield from ((parts[0][local], values) for local, values in found.items())

    def _parts_of(self, prefix: str, layer: Layer) -> dict[str, str]:
        """Return the slice of a block that each of a layer's parameters belongs to."""
        if prefix in self._adapters:
            return {"weight": prefix}
        locals_and_names = zip(sorted(layer.parameter_names), parameters_of(prefix, layer), strict=True)
        return {local: self.problem.part_name(name) for local, name in locals_and_names}

    def _find_adapters(self) -> dict[str, tuple[str, LowRankLayer]]:
        """Return the modules, and the layers, of the adapters by name; the fallback has the others."""
        wanted, found = self.problem.low_rank or {}, {}
        for prefix, layer in self._layers.items():
            for local, name in zip(sorted(layer.parameter_names), parameters_of(prefix, layer), strict=True):
                if name in wanted and local == "weight" and isinstance(layer, LinearLayer):
                    found[name] = prefix, LowRankLayer(layer, wanted[name], self.tuning)
        return found

    @property
    def _names(self) -> list[str]:
        """The names of the layers, those of adapters last."""
        return [*self._layers, *self._adapters]

    def _layer(self, name: str) -> Layer:
        return self._adapters[name][1] if name in self._adapters else self._layers[name]

    def _module(self, name: str) -> str:
        """Return the name of the module whose factors a layer needs."""
        return self._adapters[name][0] if name in self._adapters else name

    def _fallback_for(self, names: Sequence[str]) -> JacobianEngine:
        key = tuple(names)
        if key not in self._fallbacks:
            problem = replace(self.problem, params={name: self.problem.params[name] for name in names})
            share = self.budget.share(self.tuning.fallback_share)
            self._fallbacks[key] = JacobianEngine(problem, share, self.tuning, self.timer)
        return self._fallbacks[key]

    def _fallback_beside(self, irregular: frozenset[str]) -> JacobianEngine | None:
        """Return the engine for the parameters that no layer type knows and for those of irregular layers."""
        if not irregular:
            return self._fallback
        if irregular - self._warned_of:
            self._warned_of |= irregular
            which = ", ".join(sorted(irregular)[:3]) + (" and others" if len(irregular) > 3 else "")
            logger.warning(
                "some examples use %s in another way than those that were tried: the jacobian engine takes its "
                "parameters there",
                which,
            )
        more = {name for prefix in irregular for name in parameters_of(prefix, self._layers[prefix])}
        return self._fallback_for([name for name in self.problem.params if name in more or name in self._unknown])

    def _measure_demands(self) -> LayerDemands:
        """Measure the factors of a typical example, and count what its products cost."""
        problem, one = self.problem, [self.problem.typical_example]
        kept = self._propagate(problem.train, one, self.tuning.batch_tokens).of_layer
        n, m = len(problem.train), min(len(problem.x_examples), self.tuning.max_x_tile)
        found = [(self._layer(name), batches[0]) for name, batches in kept.items()]
        costs = [layer.cost(factors, n, m, problem.formula.signed) for layer, factors in found]
        tokens = tokens_of(problem.train, one)[0]
        buffer = max((layer.buffer(factors, n) for layer, factors in found), default=0)
        demands = LayerDemands(
            per_token=max(1, -(-num_bytes([factors for _, factors in found]) // tokens)),
            buffer_bytes=buffer * summation_dtype(self._sample.dtype).itemsize,
            dense_numel=sum(cost.dense_numel for cost in costs),
            gram_flops=sum(cost.gram_flops_per_position_pair for cost in costs),
        )
        if not self._signs_pay(demands):
            return demands
        others = [factors for layer, factors in found if not layer.sign_bytes(factors)]
        planes = [layer.sign_bytes(factors) for layer, factors in found]
        signs = KeptDemands(sum(planes), per_token=num_bytes(others) // tokens, largest=max(planes, default=0))
        return replace(demands, kept=signs)

    def _signs_pay(self, demands: LayerDemands) -> bool:
        """Return whether signs are all that counts, can be bits, and are multiplied so often that it saves time.

        Earlier kernels of the process make no difference, so that a stopped kernel is planned again as it was.
        """
        problem = self.problem
        if not all(direction.sign_train and direction.sign_x for direction in problem.formula.directions):
            return False
        pairs = len(problem.train) * len(problem.x_examples) / (2 if problem.symmetric else 1)
        flops = 2.0 * demands.dense_numel * problem.num_logits**2 * pairs
        return flops >= self.tuning.sign_bits_flops and sign_bits.available(self._sample)
