"""The error of features: their kernel on some train examples, by several seeds, against the exact one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmntk.kernels.assembly import assemble, make_engine
from lmntk.kernels.batching import Batch, Examples
from lmntk.kernels.features import FeatureMap
from lmntk.kernels.memory import MemoryBudget
from lmntk.kernels.problem import KernelProblem
from lmntk.kernels.projection import Projection
from lmntk.kernels.projection_check import NUM_DRAWS, EntryError, entry_error, evenly_spaced

COLUMNS_AT_A_TIME = 2**16
"""Columns of features that are multiplied in float64 at a time."""

Progress = Callable[[Iterable[int]], Iterable[int]]

Batches = Callable[[FeatureMap, Examples, Iterable[int]], Iterator[list[int]]]
"""Cuts examples into batches for a map."""


@dataclass(frozen=True)
class ChosenExamples:
    """Some of the examples along an axis.

    Attributes:
        whole: All of them.
        chosen: Which are taken.
    """

    whole: Examples
    chosen: Sequence[int]

    @property
    def shapes(self) -> Sequence[Any]:
        """The shape of each example."""
        return [self.whole.shapes[index] for index in self.chosen]

    @property
    def padded(self) -> bool:
        """Whether shapes are numbers of tokens."""
        return self.whole.padded

    @property
    def equal_lengths(self) -> bool:
        """Whether only examples of one shape may share a batch."""
        return self.whole.equal_lengths

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return some of the chosen examples as one batch."""
        return self.whole.batch([self.chosen[index] for index in indices])


class FeatureCheck:
    """Some train examples, evenly spaced in order of length, whose exact kernel is computed once.

    Args:
        problem: The kernel of the train examples with themselves.
        size: How many are taken, if there are so many.
        budget: The memory of the exact kernel.
        batches: Cuts them into batches.

    Raises:
        MemoryBudgetError: The budget is too small.
    """

    def __init__(self, problem: KernelProblem, size: int, budget: MemoryBudget, batches: Batches) -> None:
        self._whole_size, self._batches = len(problem.train), batches
        self.examples = ChosenExamples(problem.train, evenly_spaced(problem.train, size))
        own = replace(problem, train=self.examples, x=None, part_of=None, low_rank=None, projection=None)
        engine = make_engine(own, "auto", budget)
        plan = engine.plan()
        self._exact = assemble(engine.blocks(plan), plan, own)[0]

    def held_bytes(self, mapped: FeatureMap) -> int:
        """Return the memory that the features of all examples take."""
        n, c = self._exact.shape[:2]
        return n * c * mapped.dimension * self._exact.element_size()

    def error(self, mapped: FeatureMap, draws: int = NUM_DRAWS, progress: Progress = iter) -> EntryError:
        """Return the relative errors of the entries of a map's kernel of all train examples with themselves.

        Args:
            mapped: The map, whose own seed is the first draw; the next ones follow it.
            draws: How many seeds are drawn.
            progress: Wraps their numbers, for a progress bar.
        """
        width, seed = mapped.projection.width, mapped.projection.seed
        kernels = [
            self._kernel(mapped.redrawn(Projection(width, seed + number)) if number else mapped)
            for number in progress(range(draws))
        ]
        return entry_error(self._exact, torch.stack(kernels), whole_train_size=self._whole_size)

    def _kernel(self, mapped: FeatureMap) -> Tensor:
        """Return the kernel of the features, float64 ``[n, C, n, C]``."""
        n, c = self._exact.shape[:2]
        features: Tensor | None = None
        for batch in self._batches(mapped, self.examples, range(n)):
            own = mapped.features(self.examples, batch)[0].detach().cpu()
            features = own.new_empty(n, c, mapped.dimension) if features is None else features
            features[batch] = own
        assert features is not None
        kernel = torch.zeros(n * c, n * c, dtype=torch.float64)
        for columns in features.flatten(0, 1).split(COLUMNS_AT_A_TIME, dim=1):
            wide = columns.double()
            kernel += wide @ wide.T
        return kernel.view(n, c, n, c)
