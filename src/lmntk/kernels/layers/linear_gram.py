"""Products of gradients that are never formed: Gram matrices of inputs, times those of output gradients."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmntk.kernels.contraction import products_of, summation_dtype, widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Buffer, Workspace
from lmntk.kernels.layers.linear_factors import BatchSlice, Matrices, OuterProducts, as_matrices, shape_of
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning


def gram_flops(c: int, d_out: int, d_in: int, tuning: Tuning) -> float:
    """Return the flops of the Gram path for each pair of positions."""
    return 2 * d_in + c**2 * (2 * d_out + tuning.gram_entry_flops)


def gram(
    trains: Sequence[Sequence[OuterProducts]],
    xs: Sequence[Sequence[OuterProducts]],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """Multiply inputs with inputs and gradients with gradients: float64 ``[D, C, n, C, x]``.

    K[i, a, j, b] = Σ_{l, m} (A_i A_jᵀ)_{lm} (G_ia G_jbᵀ)_{lm}, ``einsum("ild,jmd,iale,jbme->iajb")``. If an example's
    gradient is a single outer product its sign is the outer product of signs. For layers that share A the products of
    G are summed first.

    Args:
        trains: The factors of the train tile's batches in each of these layers, mostly one.
        xs: The factors of the X tile's batches in each of these layers.
        directions: Which side takes the sign, for each of the D results.
        workspace: Buffers that are overwritten.
        tuning: Bounds the Gram matrices.
    """
    return gram_parts(trains, xs, [range(len(trains))], directions, workspace, tuning)[0]


def gram_parts(
    trains: Sequence[Sequence[OuterProducts]],
    xs: Sequence[Sequence[OuterProducts]],
    parts: Sequence[Sequence[int]],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """Return what `gram` does of some of the layers at a time: float64 ``[parts, D, C, n, C, x]``.

    The Gram matrices of the inputs, which the layers share, are formed once.

    Args:
        trains: As for `gram`.
        xs: As for `gram`.
        parts: The numbers of the layers that are summed, for each part.
        directions: As for `gram`.
        workspace: As for `gram`.
        tuning: As for `gram`.
    """
    train, x = trains[0], xs[0]
    c, n = shape_of(train)[:2]
    train_tokens, x_tokens = _gram_block(train, x, workspace.capacity, tuning)
    shape = len(parts), len(directions), c, n, c, shape_of(x)[1]
    result = torch.zeros(shape, dtype=torch.float64, device=train[0].gradients[0].device)
    row, dtype = 0, train[0].gradients[0].dtype
    for chosen in _position_blocks(train, train_tokens):
        left = [_widened(as_matrices(layer, chosen)) for layer in trains]
        indicator = _example_indicator(train, chosen)
        column = 0
        for x_chosen in _position_blocks(x, x_tokens, join_batches=False):
            right = [_widened(as_matrices(layer, x_chosen)) for layer in xs]
            ((batch, examples),) = x_chosen
            size, positions = examples.stop - examples.start, x[batch].positions
            for number, direction in enumerate(directions):
                pair = left[0].inputs, right[0].inputs
                with products_of(dtype):
                    inputs = _products([pair], direction, workspace, Buffer.INPUT_GRAM)
                for (part, layers), a, b in itertools.product(enumerate(parts), range(c), range(c)):
                    pairs = [(left[layer].gradients[a], right[layer].gradients[b]) for layer in layers]
                    with products_of(dtype):
                        both = _products(pairs, direction, workspace, Buffer.GRADIENT_GRAM)
                    both.mul_(inputs)
                    if indicator is not None:
                        summed = workspace.take(Buffer.PRODUCT, len(indicator), size * positions)
                        both = torch.mm(indicator, both, out=summed)
                    found = both.view(-1, size, positions).sum(dim=2, dtype=torch.float64)
                    result[part, number, a, row : row + len(found), b, column : column + size] = found
            column += size
        row += sum(examples.stop - examples.start for _, examples in chosen)
    return result


def _gram_block(
    train: Sequence[OuterProducts], x: Sequence[OuterProducts], capacity: int, tuning: Tuning
) -> tuple[int, int]:
    """Return how many tokens of either side are multiplied together: as many as fit a buffer, or one example's."""
    longest, x_longest = (max(batch.positions for batch in side) for side in (train, x))
    rows = min(tuning.gram_tokens, max(longest, capacity // x_longest))
    return rows, min(tuning.gram_tokens, capacity // rows)


def _position_blocks(
    factors: Sequence[OuterProducts], max_tokens: int, join_batches: bool = True
) -> Iterator[list[BatchSlice]]:
    """Cut batches into blocks of at most so many tokens, but one example at least.

    Args:
        factors: The batches.
        max_tokens: Tokens of a block.
        join_batches: Whether a block may have examples of several batches.
    """
    block: list[BatchSlice] = []
    room = max_tokens
    for number, batch in enumerate(factors):
        first = 0
        while first < batch.batch_size:
            if block and (not join_batches or room < batch.positions):
                yield block
                block, room = [], max_tokens
            last = min(batch.batch_size, first + max(1, room // batch.positions))
            block.append((number, slice(first, last)))
            room -= (last - first) * batch.positions
            first = last
    if block:
        yield block


def _products(
    pairs: Sequence[tuple[Tensor, Tensor]], direction: SignPlacement, workspace: Workspace, buffer: Buffer
) -> Tensor:
    """Return the inner products of all positions with all, summed over `pairs`: ``[P, P']``, in a buffer."""
    found = workspace.take(buffer, len(pairs[0][0]), len(pairs[0][1]))
    for number, (left, right) in enumerate(pairs):
        left, right = left.sign() if direction.sign_train else left, right.sign() if direction.sign_x else right
        if number == 0:
            torch.mm(left, right.T, out=found)
        else:
            found.addmm_(left, right.T)
    return found


def _widened(factors: Matrices) -> Matrices:
    return Matrices(widened(factors.inputs), [widened(gradients) for gradients in factors.gradients])


def _example_indicator(factors: Sequence[OuterProducts], chosen: Sequence[BatchSlice]) -> Tensor | None:
    """Return ones where a position belongs to an example, ``[examples, positions]``; None if each has one position."""
    batches = [factors[number] for number, _ in chosen]
    if all(batch.positions == 1 for batch in batches):
        return None
    like = batches[0].gradients[0]
    blocks = [
        like.new_ones(1, batch.positions, dtype=summation_dtype(like.dtype))
        for batch, (_, examples) in zip(batches, chosen, strict=True)
        for _ in range(examples.stop - examples.start)
    ]
    return torch.block_diag(*blocks)
