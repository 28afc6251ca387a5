"""The plan of a kernel: which tiles, in which order, by whom. Pure arithmetic."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
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
class CostModel:
    """How long the parts of a plan take, in seconds.

    Attributes:
        row: Of a train tile, what comes before its first X tile.
        tile: Of a tile, what comes then.
    """

    row: Callable[[tuple[int, ...]], float]
    tile: Callable[[Tile], float]


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

    tile_rows: tuple[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]], ...]
    train_tile: int
    x_tile: int
    train_size: int
    x_size: int
    symmetric: bool

    def __iter__(self) -> Iterator[Tile]:
        """Go through the tiles, train tile by train tile."""
        return (Tile(train, x) for train, x_tiles in self.tile_rows for x in x_tiles)

    @property
    def pairs(self) -> int:
        """The number of pairs of examples to compute."""
        return sum(tile.pairs for tile in self)

    def restricted_to(self, tiles: Container[Tile]) -> "Plan":
        """Return the part of the plan that consists of some of its tiles."""
        rows = ((train, tuple(x for x in x_tiles if Tile(train, x) in tiles)) for train, x_tiles in self.tile_rows)
        return replace(self, tile_rows=tuple(row for row in rows if row[1]))

    def seconds(self, pace: CostModel) -> float:
        """Return how long one process takes."""
        return sum(pace.row(train) for train, _ in self.tile_rows) + sum(pace.tile(tile) for tile in self)

    def partition(self, pace: CostModel, processes: int) -> list["Plan"]:
        """Deal the tiles to so many processes, that the last is done as early as may be.

        Tiles are dealt one by one, or all of a train tile together, whichever turns out better: what comes before a
        train tile's first X tile is paid by every process that has a part of it.
        """
        rows = [[Tile(train, x) for x in x_tiles] for train, x_tiles in self.tile_rows if x_tiles]
        single = [[tile] for row in rows for tile in sorted(row, key=pace.tile, reverse=True)]
        whole = sorted(rows, key=lambda row: sum(map(pace.tile, row)), reverse=True)
        dealt = [self._assign(groups, pace, processes) for groups in (single, whole)]
        return min(dealt, key=lambda shares: max(share.seconds(pace) for share in shares))

    def _assign(self, groups: list[list[Tile]], pace: CostModel, processes: int) -> list["Plan"]:
        """Give each group of tiles of one row to the process that would be done with it first."""
        loads = [0.0] * processes
        dealt: list[set[Tile]] = [set() for _ in range(processes)]
        started: list[set[tuple[int, ...]]] = [set() for _ in range(processes)]
        for group in groups:
            train, cost = group[0].train, sum(map(pace.tile, group))
            row = pace.row(train)
            then = [load + cost + (0 if train in own else row) for load, own in zip(loads, started, strict=True)]
            rank = then.index(min(then))
            loads[rank] = then[rank]
            started[rank].add(train)
            dealt[rank].update(group)
        return [self.restricted_to(tiles) for tiles in dealt]


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
    train_tiles = _split_by_length(train_shapes, train_tile)
    if symmetric:
        rows = tuple((train, tuple(train_tiles[position:])) for position, train in enumerate(train_tiles))
    else:
        x_tiles = tuple(_split_by_length(x_shapes, x_tile))
        rows = tuple((train, x_tiles) for train in train_tiles)
    return Plan(rows, train_tile, train_tile if symmetric else x_tile, len(train_shapes), len(x_shapes), symmetric)


def tiles_per_axis(
    train: int, x: int, processes: int, symmetric: bool, tokens: float, num_logits: int
) -> tuple[int, int]:
    """Return into how many tiles to cut either axis, so that several processes have two each and are soon done.

    Two, since tiles are ordered by length: a long one goes with a short one. Many tiles along X alone would have every
    process take all train examples, many along the train axis every X example.

    Args:
        train: N.
        x: X.
        processes: How many share the plan.
        symmetric: Only one of two mirrored tiles is computed.
        tokens: An example's, on average.
        num_logits: C.
    """
    wanted = 2 * processes
    if processes == 1:
        return 1, 1
    if symmetric:
        side = math.ceil((math.sqrt(1 + 8 * wanted) - 1) / 2)
        return side, side

    def work(rows: int) -> float:
        """What the process with most tiles does, in flops per weight: propagation, forming, contraction."""
        columns = math.ceil(wanted / rows)
        tiles = math.ceil(rows * columns / processes)
        n, m = train / rows, x / columns
        propagated = (1 + num_logits) * tokens * (min(rows, tiles) * n + tiles * m)
        formed = num_logits * tokens * tiles * (n + m)
        return propagated + formed + num_logits**2 * tiles * n * m

    rows = min(range(1, min(train, wanted) + 1), key=work)
    return rows, math.ceil(wanted / rows)


def even_tile_size(size: int, examples: int, parts: int) -> int:
    """Return the tile size, `size` at most, that makes equal tiles, so many or a multiple of it."""
    rounds = max(1, -(-examples // (size * parts)))
    return max(1, -(-examples // (rounds * parts)))


def _split_by_length(shapes: Sequence[Any], size: int) -> list[tuple[int, ...]]:
    # Longest first: what needs most memory fails, if it must, at once.
    order = sorted(range(len(shapes)), key=lambda index: (shapes[index], index), reverse=True)
    return [tuple(order[start : start + size]) for start in range(0, len(order), max(size, 1))]
