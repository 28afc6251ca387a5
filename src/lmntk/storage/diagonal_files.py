"""K(x, x) of the examples along a kernel's second axis: a file beside the kernel, known by its hash."""

from pathlib import Path

import torch
from torch import Tensor

from lmntk.errors import KernelMismatchError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.kernel_metadata import DIAGONAL_HASH_KEY, file_hash, read_description, write_description
from lmntk.storage.paths import description_of
from lmntk.storage.tensor_files import own_storage, plain, read_tensor_file, unusable


def save_diagonal(path: Path, diagonal: Tensor) -> None:
    """Write a diagonal in float64.

    Args:
        path: From `RunPaths.diagonal`.
        diagonal: ``[X, C, C]`` or ``[2, X, C, C]``.
    """
    write_atomically(path, lambda file: torch.save(own_storage(diagonal.to(torch.float64)), file))


def note_diagonal(kernel: Path, diagonal: Path) -> None:
    """Store the hash of a diagonal in the description of its kernel, which lies there already."""
    said = read_description(kernel)
    if said is not None:
        write_description(kernel, {**said, DIAGONAL_HASH_KEY: file_hash(diagonal)})


def is_noted(kernel: Path, diagonal: Path) -> bool:
    """Return whether a diagonal's file is there and is the one that the description of its kernel names."""
    noted = (read_description(kernel) or {}).get(DIAGONAL_HASH_KEY)
    return noted is not None and diagonal.is_file() and noted == file_hash(diagonal)


def load_diagonal(path: Path, kernel: Path, kernel_shape: tuple[int, ...]) -> Tensor | None:
    """Read the diagonal that belongs to a kernel.

    Args:
        path: From `RunPaths.diagonal`.
        kernel: The kernel's file, whose description has the hash of the diagonal.
        kernel_shape: The shape of the kernel in it.

    Returns:
        float64 ``[X, C, C]`` or ``[2, X, C, C]``; None if there is no file.

    Raises:
        FileError: The file is damaged, or holds something else.
        KernelMismatchError: It belongs to another kernel, or nothing shows that it belongs to this one.
    """
    if not path.is_file():
        return None
    noted = (read_description(kernel) or {}).get(DIAGONAL_HASH_KEY)
    if noted != file_hash(path):
        cause = "does not name it" if noted is None else "names another one"
        raise KernelMismatchError(
            f"{path} is not the diagonal that {kernel.name} was made with: {description_of(kernel).name} {cause}; "
            "remove the diagonal, or compute both again with `overwrite_kernels=True`",
            path=path,
            differences=[DIAGONAL_HASH_KEY],
        )
    found = read_tensor_file(path, "the diagonal of a kernel", "compute it with `kernel_variance=True`")
    if not isinstance(found, Tensor):
        raise unusable(path, "does not hold a tensor")
    diagonal = plain(found, path, "the diagonal of a kernel", torch.float64)
    *directions, _, c, x, _ = kernel_shape
    if list(diagonal.shape) != [*directions, x, c, c]:
        raise unusable(path, f"holds an array of shape {list(diagonal.shape)} beside a kernel of {list(kernel_shape)}")
    return diagonal
