"""Products of gradients that are never formed: Gram matrices of inputs, times those of output gradients."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Workspace
from lmntk.kernels.layers.linear_factors import OuterProducts, flattened, shape_of

# What an entry of a Gram matrix costs beyond its products, in flops: it is multiplied, summed up and moved.
GRAM_ENTRY_FLOPS = 350
# Tokens of either side whose Gram matrix is made at a time: enough for large products, few enough for the cache.
GRAM_TOKENS = 1024


def entry_flops(c: int, d_out: int, d_in: int) -> float:
    """What Gram matrices cost for every pair of positions."""
    return 2 * d_in + c**2 * (2 * d_out + GRAM_ENTRY_FLOPS)


def gram(
    trains: Sequence[Sequence[OuterProducts]],
    xs: Sequence[Sequence[OuterProducts]],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
) -> Tensor:
    """Multiply inputs with inputs and gradients with gradients: float64 ``[D, C, n, C, x]``.

    K[i, a, j, b] = Σ_{l, m} (A_i A_jᵀ)_{lm} (G_ia G_jbᵀ)_{lm}; of single outer products the signs multiply alike. For
    layers that were given the same A the products of G are summed first.

    Args:
        trains: The train tile's batches in each of these layers, mostly one.
        xs: The same for the X tile.
        directions: Which side takes the sign.
        workspace: Buffers to use.
    """
    train, x = trains[0], xs[0]
    c, n = shape_of(train)[:2]
    most_tokens, most_columns = _gram_block(train, x, workspace.capacity)
    result = torch.zeros(
        len(directions), c, n, c, shape_of(x)[1], dtype=torch.float64, device=train[0].gradients[0].device
    )
    row = 0
    for run in _runs(train, most_tokens):
        left_batches = [train[batch][part] for batch, part in run]
        left = [flattened([layer[batch][part] for batch, part in run]) for layer in trains]
        indicator = _example_indicator(left_batches)
        column = 0
        for ((batch, part),) in _runs(x, most_columns, together=False):
            right = [flattened([layer[batch][part]]) for layer in xs]
            size, length = part.stop - part.start, x[batch].positions
            for out, direction in zip(result, directions, strict=True):
                inputs = _products([(left[0].inputs, right[0].inputs)], direction, workspace, "train")
                for a in range(c):
                    for b in range(c):
                        pairs = [
                            (mine.gradients[a], other.gradients[b]) for mine, other in zip(left, right, strict=True)
                        ]
                        both = _products(pairs, direction, workspace, "x").mul_(inputs)
                        if indicator is not None:
                            both = torch.mm(
                                indicator, both, out=workspace.take("product", len(indicator), size * length)
                            )
                        found = both.view(-1, size, length).sum(dim=2, dtype=torch.float64)
                        out[a, row : row + len(found), b, column : column + size] = found
            column += size
        row += shape_of(left_batches)[1]
    return result


def _gram_block(train: Sequence[OuterProducts], x: Sequence[OuterProducts], capacity: int) -> tuple[int, int]:
    """Return how many tokens of either side are multiplied together: as many as fit a buffer, or one example's."""
    rows = min(GRAM_TOKENS, max(max(factor.positions for factor in train), capacity // max(f.positions for f in x)))
    return rows, min(GRAM_TOKENS, capacity // rows)


def _runs(
    factors: Sequence[OuterProducts], most_tokens: int, together: bool = True
) -> Iterator[list[tuple[int, slice]]]:
    """Cut batches to examples of at most so many tokens, and one at least; short ones come together where wished."""
    run: list[tuple[int, slice]] = []
    room = most_tokens
    for number, factor in enumerate(factors):
        first = 0
        while first < factor.batch_size:
            if run and (not together or room < factor.positions):
                yield run
                run, room = [], most_tokens
            last = min(factor.batch_size, first + max(1, room // factor.positions))
            run.append((number, slice(first, last)))
            room -= (last - first) * factor.positions
            first = last
    if run:
        yield run


def _products(
    pairs: Sequence[tuple[Tensor | None, Tensor | None]], direction: SignPlacement, workspace: Workspace, name: str
) -> Tensor:
    """The inner products of all positions with all, summed over `pairs`, in the buffer `name`: ``[P, P']``."""
    found: Tensor | None = None
    for left, right in pairs:
        assert left is not None
        assert right is not None
        left, right = left.sign() if direction.sign_train else left, right.sign() if direction.sign_x else right
        if found is None:
            found = torch.mm(left, right.T, out=workspace.take(name, len(left), len(right)))
        else:
            found.addmm_(left, right.T)
    assert found is not None
    return found


def _example_indicator(factors: Sequence[OuterProducts]) -> Tensor | None:
    """Which example each position belongs to, as ones in ``[examples, positions]``; None where all have but one."""
    if all(factor.positions == 1 for factor in factors):
        return None
    blocks = [factor.gradients[0].new_ones(1, factor.positions) for factor in factors for _ in range(factor.batch_size)]
    return torch.block_diag(*blocks)
