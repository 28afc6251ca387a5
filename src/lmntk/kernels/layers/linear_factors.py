"""Gradients of a weight as sums of outer products, and where they lie in memory."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OuterProducts:
    """The factors of a batch: example i's gradient of logit c is ``gradients[c][i].T @ inputs[i]``.

    Attributes:
        inputs: A, ``[B, L, d_in]``; None where the weight does not count.
        gradients: G of each logit, ``[B, L, d_out]``.
        biases: G summed over positions, ``[B, C, d_out]``; None where the bias does not count.
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
        """d_out."""
        return self.gradients[0].shape[2]

    @property
    def positions(self) -> int:
        """L, the number of outer products that an example's gradient is a sum of."""
        return self.gradients[0].shape[1]

    def __getitem__(self, part: slice) -> "OuterProducts":
        """Return the factors of some examples of the batch."""
        inputs = None if self.inputs is None else self.inputs[part]
        return OuterProducts(
            inputs,
            [gradient[part] for gradient in self.gradients],
            None if self.biases is None else self.biases[part],
        )


def shape_of(factors: Sequence[OuterProducts]) -> tuple[int, int, int, int]:
    """Return C, the number of examples, d_out and d_in."""
    inputs = factors[0].inputs
    assert inputs is not None
    examples = sum(factor.batch_size for factor in factors)
    return len(factors[0].gradients), examples, factors[0].out_features, inputs.shape[2]


def flattened(factors: Sequence[OuterProducts]) -> OuterProducts:
    """Put all positions of all examples into one row: ``[positions, d]``."""
    inputs = [factor.inputs for factor in factors if factor.inputs is not None]
    gradients = zip(*(factor.gradients for factor in factors), strict=True)
    return OuterProducts(_as_matrix(inputs), [_as_matrix(logit) for logit in gradients], None)


def _as_matrix(parts: Sequence[Tensor]) -> Tensor:
    """Join ``[B, L, d]`` of any B and L to ``[positions, d]``; without a copy where they lie behind one another."""
    first, d = parts[0], parts[0].shape[2]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        elsewhere = part.data_ptr() != end or part.untyped_storage().data_ptr() != storage
        if elsewhere or not part.is_contiguous():
            return torch.cat([part.flatten(0, 1) for part in parts])
        end += part.numel() * part.element_size()
    return first.as_strided((sum(part.shape[0] * part.shape[1] for part in parts), d), (d, 1))


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common only if they are the same numbers in the same places of memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def pack_contiguous(factors: MutableMapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Lay the batches of every linear layer behind one another in memory; what layers share they go on sharing.

    Gram matrices of all train examples at once then need no copy for each tile.

    Args:
        factors: Is empty at the end, so that never more than a layer's factors are there twice.
    """
    places: dict[tuple[object, ...], list[Tensor]] = {}
    result = {}
    for name in list(factors):
        found = factors.pop(name)
        result[name] = _packed(found, places) if found and isinstance(found[0], OuterProducts) else found
    return result


def _packed(factors: Sequence[OuterProducts], places: dict[tuple[object, ...], list[Tensor]]) -> list[OuterProducts]:
    inputs = [factor.inputs for factor in factors if factor.inputs is not None]
    if not inputs:
        return list(factors)
    key = tuple(map(storage_key, inputs))
    if key not in places:
        places[key] = _contiguous_copies(inputs)
    gradients = zip(*map(_contiguous_copies, zip(*(factor.gradients for factor in factors), strict=True)), strict=True)
    return [
        OuterProducts(own, logits, factor.biases)
        for own, logits, factor in zip(places[key], gradients, factors, strict=True)
    ]


def _contiguous_copies(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copy ``[B, L, d]`` of any B and L into one piece of memory."""
    whole = torch.cat([part.flatten(0, 1) for part in parts])
    rows = whole.split([part.shape[0] * part.shape[1] for part in parts])
    return [row.view(part.shape) for row, part in zip(rows, parts, strict=True)]
