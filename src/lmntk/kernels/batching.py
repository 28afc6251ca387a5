"""Examples as engines see them: items with a length, from which batches of one shape are taken."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

Batch = Any
"""A pytree (dict, tuple, tensor …) of tensors whose first axis runs over the examples, ``[B, ...]``."""


class Examples(Protocol):
    """The examples along one axis of a kernel."""

    @property
    def shapes(self) -> Sequence[Any]:
        """A comparable value for each example, such as its number of tokens, by which engines order them.

        Examples of equal shape can share a batch without padding.
        """
        ...

    @property
    def padded(self) -> bool:
        """Whether shapes are numbers of tokens, and `batch` pads examples to the longest."""
        ...

    @property
    def equal_lengths(self) -> bool:
        """Whether only examples of one shape may share a batch, because the model would see the padding."""
        ...

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the examples at `indices` as one batch; they have one shape unless `padded`."""
        ...


class BatchedExamples:
    """Examples given as ready batches, which are never padded.

    Args:
        batches: Pytrees of tensors, each tensor ``[B, ...]``.

    Raises:
        ValueError: Tensors of one batch differ in their number of examples.

    Example:
        >>> examples = BatchedExamples([torch.zeros(2, 3), torch.zeros(1, 3)])
        >>> len(examples), examples.batch([0, 2]).shape
        (3, torch.Size([2, 3]))
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.padded = False
        self.equal_lengths = True
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self._examples: list[tuple[Batch, int]] = []
        for batch in batches:
            leaves, _ = tree_flatten(batch)
            sizes = {len(leaf) for leaf in leaves}
            if len(sizes) != 1:
                raise ValueError(f"the tensors of a batch must agree on the number of examples, not have {sizes}")
            shape = tuple(tuple(leaf.shape[1:]) for leaf in leaves)
            for index in range(sizes.pop()):
                self.shapes.append(shape)
                self._examples.append((batch, index))

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return copies of the examples at `indices`, stacked."""
        chosen = [self._examples[i] for i in indices]
        singles = [tree_map(lambda leaf, index=index: leaf[index], batch) for batch, index in chosen]
        return tree_map(lambda *leaves: torch.stack(leaves), *singles)


def equal_shape_batches(examples: Examples, indices: Sequence[int], limit: int) -> list[list[int]]:
    """Split `indices`, in their order, into batches of at most `limit` examples of one shape."""
    batches: list[list[int]] = []
    for _, group in groupby(indices, key=lambda index: examples.shapes[index]):
        members = list(group)
        batches.extend(members[start : start + limit] for start in range(0, len(members), limit))
    return batches


def length_buckets(
    examples: Examples, indices: Sequence[int], max_tokens: int, tuning: Tuning = DEFAULT_TUNING
) -> list[list[int]]:
    """Split `indices` into batches of nearly equal length: padding is work, and some models see it.

    Args:
        examples: The examples of one side.
        indices: Some of them, ordered by shape.
        max_tokens: Tokens of a batch, padding included; examples of a batch where these have no lengths.
        tuning: Bounds the padding.
    """
    if not examples.padded:
        return equal_shape_batches(examples, indices, limit=max_tokens)
    found: list[list[int]] = []
    longest = tokens = 0
    for index in indices:
        length = examples.shapes[index]
        longest = max(longest, length)
        padded = longest * (len(found[-1]) + 1) if found else 0
        allowed = 0.0 if examples.equal_lengths else max(tuning.max_padding * padded, tuning.min_padding_tokens)
        if found and padded <= max_tokens and padded - (tokens + length) <= allowed:
            found[-1].append(index)
            tokens += length
        else:
            found.append([index])
            longest = tokens = length
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
