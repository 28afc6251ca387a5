"""What is kept beside a kernel: its parts, which sum to it, and the kernels of LoRA adapters, which do not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmntk.errors import FileError, KernelMismatchError
from lmntk.kernels.assembly import sum_of_parts
from lmntk.storage import kernel_files, kernel_metadata
from lmntk.storage.kernel_files import LayerKernels
from lmntk.storage.paths import RunPaths

LAYERS_KEY, PARTS_KEY, LORA_KEY = "layers", "parts", "lora_kernels"
LAYERS_ALONE = ("layer",)
SHA256 = "sha256"
PARTS_HASH_KEY = "parts_sha256"
CHECKED_NUMBERS = 2**22
"""Numbers of a kernel that are compared with the sum of its parts at once."""


@dataclass(frozen=True)
class WantedSlices:
    """What a run keeps beside each kernel.

    Attributes:
        keys: What parameters of parts are told apart by, see `lmntk.storage.part_names.PART_KEYS`; empty for no parts.
        lora: The settings of the adapters whose kernels are kept; None for none.
    """

    keys: tuple[str, ...] = ()
    lora: Mapping[str, Any] | None = None

    @property
    def layers_alone(self) -> bool:
        """Whether the parts are the layers, whose files have another name."""
        return self.keys == LAYERS_ALONE

    def lacking(self, paths: RunPaths, split: str, stored: Mapping[str, Any]) -> str | None:
        """Return what a kernel was made without, as a setting in a sentence; None if all is beside it.

        Args:
            paths: The folder of the kernel.
            split: The kernel's split.
            stored: The kernel's description.
        """
        if self.layers_alone and not (LAYERS_KEY in stored and paths.layer_kernels(split).is_file()):
            return "kernel_per_layer=True"
        kept = set(self.keys) <= set(kept_keys(stored)) and paths.part_kernels(split).is_file()
        if self.keys and not self.layers_alone and not kept:
            return f"kernel_parts={','.join(self.keys)}"
        if self.lora is not None and not (LORA_KEY in stored and paths.lora_kernels(split).is_file()):
            return f"kernel_lora_rank={self.lora['rank']}"
        return None

    def other_adapters(self, stored: Mapping[str, Any]) -> str | None:
        """Return how the adapters beside a kernel differ from the wanted ones; None if they are the same.

        Args:
            stored: The kernel's description, which has adapters if any are wanted.
        """
        kept = stored.get(LORA_KEY) or {}
        for name, wanted in (self.lora or {}).items():
            own, now = (_in_order(value) for value in (kept.get(name), wanted))
            if own != now:
                return f"{name}: stored {_shown(own)}, now {_shown(now)}"
        return None


def kept_keys(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the parts beside a kernel are told apart by, from its description; empty if there are none."""
    return tuple((description.get(PARTS_KEY) or {}).get("keys") or ())


def _in_order(value: Any) -> Any:
    """Names of layers have no order."""
    return sorted(value) if isinstance(value, (list, tuple)) else value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "all linear layers"
    return str(value)


@dataclass(frozen=True)
class KernelSlices:
    """Parts of a kernel and kernels of adapters, with what a description says of them.

    Attributes:
        keys: What parameters of parts are told apart by; empty if there are no parts.
        parts: The parts by name, of the kernel's shape.
        lora: The kernels of adapters by the names of the adapted weights, of the kernel's shape.
        description: What `lmntk subsets` needs of them: under `PARTS_KEY` and `LORA_KEY`, as JSON can hold it.
    """

    keys: tuple[str, ...] = ()
    parts: LayerKernels = field(default_factory=dict)
    lora: LayerKernels = field(default_factory=dict)
    description: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> LayerKernels:
        """The layers' parts, where these are kept alone."""
        return self.parts if self.keys == LAYERS_ALONE else {}


def slice_files(paths: RunPaths, split: str, slices: KernelSlices) -> dict[Path, LayerKernels]:
    """Return which tensors are kept in which file beside a kernel."""
    parts = paths.layer_kernels(split) if slices.layers else paths.part_kernels(split)
    files = {parts: slices.parts, paths.lora_kernels(split): slices.lora}
    return {path: tensors for path, tensors in files.items() if tensors}


