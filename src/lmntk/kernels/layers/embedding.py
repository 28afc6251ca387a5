"""Embeddings: only the rows of the tokens present have a gradient, and only tokens on both sides contribute."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lmntk.kernels.contraction import contract_each, widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Buffer, Gradients, Layer, Workspace
from lmntk.kernels.layers.token_matching import TokenGradients, match_tokens


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
        wide = widened(both).flatten(2)
        summed = (equal & first[:, :, None]).to(wide.dtype) @ wide
        return TokenGradients(torch.where(first, token, -1), summed.to(both.dtype).view_as(both))

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
            return match_tokens(train, x, directions)
        return _match_by_mask(train, x, directions, workspace)

    def diagonal(
        self, x: Sequence[TokenGradients], directions: Sequence[SignPlacement], workspace: Workspace
    ) -> Tensor:
        """Multiply each example's rows, which belong to different tokens: float64 ``[D, x, C, C]``."""
        # A token's rows of all logits are multiplied, [B · L, C, d] by themselves, and added up over the tokens.
        found = []
        for batch in x:
            products = contract_each(batch.gradients.flatten(0, 1), directions)
            found.append(products.unflatten(1, batch.token.shape).sum(dim=2))
        return torch.cat(found, dim=1)


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
    left, right = widened(train.gradients).flatten(0, 2), widened(x.gradients).flatten(0, 2)
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
