"""Files of tensors, possibly from others: reading them yields numbers and never runs code."""

import errno
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmntk.errors import FileError

MAPPED_BYTES = 2**26
"""From this size on a file is mapped, so that its numbers are read from disk where they are used."""


def read_tensor_file(path: Path, kind: str, remedy: str, lazily: bool | None = None) -> Any:
    """Read what `torch.save` wrote, without running code from it.

    Args:
        path: The file to read.
        kind: What the file should hold, for the error.
        remedy: What helps if the file is missing.
        lazily: Whether to map the file, so that numbers are read where they are used and need no memory; None for files
            of `MAPPED_BYTES` or more.

    Raises:
        FileError: The file is missing or damaged, or would run code.
    """
    try:
        mapped = _is_large(path) if lazily is None else lazily
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist: {remedy}", path=path) from error
    # Damaged files make torch raise anything from EOFError to RuntimeError.
    except Exception as error:
        # torch reports a file that was cut as EINVAL.
        known = isinstance(error, OSError) and error.errno != errno.EINVAL
        reason = error.strerror if isinstance(error, OSError) and known else "it is cut or damaged"
        raise unusable(path, f"cannot be read as {kind} ({reason})") from error


def read_pair(path: Path, kind: str, beside: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Read a pair of tensors, see `read_tensor_file`.

    Args:
        path: The file to read.
        kind: What the first tensor is: ``"kernel"``, ``"logits"``.
        beside: What the second tensor is.
        dtype: The dtype to convert the first one to, see `plain`.

    Raises:
        FileError: The file is missing or damaged, or holds something else.
    """
    remedy = f"compute the {kind} first, or give the folder that holds it (`load_kernels`)"
    content = read_tensor_file(path, kind, remedy)
    if not (type(content) in (tuple, list) and len(content) == 2 and all(isinstance(x, Tensor) for x in content)):
        raise unusable(path, f"does not hold a pair of tensors, {kind} and labels")
    return plain(content[0], path, kind, dtype), plain(content[1], path, beside)


def _is_large(path: Path) -> bool:
    """Return whether to map a file; torch can map the files that are zip archives, as all but its oldest ones are."""
    return path.is_file() and path.stat().st_size >= MAPPED_BYTES and zipfile.is_zipfile(path)


def plain(tensor: Tensor, path: Path, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of a file in a form that numpy can take: dense, real, on the CPU, without a gradient.

    Args:
        tensor: A tensor that was read.
        path: The file it comes from.
        what: What the tensor is, for the error.
        dtype: The dtype to convert it to; by default its own, or float32 for dtypes that numpy may not know.

    Raises:
        FileError: It is of another kind, or claims to be larger than memory.
    """

    def unfit(form: str) -> FileError:
        return unusable(path, f"holds {what} in another form than a plain array of numbers ({form})")

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise unfit("nested, sparse or quantised")
    if tensor.device.type != "cpu" or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise unfit(f"{tensor.dtype} on {tensor.device}")
    if dtype is None:
        dtype = torch.float32 if tensor.dtype.is_floating_point and tensor.dtype != torch.float64 else tensor.dtype
    try:
        return tensor.detach().resolve_neg().to(dtype).contiguous()
    except (RuntimeError, MemoryError) as error:
        raise unfit(f"{list(tensor.shape)} does not fit into memory") from error


def own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU in memory of its own: of a slice, torch.save would write all of the memory."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes else own.clone()


def unusable(path: Path, reason: str) -> FileError:
    """Return the error for a file of a run that the same command must write again.

    Args:
        path: The file that cannot be used.
        reason: What is wrong with it, as a predicate.
    """
    return FileError(f"{path} {reason}: give the command that made it again, with `overwrite_kernels=True`", path=path)
