"""The files of the untrained model's logits, and of logits for ensembles."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lmntk.errors import UsageError
from lmntk.storage.atomic import prepare_output_dir, write_atomically
from lmntk.storage.kernel_files import _own_storage
from lmntk.storage.kernel_metadata import LOGITS_HASH_KEY, ROUNDING, _write_description, file_hash, read_description
from lmntk.storage.tensor_files import read_pair


def note_logits(kernel: Path, logits: Path | None) -> None:
    """Note in the description of a kernel which logits of the untrained model lie beside it; None: not known."""
    said = read_description(kernel)
    digest = None if logits is None else file_hash(logits)
    if said is not None and said.get(LOGITS_HASH_KEY) != digest:
        _write_description(kernel, {**said, LOGITS_HASH_KEY: digest})


def save_logits(path: Path, logits: Tensor, targets: Tensor) -> None:
    """Write logits [X, C] of the untrained model and the targets [X]."""
    write_atomically(path, lambda file: torch.save((_own_storage(logits), _own_storage(targets)), file))


def load_logits(path: Path) -> tuple[Tensor, Tensor]:
    """Read what `save_logits` wrote: logits [X, C] and targets [X].

    Raises:
        UsageError: The file is missing, damaged or of another shape, or holds NaN or infinity.
    """
    logits, targets = read_pair(path, "logits", "targets")
    if logits.ndim != 2 or list(targets.shape) != [len(logits)]:
        raise UsageError(
            f"{path} holds arrays of shape {list(logits.shape)} and {list(targets.shape)}, not logits [examples, "
            "logits] and targets [examples]: give the command that made it again, with --overwrite_kernels"
        )
    broken = ~torch.isfinite(logits).all(dim=1)
    if broken.any():
        raise UsageError(
            f"{path} holds NaN or infinity, first for example {int(broken.int().argmax())} (counted from 0): compute "
            "it again with --overwrite_kernels"
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
    """See that logits of the untrained model are of the examples of a kernel beside them.

    Args:
        path: Where the logits are.
        targets: Their targets, [X].
        kernel: The kernel's file.
        labels: The kernel's labels, [X].

    Returns:
        Whether the kernel's description tells that they are of its run.

    Raises:
        UsageError: They are of other examples, or another run's.
    """
    if targets.tolist() != labels.tolist():
        raise UsageError(
            f"{path} has other targets than the labels of {kernel}: they are of other examples; compute both by one "
            "command, with --overwrite_kernels"
        )
    noted = (read_description(kernel) or {}).get(LOGITS_HASH_KEY)
    if noted is not None and noted != file_hash(path):
        raise UsageError(
            f"{path} is not what lay beside {kernel.name} when that was made, as its description tells: give the "
            "command that made the kernel again, without --load_kernels, which renews the logits"
        )
    return noted is not None


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``.npy``, its folder made where missing.

    Raises:
        UsageError: The file system refuses.
    """
    prepare_output_dir(path.parent, "--save_logit_dir")
    write_atomically(path, lambda file: np.save(file, array, allow_pickle=False))
