"""Products of gradients that are formed: some rows of the weight at a time, in preallocated buffers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmntk.kernels.contraction import BLOCK, contract_each, products_of
from lmntk.kernels.formulas import SignPlacement
from lmntk.kernels.layers.base import Buffer, Workspace
from lmntk.kernels.layers.linear_factors import OuterProducts, key_of, shape_of
from lmntk.kernels.tuning import DEFAULT_TUNING, Tuning

# Numbers of factors that are widened at a time.
WIDE_NUMBERS = 2**18


def dense_buffer_numel(train_gradients: int, d_out: int, d_in: int, element_size: int, tuning: Tuning) -> int:
    """Return the size of the largest buffer in numbers, for so many train gradients (examples times logits)."""
    rows = _rows_in_cache(tuning.dense_gradient_batch, d_out, d_in, element_size, tuning)
    return max(train_gradients, tuning.dense_gradient_batch) * rows * min(d_out, d_in)


def dense(
    train: Sequence[OuterProducts],
    x: Sequence[OuterProducts],
    directions: Sequence[SignPlacement],
    workspace: Workspace,
    tuning: Tuning = DEFAULT_TUNING,
) -> Tensor:
    """Form gradients and multiply them: float64 ``[D, C, n, C, x]``.

    ``einsum("ilo,ild->iod")`` of each logit forms, ``einsum("bjod,aiod->bjai")`` of some rows o contracts.

    Args:
        train: The factors of the train tile's batches.
        x: The factors of the X tile's batches.
        directions: Which side takes the sign, for each of the D results.
        workspace: Buffers that are overwritten.
        tuning: Chooses how much is formed at a time.
    """
    c, n, d_out, d_in = shape_of(train)
    inner, outer = sorted((d_out, d_in))
    chunks = _chunks(x, max(1, tuning.dense_gradient_batch // c))
    width = max(sum(batch.batch_size for batch in chunk) for chunk in chunks)
    cached = _rows_in_cache(c * width, d_out, d_in, train[0].product_size, tuning)
    num_rows = max(1, min(cached, workspace.capacity // (c * max(n, width) * inner)))
    result = torch.zeros(
        len(directions), c, shape_of(x)[1], c, n, dtype=torch.float64, device=train[0].gradients[0].device
    )
    diagonal = result.new_zeros(len(directions), result.shape[2], c, c) if workspace.keeps_diagonals else None
    timer, dtype = workspace.timer, train[0].gradients[0].dtype
    for start in range(0, outer, num_rows):
        rows = slice(start, min(start + num_rows, outer))
        with timer.stage("forming"):
            formed_train = form(Buffer.TRAIN, train, rows, workspace)
        signed_train = formed_train
        if all(direction.sign_train for direction in directions):
            formed_train.sign_()
        elif any(direction.sign_train for direction in directions):
            signed_train = torch.sign(formed_train, out=workspace.take(Buffer.SIGNED_TRAIN, *formed_train.shape))
        first = 0
        for chunk in chunks:
            with timer.stage("forming"):
                formed_x = form(Buffer.X, chunk, rows, workspace)
            size = formed_x.shape[1]
            if diagonal is not None:
                diagonal[:, first : first + size] += formed_products(formed_x, directions)
            # Signs of X are taken in place, so the directions that need them come last, whatever their order is.
            for out, direction in sorted(zip(result, directions, strict=True), key=lambda pair: pair[1].sign_x):
                if direction.sign_x:
                    formed_x.sign_()
                right = signed_train if direction.sign_train else formed_train
                product = workspace.take(Buffer.PRODUCT, c * size, c * n)
                flat_x, flat_right = formed_x.view(c * size, -1), right.view(c * n, -1)
                with timer.stage("contraction"), products_of(dtype):
                    for x_block, right_block in zip(flat_x.split(BLOCK, 1), flat_right.split(BLOCK, 1), strict=True):
                        torch.mm(x_block, right_block.T, out=product)
                        out[:, first : first + size] += product.view(c, size, c, n)
            first += size
    if diagonal is not None:
        workspace.keep_diagonal(key_of(x), diagonal)
    # [D, C, x, C, n] -> [D, C, n, C, x]
    return result.permute(0, 3, 4, 1, 2)


def _rows_in_cache(count: int, d_out: int, d_in: int, element_size: int, tuning: Tuning) -> int:
    """Return how many rows of `count` gradients (columns, if they are wide) are best formed at a time."""
    inner, outer = sorted((d_out, d_in))
    return min(outer, max(tuning.min_weight_rows, tuning.cache_bytes // (count * inner * element_size)))


def formed_products(formed: Tensor, directions: Sequence[SignPlacement]) -> Tensor:
    """Multiply each example's gradients, of which some rows are formed, ``[C, B, rows, inner]``: ``[D, B, C, C]``."""
    return contract_each(formed.flatten(2).transpose(0, 1), directions)


def form(buffer: Buffer, factors: Sequence[OuterProducts], rows: slice, workspace: Workspace) -> Tensor:
    """Form some rows of the gradients, or of the transposed ones if the weight is wide: ``[C, B, rows, inner]``."""
    c, examples, d_out, d_in = shape_of(factors)
    formed = workspace.take(buffer, c, examples, rows.stop - rows.start, min(d_out, d_in))
    for logit in range(c):
        first = 0
        for batch in factors:
            left, right = batch.gradients[logit], batch.inputs
            assert right is not None
            if d_in > d_out:
                left, right = right, left
            _multiply(left[:, :, rows], right, formed[logit, first : first + batch.batch_size], workspace)
            first += batch.batch_size
    return formed


def _multiply(left: Tensor, right: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Write ``einsum("blr,bli->bri")``; bfloat16 is widened for some examples at a time, within the cache."""
    wide = left.dtype == right.dtype == out.dtype
    size = len(left) if wide else max(1, WIDE_NUMBERS // (left[0].numel() + right[0].numel()))
    parts = (tensor.split(size) for tensor in (left, right, out))
    for some_left, some_right, some in zip(*parts, strict=True):
        a = workspace.widened(Buffer.WIDE_GRADIENTS, some_left)
        b = workspace.widened(Buffer.WIDE_INPUTS, some_right)
        torch.bmm(a.transpose(1, 2), b, out=some)


def _chunks(factors: Sequence[OuterProducts], size: int) -> list[list[OuterProducts]]:
    """Cut batches, or join them, to chunks of `size` examples; the last one has the rest."""
    chunks: list[list[OuterProducts]] = []
    room = 0
    for batch in factors:
        first = 0
        while first < batch.batch_size:
            if not room:
                chunks.append([])
                room = size
            taken = batch[first : min(first + room, batch.batch_size)]
            chunks[-1].append(taken)
            room -= taken.batch_size
            first += taken.batch_size
    return chunks
