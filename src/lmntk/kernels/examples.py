"""Examples as engines see them: something with a length that hands out batches of examples of one shape."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

Batch = Any
"""A pytree (dict, tuple, tensor …) of tensors whose first axis runs over the examples, ``[B, ...]``."""


class Examples(Protocol):
    """The examples along one axis of a kernel.

    Attributes:
        shapes: For each example something comparable that tells which examples can share a batch without padding: its
            number of tokens, say. Engines take examples in the order of it.
    """

    shapes: Sequence[Any]

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the examples at `indices`, which are all of one shape."""
        ...


class BatchedExamples:
    """Examples given as ready batches.

    Args:
        batches: Pytrees of tensors, each tensor ``[B, ...]``.

    Raises:
        ValueError: Tensors of one batch differ in their number of examples.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self._rows: list[tuple[Batch, int]] = []
        for batch in batches:
            leaves, _ = tree_flatten(batch)
            sizes = {len(leaf) for leaf in leaves}
            if len(sizes) != 1:
                raise ValueError(f"the tensors of a batch must agree on the number of examples, not have {sizes}")
            shape = tuple(tuple(leaf.shape[1:]) for leaf in leaves)
            for row in range(sizes.pop()):
                self.shapes.append(shape)
                self._rows.append((batch, row))

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the examples at `indices`, stacked anew."""
        rows = [tree_map(lambda leaf, row=row: leaf[row], batch) for batch, row in (self._rows[i] for i in indices)]
        return tree_map(lambda *leaves: torch.stack(leaves), *rows)


def equal_shape_runs(examples: Examples, indices: Sequence[int], limit: int) -> list[list[int]]:
    """Cut `indices` into runs of examples of one shape, none longer than `limit`."""
    runs = []
    for _, run in groupby(indices, key=lambda index: examples.shapes[index]):
        members = list(run)
        runs.extend(members[start : start + limit] for start in range(0, len(members), limit))
    return runs


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return what the tensors take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
