"""Signs of gradients as bits: 64 products of signs in an exclusive or and a count of ones.

A float32 product of -1, 0 and +1 does the same, exactly too, and takes 6 to 16 times as long. numba compiles the inner
loops where it is installed; where it is not, or does not work, `available` says so and signs stay floating-point
numbers.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

WORD_BITS = 64
# A thread is not worth its start for less: numbers that are packed, words that are multiplied. torch's own threads spin
# for a while after their work, so that others come late to the processor.
PACKED_PER_THREAD, WORDS_PER_THREAD = 2**21, 2**23
ROW_MULTIPLE, BLOCK_WORDS = 4, 512  # of the compiled loops


def available(sample: Tensor) -> bool:
    """Return whether gradients like `sample` can be packed: float32 or float64 on a CPU, and numba works.

    The first question compiles the loops, or reads them from numba's cache.
    """
    if sample.device.type != "cpu" or sample.dtype not in (torch.float32, torch.float64):
        return False
    return _loops_work(sample.dtype)


@functools.cache
def _loops_work(dtype: torch.dtype) -> bool:
    """Return whether the loops multiply two signs; once in a process, since what fails once fails again.

    Many things keep an installed numba from working: a numpy that it does not know, `NUMBA_DISABLE_JIT`, a full disk
    under its cache. None of them is a reason to end a run that does not need numba.
    """
    try:
        planes = SignPlanes.of(torch.tensor([[1.0, -1.0, 0.0]], dtype=dtype, device="cpu"))
        count = int(sign_products(planes, planes))
        if count != 2:
            raise ArithmeticError(f"two products of signs add up to {count}")
    except Exception as error:
        log = logger.info if isinstance(error, ModuleNotFoundError) else logger.warning
        log("signs are multiplied as floating-point numbers, since numba cannot be used (%r)", error)
        return False
    return True


def num_words(length: int) -> int:
    """Return the number of words for so many bits."""
    return -(-length // WORD_BITS)


class SignPlanes:
    """The signs of some gradients, one a row: two planes of bits, of which the second is rarely needed.

    Args:
        rows: The number of gradients.
        length: p, the numbers in a gradient.

    Attributes:
        negative: Whether a number is negative, uint64 ``[rows, words]``.
        nonzero: Whether a number is neither zero nor NaN, like `negative`; None if all are.
        blocks_with_zeros: Whether a block of words has a number that is, bool ``[rows, blocks]``.
    """

    def __init__(self, rows: int, length: int) -> None:
        words = num_words(length)
        self.rows = rows
        self.length = length
        self.negative = np.empty((rows, words), dtype=np.uint64)
        self.nonzero: np.ndarray | None = None
        self.blocks_with_zeros = np.zeros((rows, -(-words // BLOCK_WORDS)), dtype=np.bool_)

    @classmethod
    def of(cls, gradients: Tensor) -> "SignPlanes":
        """Return the signs of gradients, ``[rows, p]``, contiguous."""
        planes = cls(*gradients.shape)
        planes.pack(gradients, start=0)
        return planes

    @classmethod
    def join(cls, parts: Sequence["SignPlanes"]) -> "SignPlanes":
        """Return the rows of several planes of one length, one after the other."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(sum(part.rows for part in parts), parts[0].length)
        if any(part.nonzero is not None for part in parts):
            whole.nonzero = whole.all_nonzero()
        first = 0
        for part in parts:
            rows = slice(first, first + part.rows)
            whole.negative[rows] = part.negative
            whole.blocks_with_zeros[rows] = part.blocks_with_zeros
            if whole.nonzero is not None and part.nonzero is not None:
                whole.nonzero[rows] = part.nonzero
            first = rows.stop
        return whole

    def pack(self, gradients: Tensor, start: int, first: int = 0, step: int = 1) -> None:
        """Overwrite some numbers of some rows by the signs of gradients, ``[b, k]``, contiguous.

        Args:
            gradients: Part of b gradients.
            start: The number of a row at which this part begins, a multiple of 64; k is one too, or it ends the row.
            first: The row of the first gradient.
            step: The distance of rows.
        """
        numbers, word = gradients.numpy(), start // WORD_BITS
        pack = _loops().pack

        def part(rows: slice) -> bool:
            both = self.nonzero is not None
            planes = self.negative, self.nonzero if both else self.negative, self.blocks_with_zeros
            return pack(numbers[rows], *planes, first + rows.start * step, step, word, both)

        threads = numbers.size // PACKED_PER_THREAD
        zeros = any(_in_threads(part, len(numbers), threads, multiple=1))
        if zeros and self.nonzero is None:
            self.nonzero = self.all_nonzero()
            _in_threads(part, len(numbers), threads, multiple=1)

    def all_nonzero(self) -> np.ndarray:
        """Return the second plane of rows without zeros; bits behind the last number are zeros."""
        plane = np.full_like(self.negative, 2**WORD_BITS - 1)
        if self.length % WORD_BITS:
            plane[:, -1] = 2 ** (self.length % WORD_BITS) - 1
        return plane


