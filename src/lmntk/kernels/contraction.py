"""Products of Jacobians in blocks, so that float32 keeps the accuracy of the gradients.

bfloat16 has 8 significant bits. A product of bfloat16 matrices adds in float32 and returns bfloat16: a sum over
thousands of positions or parameters would be rounded to 8 bits each time it is added to another. Every sum here is of
`widened` numbers, so that bfloat16 goes in, float32 adds, and float64 comes out.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lmntk.kernels.formulas import SignPlacement

NUMBER_TYPES = ("float32", "float64", "bfloat16")
"""The dtypes that a model, and so its gradients, can have."""

# Length of a float32 product before float64 takes over. A product over millions of parameters loses two digits, one
# over 2**18 still loses one; this one keeps the accuracy of the gradients. It is far below 2**24, up to which float32
# counts products of signs exactly.
BLOCK = 2**15
# Terms from which a call of the instructions for bfloat16 costs less than it saves.
MANY_TERMS = 2**22
# Rows of a product of gradients with themselves that are worth two products, of one half each with what lies above it.
MIRRORED_ROWS = 512
# Numbers whose signs are copied at a time where each example is multiplied with itself.
SIGNS_AT_A_TIME = 2**17


def summation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of a dtype's numbers are added: float32 for those of half its size.

    Example:
        >>> summation_dtype(torch.bfloat16), summation_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(tensor: Tensor) -> Tensor:
    """Return numbers in their `summation_dtype`: a copy of bfloat16, the same tensor of float32 and float64.

    A product of widened bfloat16 numbers is exact in float32, and so is rounded only as it is added.
    """
    return tensor.to(summation_dtype(tensor.dtype))


@contextlib.contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Within this block, products of a dtype's widened numbers use the processor's instructions for that dtype.

    Those for bfloat16 (AMX; torch 2.13 does not use those of AVX-512 here) take float32 matrices, round them to
    bfloat16, which changes no widened number and other float32 numbers by half a unit of 8 bits, and add exact products
    in float32. Without such instructions, and for other dtypes, nothing changes.

    Args:
        dtype: The dtype of the numbers before they were widened.
    """
    settings = cast(Any, torch.backends.mkldnn).matmul
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        if dtype == torch.bfloat16:
            settings.fp32_precision = before


def contract(train: Tensor, x: Tensor, directions: Sequence[SignPlacement]) -> Tensor:
    """Sum products of gradients over one group of parameters: ``einsum("np,mp->nm")`` for each direction.

    Blocks of p are widened before they are multiplied: bfloat16 gradients are added in float32, and blocks in float64.
    If `x` is the same tensor as `train`, a large product is computed above the diagonal and mirrored.

    Args:
        train: Gradients, one a row, ``[n, p]``.
        x: Gradients of the other side, ``[m, p]``.
        directions: Which side takes the sign, for each of the D results.

    Returns:
        float64 ``[D, n, m]``.

    Example:
        >>> contract(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 1.0]]), [SignPlacement(True, False)])
        tensor([[[2.]]], dtype=torch.float64)
    """
    result = torch.zeros(len(directions), len(train), len(x), dtype=torch.float64, device=train.device)
    dtype = train.dtype if len(x) * train.numel() >= MANY_TERMS else result.dtype
    for out, direction in zip(result, directions, strict=True):
        mirrored = x is train and direction.sign_train == direction.sign_x
        bands = _bands(len(train)) if mirrored else [slice(0, len(train))]
        for left, right in zip(train.split(BLOCK, dim=1), x.split(BLOCK, dim=1), strict=True):
            a, b = widened(left), widened(right)
            a, b = a.sign() if direction.sign_train else a, b.sign() if direction.sign_x else b
            with products_of(dtype):
                for band in bands:
                    columns = slice(band.start if mirrored else 0, None)
                    out[band, columns] += a[band] @ b[columns].T
        for band in bands[:-1]:
            out[band.stop :, band] = out[band, band.stop :].T
    return result


def _bands(rows: int) -> list[slice]:
    """Cut the rows of a symmetric product into bands, each of which is computed from the diagonal on."""
    number = min(8, max(1, rows // MIRRORED_ROWS))
    ends = [rows * i // number for i in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(ends[:-1], ends[1:], strict=True)]


def contract_each(gradients: Tensor, directions: Sequence[SignPlacement]) -> Tensor:
    """Multiply the gradients of each example with one another only: ``einsum("xap,xbp->xab")`` for each direction.

    bfloat16 is widened as in `contract`.

    Args:
        gradients: ``[x, C, p]``; consecutive along p.
        directions: Which side takes the sign, for each of the D results.

    Returns:
        float64 ``[D, x, C, C]``.

    Example:
        >>> contract_each(torch.tensor([[[1.0, -2.0]]]), [SignPlacement(True, False)])
        tensor([[[[3.]]]], dtype=torch.float64)
    """
    x, c, _ = gradients.shape
    result = torch.zeros(len(directions), x, c, c, dtype=torch.float64, device=gradients.device)
    signed = any(direction.signed for direction in directions)
    for part in gradients.split(BLOCK, dim=2):
        # Signs are copies: those of few examples at a time stay in the processor's cache.
        size = max(1, SIGNS_AT_A_TIME // (c * part.shape[2])) if signed else max(x, 1)
        for first in range(0, x, size):
            raw = widened(part[first : first + size])
            signs = raw.sign() if signed else raw
            found: dict[SignPlacement, Tensor] = {}
            for out, direction in zip(result, directions, strict=True):
                mirrored = found.get(SignPlacement(direction.sign_x, direction.sign_train))
                if mirrored is None:
                    left, right = signs if direction.sign_train else raw, signs if direction.sign_x else raw
                    found[direction] = product = torch.bmm(left, right.transpose(1, 2))
                else:
                    product = mirrored.transpose(1, 2)
                out[first : first + size] += product
    return result


def broken_rows(gradients: Tensor) -> Tensor:
    """Return which rows of gradients, ``[n, p]``, hold NaN or infinity, whose sign would be an ordinary number."""
    # A sum is the fastest test of all numbers.
    return ~gradients.sum(dim=1, dtype=torch.float64).isfinite()


def hide_signs_of_broken(block: Tensor, train: Tensor | None, x: Tensor | None) -> Tensor:
    """Set entries of a block to NaN whose gradients are not finite, as they would be without signs.

    Args:
        block: The values of a tile, ``[S, n, C, x, C]``; changed in place.
        train: Which gradients of its train examples are not finite, bool ``[n]`` or ``[n, C]``; None without signs.
        x: The same for its X examples.
    """
    if train is None or x is None:
        return block
    rows, columns = (broken if broken.dim() == 2 else broken[:, None] for broken in (train, x))
    return block.masked_fill_(rows[:, :, None, None] | columns, torch.nan)


def hide_diagonal_of_broken(diagonal: Tensor, broken: Tensor | None) -> Tensor:
    """Set entries of a diagonal to NaN whose gradients are not finite, as `hide_signs_of_broken` does in a block.

    Args:
        diagonal: ``[D, x, C, C]``; changed in place.
        broken: Which gradients are not finite, bool ``[x]`` or ``[x, C]``; None without signs.
    """
    if broken is None:
        return diagonal
    rows = broken if broken.dim() == 2 else broken[:, None]
    return diagonal.masked_fill_(rows[:, :, None] | rows[:, None, :], torch.nan)
