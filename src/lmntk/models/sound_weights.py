"""Weights that nothing can be predicted with, found where they are read and called by their name."""

from collections.abc import Iterable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from lmntk.errors import UsageError

# As safetensors calls them. Whole numbers and floats of 8 bits stand for others, by scales that lie beside them.
FLOATS = {"F64", "F32", "F16", "BF16"}


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """See that all weights are finite.

    Args:
        weights: By name; what has no fraction is finite.
        where: What holds them, for the message.

    Raises:
        UsageError: One is not, and is named.
    """
    for name, weight in weights.items():
        # A sum is finite of finite numbers only, and ten times faster to find than each number's own answer.
        if not weight.is_floating_point() or bool(torch.isfinite(weight.sum())):
            continue
        broken = int((~torch.isfinite(weight)).sum())
        if broken == 0:
            continue  # the sum alone was too large
        kind = "NaN" if bool(torch.isnan(weight).any()) else "infinity"
        raise UsageError(
            f"{where} holds {kind} in the weight {name} ({broken} of its {weight.numel()} numbers are not finite), "
            "so that nothing can be predicted with it: name a checkpoint that is whole"
        )


def check_number_types(name_or_path: str, cache_dir: str | None) -> None:
    """See that the weights of a checkpoint, where they lie in safetensors files, are floats of 16 bits or more.

    Raises:
        UsageError: One is not, and is named: transformers would take it for the number that it is stored as.
    """
    for path in _safetensors_files(name_or_path, cache_dir):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                stored = file.get_slice(name)
                kind = stored.get_dtype()
                # Beside weights there are masks and counts of positions.
                is_weight = name.endswith((".weight", ".gamma", ".beta")) or (
                    name.endswith(".bias") and len(stored.get_shape()) == 1
                )
                if is_weight and kind not in FLOATS:
                    raise UsageError(
                        f"--model_name_or_path: the checkpoint '{name_or_path}' holds the weight {name} as {kind}, "
                        "which is no float of 16 bits or more: quantised weights are not read here; name the "
                        "checkpoint that they were made of, or a GGUF file of it (--gguf_file)"
                    )


def _safetensors_files(name_or_path: str, cache_dir: str | None) -> Iterable[str]:
    """The files of a checkpoint, in a folder or from the hub; none where it has another form."""
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