def sign_products(left: SignPlanes, right: SignPlanes) -> Tensor:
    """Return the inner products of signs, exact: int64 ``[n, m]``.

    Σ sign · sign is the number of places where both are non-zero minus twice that where, besides, they differ.

    Args:
        left: The signs of n gradients.
        right: The signs of m gradients.
    """
    add_products = _loops().add_products
    sizes = [-(-side.rows // ROW_MULTIPLE) * ROW_MULTIPLE for side in (left, right)]
    counts = np.zeros(sizes, dtype=np.int64)
    # Second planes are read where there are zeros; if there are none, any array will do.
    own, other = left.negative, right.negative
    if left.nonzero is not None or right.nonzero is not None:
        own, other = (side.all_nonzero() if side.nonzero is None else side.nonzero for side in (left, right))

    def part(rows: slice) -> None:
        mine = left.negative[rows], own[rows], left.blocks_with_zeros[rows]
        add_products(*mine, right.negative, other, right.blocks_with_zeros, left.length, counts[rows])

    _in_threads(part, len(counts), counts.size * left.negative.shape[1] // WORDS_PER_THREAD)
    return torch.from_numpy(counts[: left.rows, : right.rows])


def own_sign_products(planes: SignPlanes, rows_of_one: int) -> Tensor:
    """Return the inner products of the signs of each example's gradients: int64 ``[x, C, C]``.

    Args:
        planes: The signs, C rows for each example.
        rows_of_one: C.
    """
    negative = planes.negative.reshape(-1, rows_of_one, planes.negative.shape[1])
    nonzero = None if planes.nonzero is None else planes.nonzero.reshape(negative.shape)
    counts = np.empty((len(negative), rows_of_one, rows_of_one), dtype=np.int64)
    for a in range(rows_of_one):
        for b in range(a + 1):
            both = None if nonzero is None else nonzero[:, a] & nonzero[:, b]
            places = planes.length if both is None else _ones(both)
            if a != b:
                differing = negative[:, a] ^ negative[:, b]
                places = places - 2 * _ones(differing if both is None else differing & both)
            counts[:, a, b] = counts[:, b, a] = places
    return torch.from_numpy(counts)


def _ones(words: np.ndarray) -> np.ndarray:
    """Count the ones of each row of words: int64 ``[rows]``."""
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


@functools.cache
def products_per_second() -> float:
    """Measure, once, how many products of two signs are added in a second; what is not compiled yet is compiled."""
    planes = SignPlanes(256, 2**16)
    planes.negative.fill(0)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        sign_products(planes, planes)
        seconds.append(time.perf_counter() - start)
    return planes.rows**2 * planes.length / min(seconds)


def _loops() -> ModuleType:
    """Import the compiled loops, and numba with them."""
    from lmntk.kernels import sign_bits_compiled

    return sign_bits_compiled


def _in_threads(
    work: Callable[[slice], Result], rows: int, max_threads: int, multiple: int = ROW_MULTIPLE
) -> list[Result]:
    """Divide rows among threads, this one among them; others last no longer than the call, so that a process may fork.

    Args:
        work: Does some of the rows.
        rows: The number of rows.
        max_threads: The largest number of threads, if torch may use so many.
        multiple: Each thread's number of rows is a multiple of this, but the last one's.
    """
    threads = max(1, min(torch.get_num_threads(), max_threads))
    size = max(1, -(-rows // (threads * multiple)) * multiple)
    own, *others = [slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size)]
    if not others:
        return [work(own)]
    with ThreadPoolExecutor(len(others)) as pool:
        futures = [pool.submit(work, part) for part in others]
        return [work(own), *(future.result() for future in futures)]
