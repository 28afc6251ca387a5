"""Kernel files: kernels with their labels, and the contributions of the layers to a kernel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lmntk.errors import FileError, KernelMismatchError
from lmntk.storage.atomic import move_into_place
from lmntk.storage.kernel_metadata import HASH_KEY, file_hash, read_description, write_description
from lmntk.storage.paths import description_of
from lmntk.storage.tensor_files import plain, read_pair, read_tensor_file, unusable

LayerKernels = dict[str, Tensor]
"""The contribution of each layer to a kernel by the layer's name, from the input on: tensors that sum to the kernel."""


def put_in_place(file: BinaryIO, path: Path, description: Mapping[str, Any]) -> None:
    """Give a kernel's file, and its description, their names.

    Wherever this is interrupted, a kernel file that exists lies beside its own description.

    Args:
        file: The file with the kernel, from `temporary_file`.
        path: The kernel's name.
        description: Its description, with its hash.
    """
    # The old kernel goes first, then its description is replaced.
    path.unlink(missing_ok=True)
    write_description(path, description)
    move_into_place(file, path)


def load_kernel(path: Path, own: bool = False) -> tuple[Tensor, Tensor]:
    """Read a kernel file of this program, or one of the same layout without a description.

    The numbers of a large kernel are read from disk where they are used (see `read_tensor_file`). The file may be
    replaced meanwhile: what was opened stays.

    Args:
        path: From `RunPaths.kernel`.
        own: Whether this process has just written the file, so that its hash need not be compared.

    Returns:
        The kernel, [N, C, X, C] or [2, N, C, X, C] in float64, and the labels, [X].

    Raises:
        FileError: The file is missing, damaged or of another shape.
        KernelMismatchError: The description beside it belongs to another kernel.

    >>> import tempfile
    >>> from lmntk.storage.paths import RunPaths
    >>> path = RunPaths(tempfile.mkdtemp(), "sst-2").kernel("train")
    >>> torch.save((torch.ones(2, 1, 2, 1), torch.tensor([-1.0, 1.0])), path)
    >>> kernel, labels = load_kernel(path)
    >>> kernel.dtype, list(kernel.shape), labels.tolist()
    (torch.float64, [2, 1, 2, 1], [-1.0, 1.0])
    """
    kernel, labels = read_pair(path, "kernel", "labels", torch.float64)
    described = read_description(path)
    if not own and described is not None and described.get(HASH_KEY) != file_hash(path):
        raise KernelMismatchError(
            f"{path} is not the kernel that {description_of(path).name} describes: give the command that made it "
            "again, with `overwrite_kernels=True`, or remove the description if the kernel is right",
            path=path,
            differences=[HASH_KEY],
        )
    shape = list(kernel.shape)
    leading, rest = (shape[:1], shape[1:]) if kernel.ndim == 5 else ([], shape)
    if leading not in ([], [2]) or len(rest) != 4 or rest[1] != rest[3] or not kernel.numel():
        layout = "[train examples, logits, examples, logits] with or without a leading 2"
        raise unusable(path, f"holds an array of shape {shape}, not a kernel {layout}")
    if list(labels.shape) != [rest[2]]:
        raise unusable(path, f"holds labels of shape {list(labels.shape)} for {rest[2]} examples")
    return kernel, labels


def load_layer_kernels(path: Path, lazily: bool | None = None) -> LayerKernels:
    """Read the layers' contributions to a kernel, or other slices beside it, float64.

    Args:
        path: The file.
        lazily: Whether numbers are read from disk where they are used, and not now; None for those of large files.

    Raises:
        FileError: The file is missing or damaged, or holds something else.
    """
    remedy = "`kernel_per_layer` or `kernel_parts` keeps them, with `overwrite_kernels=True`"
    parts = read_tensor_file(path, "the layers' parts of a kernel", remedy, lazily)
    whole = type(parts) is dict and parts and all(type(name) is str for name in parts)
    if not whole or not all(isinstance(part, Tensor) for part in parts.values()):
        raise FileError(f"{path} does not hold kernels by the names of layers: remove it", path=path)
    numbers = {name: plain(part, path, f"the part of {name}", torch.float64) for name, part in parts.items()}
    if len({part.shape for part in numbers.values()}) > 1:
        raise FileError(f"{path} does not hold kernels of one shape by the names of layers: remove it", path=path)
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
