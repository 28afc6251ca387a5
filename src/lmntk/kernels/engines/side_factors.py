"""The factors of a tile's examples, as engines hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SideFactors:
    """The factors of one side of a tile.

    Attributes:
        of_layer: The factors of every regular layer, batch by batch.
        irregular: The layers that are not regular in one batch at least.
        broken: Which examples' gradients hold NaN or infinity, bool ``[n]``; None if no signs are taken.
    """

    of_layer: dict[str, Sequence[Any]]
    irregular: frozenset[str]
    broken: Tensor | None


@dataclass(frozen=True)
class TrainRow:
    """The factors of a train tile, kept for the next kernel of the same train examples.

    Attributes:
        train: The examples.
        batch_tokens: How many tokens were propagated together, on which the last bits depend.
        factors: Their factors, packed.
        signs: Whether these are the signs of their gradients, where a layer keeps them.
    """

    train: tuple[int, ...]
    batch_tokens: int
    factors: SideFactors
    signs: bool
