"""The error of projected kernels, measured on a sub-sample of the examples whose kernel is computed exactly as well.

The sub-sample's gradients are propagated once. Their factors give the exact kernel and, projected with several seeds,
the kernels of as many draws. Whatever is not projected is exact in all of them.

The relative error is ‖K̂ − K‖ / ‖K‖ in Frobenius norms. That of the whole kernel is estimated from the sub-sample: in a
kernel of N train examples with themselves, the n pairs of an example with itself stand for N such pairs, and the
n (n − 1) others for N (N − 1). How far the sub-sample may lead astray is estimated by resampling its examples (Efron
1979, "Bootstrap Methods: Another Look at the Jackknife").
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels import capture
from lmntk.kernels.batching import Examples, length_buckets
from lmntk.kernels.contraction import summation_dtype
from lmntk.kernels.engines.factored_planner import num_bytes, tokens_of
from lmntk.kernels.engines.fallback import fallback_tile
from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.engines.layer_selection import parameters_of
from lmntk.kernels.engines.projected import ProjectedEngine, projected_layer
from lmntk.kernels.formulas import UNSIGNED
from lmntk.kernels.layers import Layer, Workspace
from lmntk.kernels.layers.linear_factors import OuterProducts
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.projection import Projection
from lmntk.kernels.tiling import Tile

DEFAULT_EXAMPLES, FEWEST_EXAMPLES = 32, 2
NUM_DRAWS = 8
NUM_RESAMPLES = 200
# Shares of the memory budget that an earlier kernel's train tile leaves, or of a quarter of the budget if that is more:
# the factors of the sub-sample, and the largest buffer of exact products.
FACTOR_SHARE, BUFFER_SHARE = 0.4, 0.1

Progress = Callable[[Iterable[str]], Iterable[str]]


@dataclass(frozen=True)
class SampledKernels:
    """The kernels of n train examples with m examples: these train examples again, and then those of the other side.

    Attributes:
        exact: K, float64 ``[n, C, m, C]`` on the CPU.
        drawn: K̂ of each draw, ``[P, n, C, m, C]``.
    """

    exact: Tensor
    drawn: Tensor


@dataclass(frozen=True)
class EntryError:
    """Relative errors of a kernel's entries.

    Attributes:
        own: ‖K̂ − K‖ / ‖K‖ of the first draw, which is the kernel's own.
        sampling: The standard deviation of `own` over resampled examples: how far the sub-sample may lead astray.
        mean: The mean of the errors of all draws.
        std: Their standard deviation.
        median: The median of |K̂ − K| / |K| over the sub-sample's entries in the first draw.
    """

    own: float
    sampling: float
    mean: float
    std: float
    median: float

    @property
    def upper(self) -> float:
        """What a tolerance is compared with: the kernel's own error, or mean plus standard deviation if larger."""
        return max(self.own, self.mean + self.std)


