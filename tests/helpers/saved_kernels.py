"""Kernels in files of their own, written piece by piece as runs write them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmntk.storage.atomic import temporary_file
from lmntk.storage.kernel_files import LayerKernels, put_in_place
from lmntk.storage.kernel_metadata import HASH_KEY
from lmntk.storage.streamed_tensors import StreamedTensors
from lmntk.storage.tensor_files import own_storage


def save_kernel(path: Path, kernel: Tensor, labels: Tensor, description: Mapping[str, Any]) -> None:
    """Write a kernel, in float64, and beside it its description with the hash of the kernel file."""
    own = own_storage(labels)
    with temporary_file(path) as file:
        streamed = StreamedTensors(file, [tuple(kernel.shape)], lambda tensors: (tensors[0], own))
        streamed.write(0, 0, kernel)
        put_in_place(file, path, {**description, HASH_KEY: streamed.finish()})


def save_layer_kernels(path: Path, layers: LayerKernels) -> None:
    """Write the layers' contributions to a kernel, or other slices beside it, in float64."""
    torch.save({name: part.to(torch.float64) for name, part in layers.items()}, path)
