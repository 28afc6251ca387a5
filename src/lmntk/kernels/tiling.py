"""The plan of a kernel: which tiles, in which order, by whom. Pure arithmetic."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tile:
    """A block of the kernel: some train examples against some X examples, by their indices."""

    train: tuple[int, ...]
    x: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """The number of pairs of examples in the tile."""
        return len(self.train) * len(self.x)


@dataclass(frozen=True)
class Plan:
    """What is to be computed.

    Attributes:
        rows: For each train tile, in order, the X tiles that go with it.
        train_tile: The largest number of train examples in a tile.
        x_tile: The largest number of X examples in a tile.
        train_size: N, the number of train examples.
        x_size: X, the number of examples on the other axis.
        symmetric: X is the train set and the kernel symmetric: only one of two mirrored tiles is in the plan.
    """

    rows: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    train_tile: int
    x_tile: int
    train_size: int
    x_size: int
    symmetric: bool

    def __iter__(self) -> Iterator[Tile]:
        """Go through the tiles, train tile by train tile."""
        return (Tile(train, x) for train, x_tiles in self.rows for x in x_tiles)

    @property
    def pairs(self) -> int:
        """The number of pairs of examples to compute."""
        return sum(tile.pairs for tile in self)

    def share(self, rank: int, world_size: int) -> "Plan":
        """Return the part of the plan that process `rank` of `world_size` computes: every so-manieth X tile."""
        dealt = iter(range(sum(len(x_tiles) for _, x_tiles in self.rows)))
        rows = tuple(
            (train, tuple(x for x in x_tiles if next(dealt) % world_size == rank)) for train, x_tiles in self.rows
        )
        return replace(self, rows=tuple(row for row in rows if row[1]))


def make_plan(
    train_shapes: Sequence[Any], x_shapes: Sequence[Any], train_tile: int, x_tile: int, symmetric: bool = False
) -> Plan:
    """Lay tiles over a kernel, examples of like shape together.

    Args:
        train_shapes: What the train examples are ordered by: their numbers of tokens, say.
        x_shapes: The same for the X examples.
        train_tile: The largest number of train examples in a tile.
        x_tile: The largest number of X examples in a tile; a symmetric kernel has `train_tile` along both axes.
        symmetric: X is the train set and the kernel symmetric.
    """
    train_tiles = _cut(train_shapes, train_tile)
    if symmetric:
        rows = tuple((train, tuple(train_tiles[position:])) for position, train in enumerate(train_tiles))
    else:
        x_tiles = tuple(_cut(x_shapes, x_tile))
        rows = tuple((train, x_tiles) for train in train_tiles)
    return Plan(rows, train_tile, train_tile if symmetric else x_tile, len(train_shapes), len(x_shapes), symmetric)


def fair(size: int, examples: int, processes: int) -> int:
    """Return the tile size, `size` at most, that makes equal tiles, and as many for every process."""
    rounds = max(1, -(-examples // (size * processes)))
    return max(1, -(-examples // (rounds * processes)))


def _cut(shapes: Sequence[Any], size: int) -> list[tuple[int, ...]]:
    # Longest first: what needs most memory fails, if it must, at once.
    order = sorted(range(len(shapes)), key=lambda index: (shapes[index], index), reverse=True)
    return [tuple(order[start : start + size]) for start in range(0, len(order), max(size, 1))]
