"""Gradients of a weight as sums of outer products, and their layout in memory."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from lmntk.kernels.contraction import summation_dtype


@dataclass(frozen=True)
class OuterProducts:
    """The factors of a batch: example i's gradient of logit c is ``einsum("lo,li->oi", gradients[c][i], inputs[i])``.

    Attributes:
        inputs: A, ``[B, L, d_in]``; None if gradients are not taken over the weight.
        gradients: G of each logit, ``[B, L, d_out]``.
        biases: G summed over positions, ``[B, C, d_out]``; None if gradients are not taken over the bias.
    """

    inputs: Tensor | None
    gradients: Sequence[Tensor]
    biases: Tensor | None

    @property
    def batch_size(self) -> int:
        """B, the number of examples."""
        return len(self.gradients[0])

    @property
    def out_features(self) -> int:
        """d_out, the length of an output gradient at one position."""
        return self.gradients[0].shape[2]

    @property
    def positions(self) -> int:
        """L, the number of outer products in an example's gradient."""
        return self.gradients[0].shape[1]

    @property
    def product_size(self) -> int:
        """Bytes of a number of the gradients that are formed of these factors, see `summation_dtype`."""
        return summation_dtype(self.gradients[0].dtype).itemsize

    def __getitem__(self, examples: slice) -> "OuterProducts":
        """Return the factors of some examples of the batch."""
        return OuterProducts(
            None if self.inputs is None else self.inputs[examples],
            [gradient[examples] for gradient in self.gradients],
            None if self.biases is None else self.biases[examples],
        )


@dataclass(frozen=True)
class Matrices:
    """Factors without regard to examples: one row for each position.

    Attributes:
        inputs: A, ``[positions, d_in]``.
        gradients: G of each logit, ``[positions, d_out]``.
    """

    inputs: Tensor
    gradients: Sequence[Tensor]


class PackedFactors(Sequence[OuterProducts]):
    """The batches of a tile whose factors are consecutive in memory, so that Gram matrices need no copies.

    Args:
        batches: The batches, views of `whole`.
        whole: The factors of all positions of all batches, in order.
    """

    def __init__(self, batches: Sequence[OuterProducts], whole: Matrices) -> None:
        self._batches = batches
        self.whole = whole

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> OuterProducts: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[OuterProducts]: ...

    def __getitem__(self, index: int | slice) -> OuterProducts | Sequence[OuterProducts]:
        return self._batches[index]


BatchSlice = tuple[int, slice]
"""Some examples of a batch: the number of the batch, and which of its examples."""


def shape_of(factors: Sequence[OuterProducts]) -> tuple[int, int, int, int]:
    """Return C, the number of examples, d_out and d_in."""
    inputs = factors[0].inputs
    assert inputs is not None
    examples = sum(factor.batch_size for factor in factors)
    return len(factors[0].gradients), examples, factors[0].out_features, inputs.shape[2]


def as_matrices(factors: Sequence[OuterProducts], chosen: Sequence[BatchSlice]) -> Matrices:
    """Return the factors of consecutive examples with one row for each position; no copy of packed factors.

    Args:
        factors: The batches of a tile.
        chosen: Examples of one or more consecutive batches, without gaps.
    """
    if isinstance(factors, PackedFactors):
        (first, start), (last, stop) = chosen[0], chosen[-1]
        offsets = [0]
        for batch in factors:
            offsets.append(offsets[-1] + batch.batch_size * batch.positions)
        rows = slice(
            offsets[first] + start.start * factors[first].positions,
            offsets[last] + stop.stop * factors[last].positions,
        )
        return Matrices(factors.whole.inputs[rows], [logit[rows] for logit in factors.whole.gradients])
    batches = [factors[number][examples] for number, examples in chosen]
    return _as_matrices(batches)


def _as_matrices(batches: Sequence[OuterProducts]) -> Matrices:
    gradients = zip(*(batch.gradients for batch in batches), strict=True)
    return Matrices(
        _as_matrix([batch.inputs for batch in batches if batch.inputs is not None]),
        [_as_matrix(logit) for logit in gradients],
    )


def _as_matrix(tensors: Sequence[Tensor]) -> Tensor:
    """Join ``[B, L, d]`` of any B and L to ``[positions, d]``; a single contiguous tensor is not copied."""
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    return flat[0].contiguous() if len(flat) == 1 else torch.cat(flat)


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for two tensors only if they are the same view of the same storage."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def key_of(factors: Sequence[OuterProducts]) -> tuple[object, ...]:
    """Return a key of a layer's factors of a tile, by which another call knows them while they are held."""
    both = [(batch.gradients[0], batch.gradients[0] if batch.inputs is None else batch.inputs) for batch in factors]
    return tuple((storage_key(gradient), storage_key(inputs)) for gradient, inputs in both)


def pack_contiguous(factors: MutableMapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Copy the batches of every linear layer to consecutive memory; what layers share is shared still.

    Args:
        factors: The batches' factors by layer; emptied, so that only one layer's factors are held twice.
    """
    shared: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name in list(factors):
        batches = factors.pop(name)
        weighted = all(isinstance(batch, OuterProducts) and batch.inputs is not None for batch in batches)
        result[name] = _packed(batches, shared) if batches and weighted else batches
    return result


def _packed(batches: Sequence[OuterProducts], shared: dict[tuple[object, ...], Tensor]) -> PackedFactors:
    def joined(tensors: Sequence[Tensor]) -> Tensor:
        key = tuple(map(storage_key, tensors))
        if key not in shared:
            shared[key] = torch.cat([tensor.flatten(0, 1) for tensor in tensors])
        return shared[key]

    inputs = joined([batch.inputs for batch in batches if batch.inputs is not None])
    gradients = [joined(logit) for logit in zip(*(batch.gradients for batch in batches), strict=True)]
    whole = Matrices(inputs, gradients)
    views, start = [], 0
    for batch in batches:
        rows = slice(start, start + batch.batch_size * batch.positions)
        shape = batch.batch_size, batch.positions, -1
        views.append(
            OuterProducts(
                whole.inputs[rows].view(shape), [logit[rows].view(shape) for logit in gradients], batch.biases
            )
        )
        start = rows.stop
    return PackedFactors(views, whole)