def described_slices(paths: RunPaths, split: str, slices: KernelSlices, hashes: Mapping[Path, str]) -> dict[str, Any]:
    """Return what a kernel's description says of the files beside it.

    Args:
        paths: The folder of the kernel.
        split: The kernel's split.
        slices: What the files hold.
        hashes: The SHA-256 of each file.
    """
    description = dict(slices.description)
    if slices.layers:
        description[LAYERS_KEY] = list(slices.layers)
    if slices.parts:
        description[PARTS_HASH_KEY] = hashes[paths.layer_kernels(split) if slices.layers else paths.part_kernels(split)]
    if slices.lora:
        description[LORA_KEY] = {**description.get(LORA_KEY, {}), SHA256: hashes[paths.lora_kernels(split)]}
    return description


def remove_other_slices(paths: RunPaths, split: str, slices: KernelSlices) -> None:
    """Remove the files beside a kernel that belong to an earlier one."""
    kept = slice_files(paths, split, slices)
    for path in (paths.layer_kernels(split), paths.part_kernels(split), paths.lora_kernels(split)):
        if path not in kept:
            path.unlink(missing_ok=True)


def open_parts(paths: RunPaths, split: str, description: Mapping[str, Any]) -> tuple[tuple[str, ...], LayerKernels]:
    """Open the parts of a kernel; their numbers are read from disk where they are used.

    Args:
        paths: The folder of the kernel.
        split: The kernel's split.
        description: The kernel's description.

    Returns:
        What parameters are told apart by, and the parts by name; both are empty if the kernel was kept without parts.

    Raises:
        FileError: A file is damaged, or does not have the parts of the description.
        KernelMismatchError: A file belongs to another kernel.
    """
    path, keys = paths.part_kernels(split), kept_keys(description)
    if not path.is_file() or not keys or keys == LAYERS_ALONE:
        path, keys = paths.layer_kernels(split), LAYERS_ALONE
        if not path.is_file() or LAYERS_KEY not in description:
            return (), {}
    parts = kernel_files.load_layer_kernels(path, lazily=True)
    check_hash(path, description)
    known = (description.get(PARTS_KEY) or {}).get("parameters")
    if known is not None and list(known) != list(parts):
        raise FileError(
            f"{path} holds other parts than the description beside the kernel names: compute both again with "
            "`overwrite_kernels=True`",
            path=path,
        )
    return keys, parts


def check_hash(path: Path, description: Mapping[str, Any]) -> None:
    """Check that a file of layers or parts is the one that a kernel was written with.

    Args:
        path: The file.
        description: The kernel's description; that of an earlier version of the program has no hash to compare.

    Raises:
        KernelMismatchError: It is another file.
    """
    noted = description.get(PARTS_HASH_KEY)
    if noted is not None and path.is_file() and kernel_metadata.file_hash(path) != noted:
        raise KernelMismatchError(
            f"{path} does not hold the parts of the kernel beside it, whose description names another file: compute "
            "both again with `overwrite_kernels=True`",
            path=path,
            differences=[PARTS_HASH_KEY],
        )


def open_lora(paths: RunPaths, split: str, description: Mapping[str, Any]) -> LayerKernels:
    """Open the kernels of adapters; their numbers are read from disk where they are used.

    Raises:
        FileError: The file is damaged.
        KernelMismatchError: It belongs to another kernel.
    """
    path, noted = paths.lora_kernels(split), description.get(LORA_KEY)
    if not noted or not path.is_file():
        return {}
    if kernel_metadata.file_hash(path) != noted.get(SHA256):
        raise KernelMismatchError(
            f"{path} does not hold the kernels of adapters that the description beside the kernel names: compute both "
            "again with `overwrite_kernels=True`",
            path=path,
            differences=[LORA_KEY],
        )
    return kernel_files.load_layer_kernels(path, lazily=True)


def check_sum(parts: LayerKernels, names: Sequence[str], kernel: Tensor, largest: float) -> bool:
    """Return whether parts have a kernel's shape and sum to it, up to rounding; a few rows are in memory at a time."""
    if not names or any(parts[name].shape != kernel.shape for name in names):
        return False
    rows = [tensor.reshape(-1, *kernel.shape[-3:]) for tensor in (kernel, *(parts[name] for name in names))]
    step = max(1, CHECKED_NUMBERS // rows[0][0].numel())
    off = whole = 0.0
    for first in range(0, len(rows[0]), step):
        own, *others = (tensor[first : first + step] for tensor in rows)
        off += float((sum_of_parts(others) - own).norm()) ** 2
        whole += float(own.norm()) ** 2
    return math.sqrt(off) <= largest * math.sqrt(whole)