class ProjectionCheck:
    """A sub-sample of a kernel's examples, whose kernels are computed exactly and estimated.

    Args:
        engine: The engine of the kernel; which projection it has makes no difference.
        size: How many examples of each side are taken, if there are so many: evenly spaced in order of length.

    Attributes:
        train: The train examples of the sub-sample, in order of length.
        x: Those of the other side; empty for the kernel of the train examples with themselves.
        longest_side: The length of the longest side of a weight that can be projected; 0 if there is none.
    """

    def __init__(self, engine: ProjectedEngine, size: int = DEFAULT_EXAMPLES) -> None:
        problem = engine.problem
        self.train = evenly_spaced(problem.train, size)
        self.x = () if problem.x is None else evenly_spaced(problem.x, size)
        self._engine, self._problem = engine, problem
        self._budget = MemoryBudget(max(engine.budget.bytes - engine.row_bytes, engine.budget.bytes // 4))
        batch = problem.train.batch([problem.typical_example])
        typical = capture.factors(engine.exact_layers, self._module_model, batch, signed=False)
        self._irregular = set(typical.irregular)
        self._layers = {name: engine.exact_layers[name] for name in typical.of_layer}
        self.longest_side = max(map(_longest_side, typical.of_layer.values()), default=0)
        self._workspace = self._make_workspace(typical.of_layer)
        self._groups = self._in_groups(typical.of_layer)
        # Of earlier calls: the factors if all fit into memory, and what is exact.
        self._held: dict[str, list[Any]] | None = None
        self._exact: dict[str, Tensor] = {}
        self._beside: Tensor | None = None

    def kernels(self, projections: Sequence[Projection], progress: Progress = iter) -> SampledKernels:
        """Compute the exact kernel of the sub-sample, and its estimates by some projections.

        Args:
            projections: One for each draw.
            progress: Wraps the names of the layers, for a progress bar.
        """
        n, m, c = len(self.train), len(self.train) + len(self.x), self._problem.num_logits
        exact = torch.zeros(n, c, m, c, dtype=torch.float64)
        drawn = exact.new_zeros(len(projections), n, c, m, c)
        for name, batches in self._factors(progress):
            layer = self._layers[name]
            of_train = batches[: self._number_of_train_batches]
            if name not in self._exact:
                self._exact[name] = self._contribution(layer, of_train, batches)
            own = self._exact[name]
            exact += own
            for draw, projection in zip(drawn, projections, strict=True):
                projected = projected_layer(layer, name, batches[0], projection)
                if projected is None:
                    draw += own
                else:
                    kept = [projected.factors(batch.inputs, batch.gradients) for batch in batches]
                    draw += self._contribution(projected, kept[: len(of_train)], kept)
        if self._beside is None:
            self._beside = self._fallback()
        return SampledKernels(exact + self._beside, drawn + self._beside)

    def entry_error(self, found: SampledKernels) -> EntryError:
        """Return the errors of the entries of the kernel: those with the other side, or of train with itself."""
        n, size = len(self.train), len(self._problem.train)
        if self.x:
            return entry_error(found.exact[:, :, n:], found.drawn[:, :, :, n:])
        return entry_error(found.exact, found.drawn, whole_train_size=size)

    @property
    def _module_model(self) -> Any:
        return self._problem.model

    @property
    def _number_of_train_batches(self) -> int:
        return len(self._buckets(self._problem.train, self.train))

    def _buckets(self, examples: Examples, indices: Sequence[int]) -> list[list[int]]:
        return length_buckets(examples, indices, self._engine.planner.memory.batch_tokens, self._engine.tuning)

    def _contribution(self, layer: Layer, train: Sequence[Any], both: Sequence[Any]) -> Tensor:
        return layer.kernel(train, both, [UNSIGNED], self._workspace)[0].cpu()

    def _factors(self, progress: Progress) -> Iterator[tuple[str, list[Any]]]:
        """Yield each layer's factors of all batches, those of train first; they are kept if all fit into memory."""
        if self._held is not None:
            yield from ((name, self._held[name]) for name in progress(list(self._held)))
            return
        names = iter(progress([name for group in self._groups for name in group]))
        for group in self._groups:
            collected = self._propagate(group)
            if len(self._groups) == 1:
                self._held = collected
            for _ in group:
                name = next(names)
                if name in collected:
                    yield name, collected[name] if self._held else collected.pop(name)

    def _propagate(self, group: Sequence[str]) -> dict[str, list[Any]]:
        """Return the factors of the layers of a group that are regular in all batches."""
        layers = {name: self._layers[name] for name in group}
        collected: dict[str, list[Any]] = {name: [] for name in group}
        for examples, indices in ((self._problem.train, self.train), (self._problem.x_examples, self.x)):
            for bucket in self._buckets(examples, indices) if indices else []:
                found = capture.factors(layers, self._module_model, examples.batch(bucket), signed=False)
                self._irregular |= found.irregular
                for name, factors in found.of_layer.items():
                    collected[name].append(factors)
        return {name: batches for name, batches in collected.items() if name not in self._irregular}

    def _fallback(self) -> Tensor:
        """Return what the parameters without factors contribute, which is exact in all draws; 0 if there are none."""
        irregular = {
            name for prefix in self._irregular for name in parameters_of(prefix, self._engine.exact_layers[prefix])
        }
        names = irregular.union(self._engine.fallback_parameters)
        if not names:
            return torch.zeros((), dtype=torch.float64)
        params = {name: value for name, value in self._problem.params.items() if name in names}
        whole = replace(self._problem, params=params, part_of=None, low_rank=None, projection=None)
        blocks = []
        for problem, x in ((replace(whole, x=None), self.train), (whole, self.x)):
            if x:
                engine = JacobianEngine(problem, self._budget.share(FACTOR_SHARE), self._engine.tuning)
                blocks.append(fallback_tile(engine, Tile(self.train, x), with_diagonal=False)[0][0].cpu())
        return torch.cat(blocks, dim=2)

    def _make_workspace(self, typical: dict[str, Any]) -> Workspace:
        engine = self._engine
        sample = next(iter(self._problem.params.values()))
        wanted = max((self._layers[name].buffer(one, len(self.train)) for name, one in typical.items()), default=0)
        size = summation_dtype(sample.dtype).itemsize
        allowed = self._budget.share(BUFFER_SHARE).bytes // size
        least = engine.tuning.min_buffer_bytes // size
        return Workspace(max(min(wanted, allowed), least), sample.dtype, sample.device)

    def _in_groups(self, typical: dict[str, Any]) -> list[list[str]]:
        """Group the layers so that the factors of a group fit into memory; one layer's may be larger."""
        problem, allowed = self._problem, self._budget.share(FACTOR_SHARE).bytes
        sides = (problem.train, self.train), (problem.x_examples, self.x)
        tokens = sum(sum(tokens_of(*side)) for side in sides) / tokens_of(problem.train, [problem.typical_example])[0]
        groups: list[list[str]] = [[]]
        held = 0.0
        for name, factors in typical.items():
            size = num_bytes([factors]) * tokens
            if groups[-1] and held + size > allowed:
                groups.append([])
                held = 0.0
            groups[-1].append(name)
            held += size
        return groups


def _longest_side(factors: Any) -> int:
    if not isinstance(factors, OuterProducts) or factors.inputs is None or factors.positions <= 1:
        return 0
    return max(factors.out_features, factors.inputs.shape[2])


def evenly_spaced(examples: Examples, size: int) -> tuple[int, ...]:
    """Return so many examples, or all, evenly spaced in order of length from the shortest to the longest."""
    order = sorted(range(len(examples)), key=lambda index: examples.shapes[index])
    size = min(size, len(order))
    return tuple(order[(2 * place + 1) * len(order) // (2 * size)] for place in range(size))


def entry_error(exact: Tensor, drawn: Tensor, whole_train_size: int | None = None) -> EntryError:
    """Return the relative errors of estimates of a kernel, whose own estimate is the first.

    Args:
        exact: K of the sub-sample, ``[n, C, x, C]``.
        drawn: K̂ of each draw, ``[P, n, C, x, C]``.
        whole_train_size: N, the train examples of the whole kernel, if both sides of it are train; n of them are here.
    """
    squares = (exact**2).sum(dim=(1, 3))
    errors = ((drawn - exact) ** 2).sum(dim=(2, 4))
    n, x = squares.shape
    generator = torch.Generator().manual_seed(0)
    counts = [_counts(n, generator), _counts(x, generator)]
    if whole_train_size is not None:
        counts[1] = counts[0]
    resampled = counts[0][:, :, None] * counts[1][:, None, :]
    weights = torch.ones(n, x, dtype=torch.float64)
    if whole_train_size is not None:
        # Of an example that is drawn twice, the pair of its copies stands for no pair of two examples.
        resampled.diagonal(dim1=1, dim2=2).copy_(counts[0])
        if n > 1:
            weights *= whole_train_size - 1
            weights.fill_diagonal_(n - 1)
    of_draws = (errors * weights).sum(dim=(1, 2)).div((squares * weights).sum()).sqrt()
    of_resamples = (errors[0] * weights * resampled).sum(dim=(1, 2)) / (squares * weights * resampled).sum(dim=(1, 2))
    relative = (drawn[0] - exact).abs() / exact.abs()
    return EntryError(
        own=float(of_draws[0]),
        sampling=float(of_resamples.sqrt().std()),
        mean=float(of_draws.mean()),
        std=float(of_draws.std()) if len(of_draws) > 1 else 0.0,
        median=float(relative[exact != 0].median()),
    )


def _counts(size: int, generator: torch.Generator) -> Tensor:
    """Return how often each of `size` examples is in each resample, float64 ``[R, size]``."""
    chosen = torch.randint(size, (NUM_RESAMPLES, size), generator=generator)
    return torch.zeros(NUM_RESAMPLES, size, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(chosen.shape, dtype=torch.float64)
    )
