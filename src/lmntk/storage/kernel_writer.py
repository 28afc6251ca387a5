"""A kernel's files while it is assembled, a few train examples at a time, so that no kernel has to fit into memory."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from lmntk.storage import diagonal_files, kernel_metadata
from lmntk.storage.atomic import move_into_place, temporary_file
from lmntk.storage.kernel_files import LayerKernels, put_in_place
from lmntk.storage.kernel_slices import KernelSlices, described_slices, remove_other_slices, slice_files
from lmntk.storage.paths import RunPaths
from lmntk.storage.streamed_tensors import StreamedTensors
from lmntk.storage.tensor_files import own_storage


class _Part:
    """One file of a kernel: of tensors of the kernel's shape."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        shape: Sequence[int],
        number: int,
        arrange: Callable[[Sequence[Tensor]], Any],
    ) -> None:
        self.path, self.file = path, file
        self._shape = tuple(shape)
        self.tensors = StreamedTensors(file, [self._shape] * number, arrange)

    def write(self, tensor: int, examples: Sequence[int], rows: Tensor) -> None:
        """Write rows ``[N', C, X, C]``, or ``[2, N', C, X, C]``, of one of the tensors."""
        n, c, x, _ = self._shape[-4:]
        for direction, values in enumerate(rows.reshape(-1, *rows.shape[-4:])):
            for example, row in zip(examples, values, strict=True):
                self.tensors.write(tensor, (direction * n + example) * c * x * c, row)


class KernelWriter:
    """The files of a kernel that is being written; `kernel_writer` opens them.

    Args:
        paths: The names of the files of the run.
        split: The split of the kernel's second axis.
        files: The kernel's own file, and those beside it, by their names.
        slices: What is kept beside the kernel.
    """

    def __init__(self, paths: RunPaths, split: str, files: Mapping[Path, _Part], slices: KernelSlices) -> None:
        self._paths, self._split, self._files, self._slices = paths, split, files, slices

    def write(self, examples: Sequence[int], kernel: Tensor, slices: KernelSlices) -> None:
        """Write the rows of some train examples.

        Args:
            examples: The train examples, counted from 0.
            kernel: Their rows of the kernel, float64 ``[rows, C, X, C]``, or ``[2, rows, C, X, C]``.
            slices: The same rows of the parts and the kernels of adapters.
        """
        self._files[self._paths.kernel(self._split)].write(0, examples, kernel)
        named_alike = dataclasses.replace(slices, keys=self._slices.keys)
        for path, tensors in slice_files(self._paths, self._split, named_alike).items():
            for number, rows in enumerate(tensors.values()):
                self._files[path].write(number, examples, rows)

    def finish(self, description: Mapping[str, Any], diagonal: Tensor | None = None) -> None:
        """Give all files their names, once every row is written; the kernel comes last.

        Args:
            description: What defines the kernel and how it was computed, as JSON can hold it.
            diagonal: K(x, x), ``[X, C, C]`` or ``[2, X, C, C]``, if it is kept.
        """
        paths, split = self._paths, self._split
        hashes = {}
        for path in slice_files(paths, split, self._slices):
            hashes[path] = self._files[path].tensors.finish()
            move_into_place(self._files[path].file, path)
        description = {**description, **described_slices(paths, split, self._slices, hashes)}
        own, logits = paths.diagonal(split), paths.logits(split)
        if diagonal is None:
            own.unlink(missing_ok=True)
        else:
            diagonal_files.save_diagonal(own, diagonal)
            description[kernel_metadata.DIAGONAL_HASH_KEY] = kernel_metadata.file_hash(own)
        if logits.is_file():
            description[kernel_metadata.LOGITS_HASH_KEY] = kernel_metadata.file_hash(logits)
        kernel = self._files[paths.kernel(split)]
        description[kernel_metadata.HASH_KEY] = kernel.tensors.finish()
        put_in_place(kernel.file, kernel.path, description)
        remove_other_slices(paths, split, self._slices)


@contextlib.contextmanager
def kernel_writer(
    paths: RunPaths, split: str, kernel: Tensor, labels: Tensor, slices: KernelSlices
) -> Iterator[KernelWriter]:
    """Open the files of a kernel, which have other names until `KernelWriter.finish`; if it fails, they go.

    Args:
        paths: The names of the files of the run.
        split: The split of the kernel's second axis.
        kernel: A tensor of the kernel's shape, ``[N, C, X, C]`` or ``[2, N, C, X, C]``, such as one on torch's ``meta``
            device, which has no numbers.
        labels: ``[X]``, class ids or -1 and +1.
        slices: What is kept beside the kernel, in such tensors, and what its description says of it.

    Raises:
        FileError: The file system refuses.
    """
    own = own_storage(labels)
    with contextlib.ExitStack() as stack:

        def opened(path: Path, number: int, arrange: Callable[[Sequence[Tensor]], Any]) -> _Part:
            return _Part(path, stack.enter_context(temporary_file(path)), kernel.shape, number, arrange)

        path = paths.kernel(split)
        files = {path: opened(path, 1, lambda tensors: (tensors[0], own))}
        for beside, tensors in slice_files(paths, split, slices).items():
            files[beside] = opened(beside, len(tensors), functools.partial(_by_name, tuple(tensors)))
        yield KernelWriter(paths, split, files, slices)


def _by_name(names: Sequence[str], tensors: Sequence[Tensor]) -> LayerKernels:
    return dict(zip(names, tensors, strict=True))
