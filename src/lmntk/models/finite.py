"""Weights that are no numbers: found once, where they are read, and called by their name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lmntk.errors import UsageError


def check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """See that all weights are finite.

    Args:
        weights: By name; what has no fraction is finite.
        where: What holds them, for the message.

    Raises:
        UsageError: One is not, and is named.
    """
    for name, weight in weights.items():
        if not weight.is_floating_point() or bool(torch.isfinite(weight).all()):
            continue
        broken = int((~torch.isfinite(weight)).sum())
        kind = "NaN" if bool(torch.isnan(weight).any()) else "infinity"
        raise UsageError(
            f"{where} holds {kind} in the weight {name} ({broken} of its {weight.numel()} numbers are not finite), "
            "so that nothing can be predicted with it: name a checkpoint that is whole"
        )
