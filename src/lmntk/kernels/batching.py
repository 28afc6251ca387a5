"""Examples as engines see them: something with a length that hands out batches of examples of one shape."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

# The share of a batch that padding may make up: smaller batches than this asks for cost more than padding does.
MOST_PADDING = 0.08
# So many tokens of padding are less work than reading all weights once more, for another batch.
LITTLE_PADDING = 32

Batch = Any
"""A pytree (dict, tuple, tensor …) of tensors whose first axis runs over the examples, ``[B, ...]``."""


class Examples(Protocol):
    """The examples along one axis of a kernel."""

    @property
    def shapes(self) -> Sequence[Any]:
        """For each example something comparable; equal where examples can share a batch without padding.

        The number of tokens, say. Engines take examples in the order of it.
        """
        ...

    @property
    def padded(self) -> bool:
        """Whether shapes are numbers of tokens, and `batch` pads examples of different ones to the longest."""
        ...

    @property
    def equal_lengths(self) -> bool:
        """Whether only examples of one shape may share a batch, because the model would see the padding."""
        ...

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the examples at `indices`: all of one shape, unless `padded`."""
        ...


class BatchedExamples:
    """Examples given as ready batches, which are never padded.

    Args:
        batches: Pytrees of tensors, each tensor ``[B, ...]``.

    Raises:
        ValueError: Tensors of one batch differ in their number of examples.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.padded = False
        self.equal_lengths = True
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
    runs: list[list[int]] = []
    for _, run in groupby(indices, key=lambda index: examples.shapes[index]):
        members = list(run)
        runs.extend(members[start : start + limit] for start in range(0, len(members), limit))
    return runs


def buckets(examples: Examples, indices: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Cut `indices` into batches of nearly equal length: padding is work, and some models see it.

    Args:
        examples: The examples.
        indices: Some of them, ordered by shape.
        most_tokens: How many tokens a batch may have, padding included; without lengths, how many examples.
    """
    if not examples.padded:
        return equal_shape_runs(examples, indices, limit=most_tokens)
    found: list[list[int]] = []
    longest = tokens = 0
    for index in indices:
        length = examples.shapes[index]
        longest = max(longest, length)
        padded = longest * (len(found[-1]) + 1) if found else 0
        allowed = 0.0 if examples.equal_lengths else max(MOST_PADDING * padded, LITTLE_PADDING)
        if found and padded <= most_tokens and padded - (tokens + length) <= allowed:
            found[-1].append(index)
            tokens += length
        else:
            found.append([index])
            longest = tokens = length
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return what the tensors take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
