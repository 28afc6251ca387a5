"""The files a run leaves behind: kernels, logits, metrics and the log.

Every file but the log appears whole or not at all: it is written under another name in its folder, then renamed.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from lmntk.errors import UsageError
from lmntk.storage.atomic import write_atomically
from lmntk.storage.kernel_metadata import HASH_KEY, _write_description, file_hash, read_description
from lmntk.storage.paths import description_of
from lmntk.storage.tensor_files import plain, read_pair, read_tensor_file

LayerKernels = dict[str, Tensor]
"""What each layer adds to a kernel, by its name, from the input on: of the kernel's shape, and they sum to it."""


def save_kernel(path: Path, kernel: Tensor, labels: Tensor, description: Mapping[str, Any]) -> None:
    """Write a kernel, and beside it the description of what it is.

    Wherever this is interrupted, a kernel file that exists stands beside its own description: the old kernel goes,
    the new description comes, and the new kernel appears last. The description holds the hash of the kernel's file too.

    Args:
        path: From `kernel_path`.
        kernel: [N, C, X, C] or [2, N, C, X, C], written in float64.
        labels: [X], class ids or -1 and +1.
        description: What JSON can hold.
    """

    def write(file: BinaryIO) -> None:
        hashing = _HashingWriter(file)
        torch.save((_own_storage(kernel.to(torch.float64)), _own_storage(labels)), cast(BinaryIO, hashing))
        path.unlink(missing_ok=True)
        _write_description(path, {**description, HASH_KEY: hashing.hexdigest()})

    write_atomically(path, write)


def load_kernel(path: Path) -> tuple[Tensor, Tensor]:
    """Read a kernel file of ours, or one in the same layout that has no description.

    Args:
        path: From `kernel_path`.

    Returns:
        The kernel, [N, C, X, C] or [2, N, C, X, C] in float64, and the labels, [X].

    Raises:
        UsageError: The file is missing, damaged or of another shape, or the description beside it belongs to another.
    """
    kernel, labels = read_pair(path, "kernel", "labels", torch.float64)
    described = read_description(path)
    if described is not None and described.get(HASH_KEY) != file_hash(path):
        raise UsageError(
            f"{path} is not the kernel that {description_of(path).name} describes: "
            "give the command that made it again, with --overwrite_kernels, or remove the description if the kernel is "
            "right"
        )
    shape = list(kernel.shape)
    directions, rest = (shape[:1], shape[1:]) if kernel.ndim == 5 else ([], shape)
    if directions not in ([], [2]) or len(rest) != 4 or rest[1] != rest[3] or not kernel.numel():
        raise UsageError(
            f"{path} holds an array of shape {shape}, not a kernel [train examples, logits, examples, logits] "
            "with or without a leading 2: give the command that made it again, with --overwrite_kernels"
        )
    if list(labels.shape) != [rest[2]]:
        raise UsageError(
            f"{path} holds labels of shape {list(labels.shape)} for {rest[2]} examples: "
            "give the command that made it again, with --overwrite_kernels"
        )
    return kernel, labels


def save_layer_kernels(path: Path, layers: LayerKernels) -> None:
    """Write the layers' parts of a kernel, in float64.

    Args:
        path: From `layer_kernels_path`.
        layers: Of the kernel's shape each.
    """
    write_atomically(
        path, lambda file: torch.save({name: part.to(torch.float64) for name, part in layers.items()}, file)
    )


def load_layer_kernels(path: Path) -> LayerKernels:
    """Read what `save_layer_kernels` wrote.

    Raises:
        UsageError: The file is missing or damaged, or holds something else.
    """
    parts = read_tensor_file(
        path, "the layers' parts of a kernel", "--kernel_per_layer keeps them, with --overwrite_kernels"
    )
    whole = type(parts) is dict and parts and all(type(name) is str for name in parts)
    if not whole or not all(isinstance(part, Tensor) for part in parts.values()):
        raise UsageError(f"{path} does not hold kernels by the names of layers: remove it")
    numbers = {name: plain(part, path, f"the part of {name}", torch.float64) for name, part in parts.items()}
    if len({part.shape for part in numbers.values()}) > 1:
        raise UsageError(f"{path} does not hold kernels of one shape by the names of layers: remove it")
    return numbers


def trace_shares(layers: LayerKernels) -> dict[str, float]:
    """Return each layer's share of the trace of the train kernel.

    Args:
        layers: The layers' parts of the train kernel, [N, C, N, C] or [2, N, C, N, C].

    Returns:
        Shares by layer, which sum to 1; all 0 if the trace is 0.

    Examples:
        >>> trace_shares({"embeddings": torch.ones(3, 1, 3, 1), "head": 3 * torch.ones(3, 1, 3, 1)})
        {'embeddings': 0.25, 'head': 0.75}
    """
    traces = {name: float(torch.einsum("...iaia->...", part).sum()) for name, part in layers.items()}
    whole = sum(traces.values())
    return {name: trace / whole if whole else 0.0 for name, trace in traces.items()}


class _HashingWriter:
    """Passes bytes on to a file and keeps their SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, alone in its memory: torch.save would write all of what a slice is a slice of."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()
