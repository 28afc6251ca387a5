"""Checks of weights where they are read: NaN, infinity, and number types that stand for other numbers."""

from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lmntk.errors import ModelError, NotFiniteError

# The names of safetensors. Integers and 8-bit floats stand for other numbers, by scales stored beside them.
FLOATS = {"F64", "F32", "F16", "BF16"}


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Check that all weights are finite.

    Args:
        weights: The weights by name, of any dtype.
        where: The file or model that holds them, for the message.

    Raises:
        NotFiniteError: A weight holds NaN or infinity.

    Examples:
        >>> check_finite({"bias": torch.tensor([1.0, float("nan")])}, "model.safetensors")
        Traceback (most recent call last):
        lmntk.errors.NotFiniteError: model.safetensors holds NaN in the weight bias (1 of its 2 numbers are not finite), so that nothing can be predicted with it: name a checkpoint that is whole
    """  # noqa: E501
    for name, weight in weights.items():
        # Only finite numbers have a finite sum, and it is ten times faster than to look at each number.
        if not weight.is_floating_point() or bool(torch.isfinite(weight.sum())):
            continue
        broken = int((~torch.isfinite(weight)).sum())
        if broken == 0:
            continue  # the sum overflowed
        kind = "NaN" if bool(torch.isnan(weight).any()) else "infinity"
        raise NotFiniteError(
            f"{where} holds {kind} in the weight {name} ({broken} of its {weight.numel()} numbers are not finite), "
            "so that nothing can be predicted with it: name a checkpoint that is whole",
            parameter=name,
        )


def check_number_types(name_or_path: str, cache_dir: str | None) -> None:
    """Check that the weights in a checkpoint's safetensors files are floats of 16 bits or more.

    Args:
        name_or_path: A name on the hub or a local folder.
        cache_dir: The folder for downloads; None leaves the choice to transformers.

    Raises:
        ModelError: A weight has another type, of which transformers would ignore the scales.
    """
    for path in _safetensors_files(name_or_path, cache_dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                stored = file.get_slice(name)
                kind = stored.get_dtype()
                # Files also hold masks and counts of positions.
                is_weight = name.endswith((".weight", ".gamma", ".beta")) or (
                    name.endswith(".bias") and len(stored.get_shape()) == 1
                )
                if is_weight and kind not in FLOATS:
                    raise ModelError(
                        f"`model_name_or_path`: the checkpoint '{name_or_path}' holds the weight {name} as {kind}, "
                        "which is not a float of 16 bits or more: quantised weights are not read here; name the "
                        "checkpoint that they were made from, or a GGUF file of it (`gguf_file`)",
                        path=name_or_path,
                        parameter=name,
                    )


def _safetensors_files(name_or_path: str, cache_dir: str | None) -> Iterable[str]:
    """Return the safetensors files of a checkpoint, from a folder or the hub; none if it has another format."""
    found = [
        cached_file(
            name_or_path,
            name,
            cache_dir=cache_dir,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    ]
    if found[0] is not None:
        return [found[0]]
    return [] if found[1] is None else get_checkpoint_shard_files(name_or_path, found[1], cache_dir=cache_dir)[0]
