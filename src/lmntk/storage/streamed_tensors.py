"""Files of `torch.save` whose tensors are written piece by piece, and never held in memory.

torch writes these files itself, so that the bytes are those of `torch.save`: once without numbers, which tells where
each tensor has its place, and at the end around the numbers, which are in the file by then and are mapped.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.serialization import skip_data

Shape = tuple[int, ...]
NUMBERS = np.dtype("=f8")


class StreamedTensors:
    """A file of float64 tensors that is being written.

    Args:
        file: The file, new, open for reading and writing.
        shapes: The shapes of the tensors, none of which is empty.
        arrange: Makes what the file holds from the tensors; other tensors come after them.

    Raises:
        OSError: The file system refuses.
    """

    def __init__(self, file: BinaryIO, shapes: Sequence[Shape], arrange: Callable[[Sequence[Tensor]], Any]) -> None:
        self._file, self._shapes, self._arrange = file, shapes, arrange
        # Of these tensors torch asks how large they are; a file without content has room for any number.
        file.truncate(max(map(_bytes_of, shapes)))
        places = _Places()
        with skip_data():
            torch.save(arrange(self._mapped([0] * len(shapes))), cast(BinaryIO, places))
        self._starts = places.starts[: len(shapes)]
        file.truncate(places.position)

    def write(self, tensor: int, first: int, values: Tensor) -> None:
        """Write consecutive numbers of a tensor.

        Args:
            tensor: The tensor's place among the shapes.
            first: Where the numbers begin in the flattened tensor.
            values: The numbers, float64, of any shape.
        """
        numbers = values.detach().cpu().to(torch.float64).contiguous().numpy().reshape(-1)
        _write_at(self._file, numbers.view(np.uint8), self._starts[tensor] + NUMBERS.itemsize * first)

    def finish(self) -> str:
        """Write what is around the numbers, and return the SHA-256 of the file."""
        mapped = self._mapped(self._starts)
        where = {tensor.data_ptr(): start for tensor, start in zip(mapped, self._starts, strict=True)}
        around = _Around(self._file, where)
        torch.save(self._arrange(mapped), cast(BinaryIO, around))
        return around.sha256.hexdigest()

    def _mapped(self, starts: Sequence[int]) -> list[Tensor]:
        """Map tensors at their places in the file."""
        self._file.flush()
        found = []
        for start, shape in zip(starts, self._shapes, strict=True):
            numbers: NDArray[np.float64] = np.memmap(self._file, NUMBERS, "r+", start, shape)
            found.append(torch.from_numpy(numbers))
        return found


class _Places:
    """Takes the bytes of a file of `torch.save` and keeps only where its tensors have their places."""

    def __init__(self) -> None:
        self.position = 0
        self.starts: list[int] = []

    def write(self, data: bytes) -> int:
        self.position += memoryview(data).nbytes
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int) -> int:
        """Leave out a tensor, as torch does within `skip_data`."""
        assert whence == os.SEEK_CUR
        self.starts.append(self.position)
        self.position += offset
        return self.position

    def flush(self) -> None:
        pass


class _Around:
    """Writes a file of `torch.save` but for the tensors that are in it already.

    Args:
        file: The file.
        where: Where tensors of the file are mapped, and where they begin in the file.
    """

    def __init__(self, file: BinaryIO, where: dict[int, int]) -> None:
        self._file, self._where = file, where
        self._position = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        content = np.frombuffer(data, np.uint8)
        self.sha256.update(content.data)
        there = self._where.get(content.ctypes.data)
        if there is None:
            self._file.seek(self._position)
            self._file.write(data)
        elif there != self._position:
            raise RuntimeError(f"torch.save wrote a tensor at {self._position}, and {there} was its place")
        self._position += len(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()


def _bytes_of(shape: Shape) -> int:
    return NUMBERS.itemsize * int(np.prod(shape, dtype=np.int64))


def _write_at(file: BinaryIO, numbers: NDArray[np.uint8], offset: int) -> None:
    left = numbers.data
    while left:
        done = os.pwrite(file.fileno(), left, offset)
        left, offset = left[done:], offset + done
