"""Products of embeddings' gradients: the rows of every token that occurs on both sides, multiplied and summed.

A call of torch costs as much as thousands of products, and a tile of prompts shares hundreds of tokens. So tokens that
most examples have, such as positions, segments and the words of a template, are multiplied together; so are those of
few examples, pair by pair. Only the tokens in between cost a product each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmntk.kernels.contraction import BLOCK, contract, widened
from lmntk.kernels.formulas import SignPlacement

# A token of few examples is multiplied pair by pair: the most numbers that all its pairs' rows of one side may have. A
# product of its own costs about what copying so many does.
PAIRED_NUMBERS = 2**15
# Numbers of one side's rows that are copied for pairs at a time.
NUMBERS_AT_A_TIME = 2**21
# Numbers of both sides' rows that are laid side by side at a time, for tokens that most examples have.
ALIGNED_NUMBERS = 2**24


@dataclass(frozen=True)
class TokenGradients:
    """The gradients of a batch's embedding rows, one for each example and each of its different tokens.

    Attributes:
        token: The row's index, ``[B, L]``; -1 at repetitions of a token and at the padding token.
        gradients: Summed over the token's positions, ``[B, L, C, d]``; zero where `token` is -1.
    """

    token: Tensor
    gradients: Tensor


def match_tokens(
    train: Sequence[TokenGradients], x: Sequence[TokenGradients], directions: Sequence[SignPlacement]
) -> Tensor:
    """Multiply the rows of the examples that share a token: float64 ``[D, n, C, x, C]``.

    ``einsum("rap,sbp->rasb")`` of each token's rows r and s, added up by their examples.

    Args:
        train: The rows of the train tile's batches, on the CPU.
        x: The rows of the X tile's batches.
        directions: Which side takes the sign, for each of the D results.
    """
    left, right = _Side.join(train), _Side.join(x)
    c, d = left.rows.shape[1:]
    here, there = _shared(left, right)
    pairs = here.counts * there.counts
    common = (2 * here.counts >= left.size) & (2 * there.counts >= right.size)
    rare = ~common & (pairs * c * d <= PAIRED_NUMBERS)
    result = torch.zeros(len(directions), left.size, right.size, c, c, dtype=torch.float64)
    # The result in the layout of `contract`.
    blocks = result.permute(0, 1, 3, 2, 4)
    for number in (~common & ~rare).nonzero()[:, 0].tolist():
        own, other = left.order[here.slice(number)], right.order[there.slice(number)]
        product = contract(left.rows[own].flatten(0, 1), right.rows[other].flatten(0, 1), directions)
        # An example has one row a token, so that no place is added to twice.
        product = product.view(len(directions), len(own), c, len(other), c).transpose(2, 3)
        result[:, left.example[own, None], right.example[None, other]] += product
    if common.any():
        numbers = (left.size + right.size) * c * d
        for tokens in here.token[common].split(max(1, min(BLOCK // d, ALIGNED_NUMBERS // numbers))):
            product = contract(left.aligned(tokens), right.aligned(tokens), directions)
            blocks += product.view(blocks.shape)
    _add_pairs(result, (left, here.of(rare)), (right, there.of(rare)), directions)
    return blocks


@dataclass(frozen=True)
class _Tokens:
    """Tokens of a side, ``[T]`` each: which, where their rows begin in its order, and how many rows they have."""

    token: Tensor
    starts: Tensor
    counts: Tensor

    def of(self, chosen: Tensor) -> "_Tokens":
        return _Tokens(self.token[chosen], self.starts[chosen], self.counts[chosen])

    def slice(self, number: int) -> slice:
        start = int(self.starts[number])
        return slice(start, start + int(self.counts[number]))


@dataclass(frozen=True)
class _Side:
    """The rows of a tile's side.

    Attributes:
        size: The number of examples.
        token: Each row's token, ``[R]``; -1 for none.
        example: Each row's example, ``[R]``.
        rows: The gradients, ``[R, C, d]``.
        order: The rows that have a token, by token.
    """

    size: int
    token: Tensor
    example: Tensor
    rows: Tensor
    order: Tensor

    @classmethod
    def join(cls, batches: Sequence[TokenGradients]) -> "_Side":
        token = torch.cat([batch.token.flatten() for batch in batches])
        lengths = torch.cat([torch.full(batch.token.shape[:1], batch.token.shape[1]) for batch in batches])
        example = torch.arange(len(lengths)).repeat_interleave(lengths)
        rows = torch.cat([batch.gradients.flatten(0, 1) for batch in batches])
        order = token.argsort(stable=True)[int((token < 0).sum()) :]
        return cls(len(lengths), token, example, rows, order)

    @property
    def tokens(self) -> _Tokens:
        token, counts = self.token[self.order].unique_consecutive(return_counts=True)
        return _Tokens(token, counts.cumsum(0) - counts, counts)

    def aligned(self, tokens: Tensor) -> Tensor:
        """Return the rows of these tokens, in increasing order, side by side: ``[size · C, T · d]``; zeros for none."""
        place = torch.searchsorted(tokens, self.token).clamp_(max=len(tokens) - 1)
        found = (tokens[place] == self.token).nonzero()[:, 0]
        c, d = self.rows.shape[1:]
        together = self.rows.new_zeros(self.size, c, len(tokens), d)
        together[self.example[found], :, place[found]] = self.rows[found]
        return together.view(self.size * c, -1)


def _shared(left: _Side, right: _Side) -> tuple[_Tokens, _Tokens]:
    """Return the tokens that both sides have, in increasing order."""
    here, there = left.tokens, right.tokens
    return here.of(torch.isin(here.token, there.token)), there.of(torch.isin(there.token, here.token))


def _add_pairs(
    result: Tensor, train: tuple[_Side, _Tokens], x: tuple[_Side, _Tokens], directions: Sequence[SignPlacement]
) -> None:
    """Add the products of every pair of rows that have one of some tokens to ``[D, n, x, C, C]``."""
    (left, here), (right, there) = train, x
    c, d = left.rows.shape[1:]
    counts = here.counts * there.counts
    token = torch.arange(len(counts)).repeat_interleave(counts)
    number = torch.arange(len(token)) - (counts.cumsum(0) - counts)[token]
    own = left.order[here.starts[token] + number // there.counts[token]]
    other = right.order[there.starts[token] + number % there.counts[token]]
    entries = torch.arange(c * c)
    size = max(1, NUMBERS_AT_A_TIME // (c * d))
    for rows, x_rows in zip(own.split(size), other.split(size), strict=True):
        places = (left.example[rows] * right.size + right.example[x_rows])[:, None] * c * c + entries
        for out, direction in zip(result, directions, strict=True):
            factor, x_factor = widened(left.rows[rows]), widened(right.rows[x_rows]).transpose(1, 2)
            product = torch.bmm(
                factor.sign() if direction.sign_train else factor, x_factor.sign() if direction.sign_x else x_factor
            )
            out.view(-1).index_add_(0, places.flatten(), product.flatten().double())
