"""Embeddings: only the rows of the tokens present have a gradient, and only tokens on both sides meet."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract
from lmntk.kernels.formulas import Direction
from lmntk.kernels.layers.base import Gradients, Layer, Workspace


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that have a gradient, one for each example and each of its different tokens.

    Attributes:
        example: Which example of the batch, ``[R]``.
        token: Which row of the embeddings, ``[R]``.
        gradients: Summed over the token's positions, ``[R, C, d]``.
        size: B, the number of examples in the batch.
    """

    example: Tensor
    token: Tensor
    gradients: Tensor
    size: int


class EmbeddingLayer(Layer):
    """Word, position or segment embeddings: ∂W_t = Σ of G_l over the positions l of token t."""

    module: nn.Embedding
    parameters = frozenset({"weight"})

    def factors(self, inputs: Tensor, gradients: Gradients) -> Rows:
        """Sum the output gradients of equal tokens, example by example."""
        size = len(inputs)
        inputs = inputs.reshape(size, -1)
        vocabulary = self.module.num_embeddings
        keys = inputs + vocabulary * torch.arange(size, device=inputs.device)[:, None]
        found, row_of = torch.unique(keys, return_inverse=True)
        both = torch.stack([gradient.reshape(inputs.numel(), -1) for gradient in gradients], dim=1)
        summed = both.new_zeros(len(found), *both.shape[1:]).index_add_(0, row_of.flatten(), both)
        token = found % vocabulary
        # The row of the padding token never gets a gradient, as torch has it.
        kept = token != (-1 if self.module.padding_idx is None else self.module.padding_idx)
        return Rows((found // vocabulary)[kept], token[kept], summed[kept], size)

    def kernel(
        self, train: Sequence[Rows], x: Sequence[Rows], directions: Sequence[Direction], workspace: Workspace
    ) -> Tensor:
        """Multiply the rows of every token that occurs on both sides: float64 ``[D, n, C, x, C]``."""
        left, right = _by_token(train), _by_token(x)
        c = left.gradients.shape[1]
        result = torch.zeros(len(directions), left.size, c, right.size, c, dtype=torch.float64)
        result = result.to(left.token.device)
        left_bounds, right_bounds = _bounds(left.token), _bounds(right.token)
        for token in left_bounds.keys() & right_bounds.keys():
            (start, stop), (x_start, x_stop) = left_bounds[token], right_bounds[token]
            rows, columns = left.gradients[start:stop], right.gradients[x_start:x_stop]
            product = contract(rows.flatten(0, 1), columns.flatten(0, 1), directions)
            product = product.view(len(directions), len(rows), c, len(columns), c)
            index = left.example[start:stop, None], right.example[None, x_start:x_stop]
            # An example has one row a token, so that no place is hit twice.
            result.permute(1, 3, 0, 2, 4)[index] += product.permute(1, 3, 0, 2, 4)
        return result


def _by_token(batches: Sequence[Rows]) -> Rows:
    """Join batches, their examples numbered on, their rows ordered by token."""
    starts = [sum(rows.size for rows in batches[:position]) for position in range(len(batches))]
    token = torch.cat([rows.token for rows in batches])
    order = torch.argsort(token, stable=True)
    example = torch.cat([rows.example + start for rows, start in zip(batches, starts, strict=True)])
    gradients = torch.cat([rows.gradients for rows in batches])
    return Rows(example[order], token[order], gradients[order], sum(rows.size for rows in batches))


def _bounds(ordered: Tensor) -> dict[int, tuple[int, int]]:
    """Where each token's rows begin and end."""
    tokens, counts = torch.unique_consecutive(ordered, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return {
        token: (stop - count, stop) for token, count, stop in zip(tokens.tolist(), counts.tolist(), stops, strict=True)
    }
