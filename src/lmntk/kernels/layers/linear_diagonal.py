"""K(x, x) of a weight: each example's gradients are multiplied with one another, no pair of examples is formed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmntk.kernels.contraction import widened
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Buffer, Workspace
from lmntk.kernels.layers.linear_dense import form, formed_products
from lmntk.kernels.layers.linear_factors import OuterProducts, key_of, shape_of
from lmntk.kernels.layers.linear_gram import gram_flops
from lmntk.kernels.layers.linear_signs import WeightSigns
from lmntk.kernels.sign_bits import own_sign_products
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

# Numbers of a buffer that are always allowed: a call of torch costs as much as thousands of products.
LEAST_NUMBERS = 2**16


def weight_diagonal(
    x: Sequence[OuterProducts | WeightSigns],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """Multiply the gradients of a weight of each example: float64 ``[D, x, C, C]``.

    If `dense` has just formed these gradients it has multiplied them too; this takes what it has kept.

    Args:
        x: The factors or signs of the X tile's batches.
        directions: Which side takes the sign, for each of the D results; both sides of all where there are signs.
        workspace: Buffers that are overwritten.
        tuning: Chooses between the two ways.
    """
    factors = [batch for batch in x if isinstance(batch, OuterProducts)]
    kept = workspace.kept_diagonal(key_of(factors)) if len(factors) == len(x) else None
    if kept is not None:
        return kept
    with workspace.timer.stage("diagonal"):
        return torch.cat([_of_batch(batch, directions, workspace, tuning) for batch in x], dim=1)


def _of_batch(
    batch: OuterProducts | WeightSigns, directions: Sequence[SignPlacement], workspace: Workspace, tuning: Tuning
) -> Tensor:
    if isinstance(batch, WeightSigns):
        counts = own_sign_products(batch.planes, batch.num_logits).double()
        return counts.expand(len(directions), *counts.shape)
    c, _, d_out, d_in = shape_of([batch])
    length = batch.positions
    # The sign of a sum has no factors, that of a single outer product has.
    factored = length == 1 or not any(direction.signed for direction in directions)
    formed_flops = 2.0 * d_out * d_in * c * (length + c)
    if factored and length**2 * gram_flops(c, d_out, d_in, tuning) * tuning.dense_efficiency < formed_flops:
        return _by_gram(batch, directions, workspace)
    return _by_forming(batch, directions, workspace, tuning)


def _by_gram(batch: OuterProducts, directions: Sequence[SignPlacement], workspace: Workspace) -> Tensor:
    """Sum ``(A Aᵀ)_{lm} (G_a G_bᵀ)_{lm}`` over an example's own positions l and m.

    ``einsum("xld,xmd,xale,xbme->xab")``, float64 ``[D, B, C, C]``.
    """
    c, length = len(batch.gradients), batch.positions
    size = max(1, max(workspace.capacity, LEAST_NUMBERS) // length**2)
    chunks = [batch[start : start + size] for start in range(0, batch.batch_size, size)]
    result = torch.zeros(len(directions), batch.batch_size, c, c, dtype=torch.float64, device=batch.gradients[0].device)
    first = 0
    for chunk in chunks:
        rows = slice(first, first + chunk.batch_size)
        for out, direction in zip(result, directions, strict=True):
            inputs = _own_gram(chunk.inputs, chunk.inputs, direction, workspace, Buffer.INPUT_GRAM)
            for a in range(c):
                for b in range(c):
                    pair = chunk.gradients[a], chunk.gradients[b]
                    both = _own_gram(*pair, direction, workspace, Buffer.GRADIENT_GRAM).mul_(inputs)
                    out[rows, a, b] = both.sum(dim=(1, 2), dtype=torch.float64)
        first = rows.stop
    return result


def _own_gram(
    left: Tensor | None, right: Tensor | None, direction: SignPlacement, workspace: Workspace, buffer: Buffer
) -> Tensor:
    """Return the inner products of each example's positions, ``[B, L, L]``, in a buffer."""
    assert left is not None and right is not None
    left, right = widened(left), widened(right)
    left, right = left.sign() if direction.sign_train else left, right.sign() if direction.sign_x else right
    length = left.shape[1]
    return torch.bmm(left, right.transpose(1, 2), out=workspace.take(buffer, len(left), length, length))


def _by_forming(
    batch: OuterProducts, directions: Sequence[SignPlacement], workspace: Workspace, tuning: Tuning
) -> Tensor:
    """Form the gradients, some rows of the weight and some examples at a time, and multiply them."""
    c, examples, d_out, d_in = shape_of([batch])
    inner, outer = sorted((d_out, d_in))
    size = max(1, min(examples, tuning.dense_gradient_batch // c))
    numbers = min(max(workspace.capacity, LEAST_NUMBERS), tuning.cache_bytes // batch.product_size)
    num_rows = max(1, min(outer, numbers // (c * size * inner)))
    found = []
    for first in range(0, examples, size):
        chunk = [batch[first : first + size]]
        starts = range(0, outer, num_rows)
        formed = (form(Buffer.X, chunk, slice(start, min(start + num_rows, outer)), workspace) for start in starts)
        found.append(sum((formed_products(part, directions) for part in formed), start=torch.zeros(())))
    return torch.cat(found, dim=1)
