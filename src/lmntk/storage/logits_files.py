"""Logits of the untrained model and logits for ensembles: their files, and whether they match a kernel."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmntk.errors import KernelMismatchError, NotFiniteError, UsageError
from lmntk.storage.atomic import prepare_output_dir, write_atomically
from lmntk.storage.kernel_metadata import LOGITS_HASH_KEY, file_hash, read_description, write_description
from lmntk.storage.tensor_files import own_storage, read_pair, unusable

ROUNDING = 1e3  # units in the last place by which the logits of another machine may differ


def note_logits(kernel: Path, logits: Path | None) -> None:
    """Store the hash of the untrained model's logits in a kernel's description; None stands for unknown logits."""
    said = read_description(kernel)
    digest = None if logits is None else file_hash(logits)
    if said is not None and said.get(LOGITS_HASH_KEY) != digest:
        write_description(kernel, {**said, LOGITS_HASH_KEY: digest})


def save_logits(path: Path, logits: Tensor, targets: Tensor) -> None:
    """Write logits [X, C] of the untrained model and the targets [X]."""
    write_atomically(path, lambda file: torch.save((own_storage(logits), own_storage(targets)), file))


def load_logits(path: Path) -> tuple[Tensor, Tensor]:
    """Read what `save_logits` wrote: logits [X, C] and targets [X].

    Raises:
        FileError: The file is missing, damaged or of another shape.
        NotFiniteError: It holds NaN or infinity.
    """
    logits, targets = read_pair(path, "logits", "targets")
    if logits.ndim != 2 or list(targets.shape) != [len(logits)]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise unusable(path, f"holds arrays of shape {shapes}, not logits [examples, logits] and targets [examples]")
    broken = ~torch.isfinite(logits).all(dim=1)
    if broken.any():
        example = int(broken.int().argmax())
        raise NotFiniteError(
            f"{path} holds NaN or infinity, first for example {example} (counted from 0): compute it again with "
            "`overwrite_kernels=True`",
            example=example,
            path=path,
        )
    return logits, targets


def has_logits(path: Path, logits: Tensor, targets: Tensor) -> bool:
    """Whether a file holds these logits [X, C], up to rounding, and these targets [X]."""
    try:
        stored, labels = load_logits(path)
    except UsageError:
        return False
    if stored.shape != logits.shape or stored.dtype != logits.dtype or labels.tolist() != targets.tolist():
        return False
    return bool((stored - logits).norm() <= ROUNDING * torch.finfo(logits.dtype).eps * logits.norm())


def check_logits(path: Path, targets: Tensor, kernel: Path, labels: Tensor) -> bool:
    """Check that logits of the untrained model belong to the examples of a kernel beside them.

    Args:
        path: The file of the logits.
        targets: The targets in it, [X].
        kernel: The kernel's file.
        labels: The kernel's labels, [X].

    Returns:
        Whether the kernel's description confirms that they come from its run.

    Raises:
        KernelMismatchError: They belong to other examples or another run.
    """
    if targets.tolist() != labels.tolist():
        raise KernelMismatchError(
            f"{path} has other targets than the labels of {kernel}, so it belongs to other examples; compute both by "
            "one command, with `overwrite_kernels=True`",
            path=path,
            differences=["targets"],
        )
    noted = (read_description(kernel) or {}).get(LOGITS_HASH_KEY)
    if noted is not None and noted != file_hash(path):
        raise KernelMismatchError(
            f"{path} is not the file that {kernel.name} was made with, according to its description: give the command "
            "that made the kernel again, without `load_kernels`, which renews the logits",
            path=path,
            differences=[LOGITS_HASH_KEY],
        )
    return noted is not None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``.npy`` into `save_logit_dir`, which is made if missing.

    Raises:
        FileError: The file system refuses.
    """
    prepare_output_dir(path.parent, "save_logit_dir")
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))
