"""The inner loops over bits, compiled by numba: import this where many signs are multiplied, for it takes seconds.

LLVM turns `ctpop` in these loops into the processor's vector instructions: VPOPCNTQ, or a table of half bytes in AVX2
(Muła, Kurz and Lemire 2018, "Faster Population Counts Using AVX2 Instructions"). Rows are multiplied four by four, so
that a word that is loaded is used four times. All functions release the interpreter's lock.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

ROWS = 4
"""Rows of either side that are multiplied together; counts have multiples of them."""

WORDS = 512
"""Words in a block of a row, which are multiplied at a time: those of eight rows fit a first-level cache."""

FULL = np.uint64(2**64 - 1)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call, and keep the machine code for the next process if a folder can be written to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache
        return numba.njit(nogil=True)(function)


@intrinsic
def _popcount(typing_context: Any, word: Any) -> Any:
    """Return the number of ones in a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return numba.uint64(numba.uint64), generate


@intrinsic
def _compare_64(typing_context: Any, row: Any, start: Any) -> Any:
    """Return two words: which of 64 numbers are negative, and which are neither zero nor NaN; the first is lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        vector = ir.VectorType(context.get_data_type(signature.args[0].dtype), 64)
        pointer = builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())
        numbers = builder.load(pointer, align=signature.args[0].dtype.bitwidth // 8)
        zero = ir.Constant(vector, None)
        words = [
            builder.bitcast(builder.fcmp_ordered(relation, numbers, zero), ir.IntType(64)) for relation in ("<", "!=")
        ]
        return context.make_tuple(builder, signature.return_type, words)

    return numba.types.UniTuple(numba.uint64, 2)(row, numba.intp), generate


@_compiled
def pack(
    numbers: np.ndarray,
    negative: np.ndarray,
    nonzero: np.ndarray,
    blocks_with_zeros: np.ndarray,
    first: int,
    step: int,
    word: int,
    both: bool,
) -> bool:
    """Write the signs of some rows of numbers into planes.

    Args:
        numbers: float32 or float64 ``[b, k]``, contiguous.
        negative: Whether a number is negative, uint64 ``[rows, words]``.
        nonzero: Whether it is neither zero nor NaN, like `negative`; not touched unless `both`.
        blocks_with_zeros: Whether a block of words has a zero or NaN, bool ``[rows, blocks]``; only set.
        first: The row of the planes that the first row of numbers belongs to.
        step: The distance of the rows of the planes.
        word: The word of the planes where the rows of numbers begin.
        both: Whether both planes are written.

    Returns:
        Whether a number is zero or NaN.
    """
    length = numbers.shape[1]
    whole = length // 64
    found = False
    for i in range(numbers.shape[0]):
        row = numbers[i]
        target = first + i * step
        for w in range(whole):
            minus, other = _compare_64(row, 64 * w)
            negative[target, word + w] = minus
            if other != FULL:
                blocks_with_zeros[target, (word + w) // WORDS] = found = True
            if both:
                nonzero[target, word + w] = other
        if 64 * whole < length:
            minus, other = np.uint64(0), np.uint64(0)
            for k in range(64 * whole, length):
                bit = np.uint64(1) << np.uint64(k - 64 * whole)
                if row[k] < 0:
                    minus |= bit
                    other |= bit
                elif row[k] > 0:
                    other |= bit
                else:
                    blocks_with_zeros[target, (word + whole) // WORDS] = found = True
            negative[target, word + whole] = minus
            if both:
                nonzero[target, word + whole] = other
    return found


@_compiled
def add_products(
    left: np.ndarray,
    left_nonzero: np.ndarray,
    left_zeros: np.ndarray,
    right: np.ndarray,
    right_nonzero: np.ndarray,
    right_zeros: np.ndarray,
    length: int,
    counts: np.ndarray,
) -> None:
    """Add to int64 `counts` the inner products of the signs of each row of `left` and each of `right`.

    Args:
        left: Whether a number is negative, uint64 ``[n, words]``.
        left_nonzero: Whether it is neither zero nor NaN, like `left`; read in blocks with zeros only.
        left_zeros: Whether a block of words has a zero or NaN, bool ``[n, blocks]``.
        right: Like `left`, ``[m, words]``.
        right_nonzero: Like `left_nonzero`.
        right_zeros: Like `left_zeros`.
        length: The numbers in a row; further bits of the last word are zeros in all planes.
        counts: int64 ``[n, m]``, both filled up to multiples of `ROWS`; the filling is overwritten.
    """
    words = left.shape[1]
    for block in range(left_zeros.shape[1]):
        start, stop = block * WORDS, min((block + 1) * WORDS, words)
        bits = min(64 * stop, length) - 64 * start
        for i in range(0, counts.shape[0], ROWS):
            for j in range(0, counts.shape[1], ROWS):
                if left_zeros[i : i + ROWS, block].any() or right_zeros[j : j + ROWS, block].any():
                    _add_with_zeros(left, left_nonzero, right, right_nonzero, counts, i, j, start, stop)
                    _add_with_zeros(left, left_nonzero, right, right_nonzero, counts, i, j + 2, start, stop)
                else:
                    _add_without_zeros(left, right, counts, i, j, start, stop, bits)


@_compiled
def _add_without_zeros(
    left: np.ndarray, right: np.ndarray, counts: np.ndarray, i: int, j: int, start: int, stop: int, bits: int
) -> None:
    """Add the products of four rows and four rows: all places minus twice those that differ."""
    # Where there are no rows left, the last one is multiplied again.
    last, end = left.shape[0] - 1, right.shape[0] - 1
    l0, l1 = left[i, start:stop], left[min(i + 1, last), start:stop]
    l2, l3 = left[min(i + 2, last), start:stop], left[min(i + 3, last), start:stop]
    r0, r1 = right[j, start:stop], right[min(j + 1, end), start:stop]
    r2, r3 = right[min(j + 2, end), start:stop], right[min(j + 3, end), start:stop]
    c00 = c01 = c02 = c03 = c10 = c11 = c12 = c13 = np.uint64(0)
    c20 = c21 = c22 = c23 = c30 = c31 = c32 = c33 = np.uint64(0)
    for w in range(stop - start):
        x0, x1, x2, x3 = l0[w], l1[w], l2[w], l3[w]
        y = r0[w]
        c00 += _popcount(x0 ^ y)
        c10 += _popcount(x1 ^ y)
        c20 += _popcount(x2 ^ y)
        c30 += _popcount(x3 ^ y)
        y = r1[w]
        c01 += _popcount(x0 ^ y)
        c11 += _popcount(x1 ^ y)
        c21 += _popcount(x2 ^ y)
        c31 += _popcount(x3 ^ y)
        y = r2[w]
        c02 += _popcount(x0 ^ y)
        c12 += _popcount(x1 ^ y)
        c22 += _popcount(x2 ^ y)
        c32 += _popcount(x3 ^ y)
        y = r3[w]
        c03 += _popcount(x0 ^ y)
        c13 += _popcount(x1 ^ y)
        c23 += _popcount(x2 ^ y)
        c33 += _popcount(x3 ^ y)
    for row, differing in enumerate(
        ((c00, c01, c02, c03), (c10, c11, c12, c13), (c20, c21, c22, c23), (c30, c31, c32, c33))
    ):
        for column in range(ROWS):
            counts[i + row, j + column] += bits - 2 * np.int64(differing[column])


@_compiled
def _add_with_zeros(
    left: np.ndarray,
    left_nonzero: np.ndarray,
    right: np.ndarray,
    right_nonzero: np.ndarray,
    counts: np.ndarray,
    i: int,
    j: int,
    start: int,
    stop: int,
) -> None:
    """Add the products of four rows and two rows: places where both are non-zero minus twice those that differ too."""
    last, end = left.shape[0] - 1, right.shape[0] - 1
    i1, i2, i3, j0, j1 = min(i + 1, last), min(i + 2, last), min(i + 3, last), min(j, end), min(j + 1, end)
    l0, l1, l2, l3 = left[i, start:stop], left[i1, start:stop], left[i2, start:stop], left[i3, start:stop]
    n0, n1 = left_nonzero[i, start:stop], left_nonzero[i1, start:stop]
    n2, n3 = left_nonzero[i2, start:stop], left_nonzero[i3, start:stop]
    r0, r1 = right[j0, start:stop], right[j1, start:stop]
    m0, m1 = right_nonzero[j0, start:stop], right_nonzero[j1, start:stop]
    b00 = b01 = b10 = b11 = b20 = b21 = b30 = b31 = np.uint64(0)  # both are non-zero
    d00 = d01 = d10 = d11 = d20 = d21 = d30 = d31 = np.uint64(0)  # and they differ
    for w in range(stop - start):
        x0, x1, x2, x3, k0, k1, k2, k3 = l0[w], l1[w], l2[w], l3[w], n0[w], n1[w], n2[w], n3[w]
        y, z = r0[w], m0[w]
        b00 += _popcount(k0 & z)
        d00 += _popcount((x0 ^ y) & k0 & z)
        b10 += _popcount(k1 & z)
        d10 += _popcount((x1 ^ y) & k1 & z)
        b20 += _popcount(k2 & z)
        d20 += _popcount((x2 ^ y) & k2 & z)
        b30 += _popcount(k3 & z)
        d30 += _popcount((x3 ^ y) & k3 & z)
        y, z = r1[w], m1[w]
        b01 += _popcount(k0 & z)
        d01 += _popcount((x0 ^ y) & k0 & z)
        b11 += _popcount(k1 & z)
        d11 += _popcount((x1 ^ y) & k1 & z)
        b21 += _popcount(k2 & z)
        d21 += _popcount((x2 ^ y) & k2 & z)
        b31 += _popcount(k3 & z)
        d31 += _popcount((x3 ^ y) & k3 & z)
    for row, (both, differing) in enumerate(
        (((b00, b01), (d00, d01)), ((b10, b11), (d10, d11)), ((b20, b21), (d20, d21)), ((b30, b31), (d30, d31)))
    ):
        for column in range(2):
            counts[i + row, j + column] += np.int64(both[column]) - 2 * np.int64(differing[column])
