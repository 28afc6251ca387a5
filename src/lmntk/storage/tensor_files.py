"""Files of tensors, as anybody may have written them: what is read is numbers, and nothing of a file is run."""

import errno
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmntk.errors import UsageError


def read_tensor_file(path: Path, kind: str, if_missing: str) -> Any:
    """Read what `torch.save` wrote, without running anything of it.

    Args:
        path: The file.
        kind: What it should hold.
        if_missing: The way out where there is no file.

    Raises:
        UsageError: It is missing or damaged, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: {if_missing}") from error
    # Damaged files make torch raise anything from EOFError to RuntimeError.
    except Exception as error:
        told = isinstance(error, OSError) and error.errno != errno.EINVAL  # torch's word for a file that was cut
        reason = error.strerror if isinstance(error, OSError) and told else "it is cut or damaged"
        raise UsageError(
            f"{path} cannot be read as {kind} ({reason}): give the command that made it again, with --overwrite_kernels"
        ) from error


def read_pair(path: Path, kind: str, beside: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Read a pair of tensors.

    Args:
        path: The file.
        kind: What the first one is: ``"kernel"``, ``"logits"``.
        beside: What the second one is.
        dtype: What the first one becomes, see `plain`.

    Raises:
        UsageError: It is missing or damaged, or holds something else.
    """
    missing = f"compute the {kind} first, or give the folder that holds it (--load_kernels)"
    content = read_tensor_file(path, kind, missing)
    if not (type(content) in (tuple, list) and len(content) == 2 and all(isinstance(x, Tensor) for x in content)):
        raise UsageError(
            f"{path} does not hold a pair of tensors, {kind} and labels: give the command that made it again, with "
            "--overwrite_kernels"
        )
    return plain(content[0], path, kind, dtype), plain(content[1], path, beside)


def plain(tensor: Tensor, path: Path, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of a file as numpy can take it: dense, real numbers, on the CPU, without a gradient.

    Args:
        tensor: The tensor.
        path: Its file.
        what: What it is.
        dtype: What it becomes; by default its own, but float32 where numpy may not know that.

    Raises:
        UsageError: It is of another kind, or says that it is larger than memory.
    """

    def unfit(form: str) -> UsageError:
        return UsageError(
            f"{path} holds {what} in another form than a plain array of numbers ({form}): compute it again with "
            "--overwrite_kernels"
        )

    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise unfit("nested, sparse or quantised")
    if tensor.device.type != "cpu" or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise unfit(f"{tensor.dtype} on {tensor.device}")
    if dtype is None:
        dtype = torch.float32 if tensor.dtype.is_floating_point and tensor.dtype != torch.float64 else tensor.dtype
    try:
        return tensor.detach().resolve_neg().to(dtype).contiguous()
    except (RuntimeError, MemoryError) as error:
        raise unfit(f"memory has no room for {list(tensor.shape)}") from error
