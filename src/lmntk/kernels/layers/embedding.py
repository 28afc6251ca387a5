"""Embeddings: only the rows of the tokens present have a gradient, and only tokens on both sides contribute."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Buffer, Gradients, Layer, Workspace


@dataclass(frozen=True)
class TokenGradients:
    """The gradients of a batch's embedding rows, one for each example and each of its different tokens.

    Attributes:
        token: The row's index, ``[B, L]``; -1 at repetitions of a token and at the padding token.
        gradients: Summed over the token's positions, ``[B, L, C, d]``; zero where `token` is -1.
    """

    token: Tensor
    gradients: Tensor


class EmbeddingLayer(Layer):
    """Word, position or segment embeddings: ∂W_t = Σ of G_l over the positions l of token t."""

    module: nn.Embedding
    parameters = frozenset({"weight"})

    def factors(self, inputs: Tensor, gradients: Gradients) -> TokenGradients:
        """Sum the output gradients of equal tokens of an example at the token's first position."""
        token = inputs.reshape(len(inputs), -1)
        equal = token[:, :, None] == token[:, None, :]
        first = equal.byte().argmax(dim=2) == torch.arange(token.shape[1], device=token.device)
        if self.module.padding_idx is not None:
            # In torch the row of the padding token never gets a gradient.
            first &= token != self.module.padding_idx
        both = torch.stack([gradient.reshape(*token.shape, -1) for gradient in gradients], dim=2)
        summed = (equal & first[:, :, None]).to(both.dtype) @ both.flatten(2)
        return TokenGradients(torch.where(first, token, -1), summed.view_as(both))

    def kernel(
        self,
        train: Sequence[TokenGradients],
        x: Sequence[TokenGradients],
        directions: Sequence[SignPlacement],
        workspace: Workspace,
    ) -> Tensor:
        """Multiply the rows of every token that occurs on both sides: float64 ``[D, n, C, x, C]``."""
        # Sorting tokens is least work, but its shapes depend on values, for which a GPU would have to stop.
        if train[0].token.device.type == "cpu":
            return _match_by_sorting(train, x, directions)
        return _match_by_mask(train, x, directions, workspace)


def _match_by_sorting(
    train: Sequence[TokenGradients], x: Sequence[TokenGradients], directions: Sequence[SignPlacement]
) -> Tensor:
    """Multiply, token by token, the rows of the examples that have it: ``einsum("rap,sbp->rasb")``."""
    (example, token, rows), (x_example, x_token, x_rows) = _by_token(train), _by_token(x)
    c = rows.shape[1]
    n, m = (sum(len(batch.token) for batch in side) for side in (train, x))
    result = torch.zeros(len(directions), n, c, m, c, dtype=torch.float64)
    bounds, x_bounds = _bounds(token), _bounds(x_token)
    for shared in bounds.keys() & x_bounds.keys():
        here, there = bounds[shared], x_bounds[shared]
        product = contract(rows[here].flatten(0, 1), x_rows[there].flatten(0, 1), directions)
        product = product.unflatten(2, (-1, c)).unflatten(1, (-1, c))
        index = example[here, None], x_example[None, there]
        # An example has one row a token, so that no place is added to twice.
        result.permute(1, 3, 0, 2, 4)[index] += product.permute(1, 3, 0, 2, 4)
    return result


def _match_by_mask(
    train: Sequence[TokenGradients],
    x: Sequence[TokenGradients],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
) -> Tensor:
    """Multiply all rows with all and mask the products of unequal tokens: no shape depends on values."""
    c = train[0].gradients.shape[2]
    widest = c * max(batch.token.numel() for batch in x)
    blocks = []
    for batch in train:
        size = max(1, workspace.capacity // (c * batch.token.shape[1] * widest))
        for chunk in map(TokenGradients, batch.token.split(size), batch.gradients.split(size)):
            blocks.append(torch.cat([_masked_products(chunk, other, directions, workspace) for other in x], dim=3))
    return torch.cat(blocks, dim=1)


def _masked_products(
    train: TokenGradients, x: TokenGradients, directions: Sequence[SignPlacement], workspace: Workspace
) -> Tensor:
    """Sum the products of rows of equal tokens, ``einsum("ilap,jmbp,iljm->iajb")``: float64 ``[D, n, C, x, C]``."""
    (n, length, c, _), (m, x_length) = train.gradients.shape, x.token.shape
    equal = (train.token[:, :, None, None] == x.token) & (train.token >= 0)[:, :, None, None]
    left, right = train.gradients.flatten(0, 2), x.gradients.flatten(0, 2)
    found = []
    for direction in directions:
        product = torch.mm(
            left.sign() if direction.sign_train else left,
            (right.sign() if direction.sign_x else right).T,
            out=workspace.take(Buffer.TOKEN_PRODUCTS, len(left), len(right)),
        ).view(n, length, c, m, x_length, c)
        product *= equal[:, :, None, :, :, None]
        found.append(product.sum(dim=1).sum(dim=3, dtype=torch.float64))
    return torch.stack(found)


def _by_token(batches: Sequence[TokenGradients]) -> tuple[Tensor, Tensor, Tensor]:
    """Join batches and order their rows by token; return example ``[R]``, token ``[R]`` and rows ``[R, C, d]``."""
    examples, tokens, rows = [], [], []
    start = 0
    for batch in batches:
        example, position = (batch.token >= 0).nonzero(as_tuple=True)
        examples.append(example + start)
        tokens.append(batch.token[example, position])
        rows.append(batch.gradients[example, position])
        start += len(batch.token)
    token = torch.cat(tokens)
    order = torch.argsort(token, stable=True)
    return torch.cat(examples)[order], token[order], torch.cat(rows)[order]


def _bounds(ordered: Tensor) -> dict[int, slice]:
    """Return the slice of each token's rows."""
    tokens, counts = torch.unique_consecutive(ordered, return_counts=True)
    stops = counts.cumsum(0).tolist()
    return {
        token: slice(stop - count, stop)
        for token, count, stop in zip(tokens.tolist(), counts.tolist(), stops, strict=True)
    }
