"""The plan of a kernel: its tiles, their order, and which process computes which. Pure arithmetic."""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Tile:
    """A block of the kernel: the indices of some train examples and of some X examples."""

    train: tuple[int, ...]
    x: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """The number of pairs of examples in the tile."""
        return len(self.train) * len(self.x)


class TileRow(NamedTuple):
    """A train tile and the X tiles that are computed with it."""

    train: tuple[int, ...]
    x_tiles: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TileRequest:
    """Largest numbers of examples in a tile that a user asks for; None leaves a size to the engine.

    Attributes:
        row: Train examples, along the kernel's first axis.
        column: X examples, along the other axis.
    """

    row: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class TileSize:
    """Largest numbers of examples in a plan's tiles: `row` train examples and `column` X examples."""

    row: int
    column: int


@dataclass(frozen=True)
class CostModel:
    """How many seconds the tiles of a plan take.

    Attributes:
        row: Seconds of a train tile before its first X tile.
        tile: Seconds of a tile after that.
    """

    row: Callable[[tuple[int, ...]], float]
    tile: Callable[[Tile], float]


@dataclass(frozen=True)
class Plan:
    """The tiles of a kernel.

    Attributes:
        tile_rows: Each train tile with its X tiles, in the order of computation.
        tile_size: The largest numbers of examples in a tile.
        train_size: N, the number of train examples.
        x_size: X, the number of examples on the other axis.
        symmetric: X is the train set and the kernel symmetric: only one of two mirrored tiles is in the plan.
    """

    tile_rows: tuple[TileRow, ...]
    tile_size: TileSize
    train_size: int
    x_size: int
    symmetric: bool

    def __iter__(self) -> Iterator[Tile]:
        """Go through the tiles, train tile by train tile."""
        return (Tile(row.train, x) for row in self.tile_rows for x in row.x_tiles)

    @property
    def pairs(self) -> int:
        """The number of pairs of examples to compute."""
        return sum(tile.pairs for tile in self)

    def restricted_to(self, tiles: Container[Tile]) -> "Plan":
        """Return the plan with some of its tiles only."""
        rows = (TileRow(train, tuple(x for x in xs if Tile(train, x) in tiles)) for train, xs in self.tile_rows)
        return replace(self, tile_rows=tuple(row for row in rows if row.x_tiles))

    def seconds(self, cost: CostModel) -> float:
        """Return how long one process takes for the whole plan."""
        return sum(cost.row(row.train) for row in self.tile_rows) + sum(cost.tile(tile) for tile in self)

    def partition(self, cost: CostModel, processes: int) -> list["Plan"]:
        """Divide the tiles among processes so that the slowest finishes early.

        Tiles are assigned one by one, or all of a train tile together, whichever is better: every process that has
        tiles of a train tile pays for what comes before its first X tile.
        """
        rows = [[Tile(train, x) for x in x_tiles] for train, x_tiles in self.tile_rows if x_tiles]
        single = [[tile] for row in rows for tile in sorted(row, key=cost.tile, reverse=True)]
        whole = sorted(rows, key=lambda row: sum(map(cost.tile, row)), reverse=True)
        candidates = [self._assign(groups, cost, processes) for groups in (single, whole)]
        return min(candidates, key=lambda shares: max(share.seconds(cost) for share in shares))

    def _assign(self, groups: list[list[Tile]], cost: CostModel, processes: int) -> list["Plan"]:
        """Give each group of tiles of one row to the process that would finish it first."""
        loads = [0.0] * processes
        assigned: list[set[Tile]] = [set() for _ in range(processes)]
        started: list[set[tuple[int, ...]]] = [set() for _ in range(processes)]
        for group in groups:
            train, seconds = group[0].train, sum(map(cost.tile, group))
            row = cost.row(train)
            then = [load + seconds + (0 if train in own else row) for load, own in zip(loads, started, strict=True)]
            rank = then.index(min(then))
            loads[rank] = then[rank]
            started[rank].add(train)
            assigned[rank].update(group)
        return [self.restricted_to(tiles) for tiles in assigned]


def make_plan(train_shapes: Sequence[Any], x_shapes: Sequence[Any], size: TileSize, symmetric: bool = False) -> Plan:
    """Lay tiles over a kernel so that examples of similar shape share a tile.

    Args:
        train_shapes: What the train examples are ordered by, such as their numbers of tokens.
        x_shapes: The same for the X examples.
        size: The largest numbers of examples in a tile; a symmetric kernel has `size.row` along both axes.
        symmetric: X is the train set and the kernel symmetric: only one of two mirrored tiles is in the plan.

    Example:
        >>> [(tile.train, tile.x) for tile in make_plan([5, 9, 5], [7, 8], TileSize(2, 1))]
        [((1, 2), (1,)), ((1, 2), (0,)), ((0,), (1,)), ((0,), (0,))]
    """
    train_tiles = _split_by_length(train_shapes, size.row)
    if symmetric:
        size = TileSize(size.row, size.row)
        rows = tuple(TileRow(train, tuple(train_tiles[position:])) for position, train in enumerate(train_tiles))
    else:
        x_tiles = tuple(_split_by_length(x_shapes, size.column))
        rows = tuple(TileRow(train, x_tiles) for train in train_tiles)
    return Plan(rows, size, len(train_shapes), len(x_shapes), symmetric)


def tiles_per_axis(
    train: int, x: int, processes: int, symmetric: bool, tokens: float, num_logits: int
) -> tuple[int, int]:
    """Return into how many tiles to cut either axis, two for each of several processes.

    Tiles are ordered by length, and two of them balance: a long one with a short one. Many tiles along X alone would
    make every process propagate all train examples, many along the train axis all X examples.

    Args:
        train: N, the number of train examples.
        x: X, the number of examples on the other axis.
        processes: The number of processes that share the plan.
        symmetric: Whether only one of two mirrored tiles is computed.
        tokens: Mean number of tokens of an example.
        num_logits: C, the logits of an example.

    Returns:
        The number of train tiles and the number of X tiles.

    Example:
        >>> tiles_per_axis(train=32, x=1000, processes=2, symmetric=False, tokens=29.0, num_logits=2)
        (1, 4)
    """
    wanted = 2 * processes
    if processes == 1:
        return 1, 1
    if symmetric:
        # The triangle of s · (s + 1) / 2 tiles has at least as many as wanted.
        side = math.ceil((math.sqrt(1 + 8 * wanted) - 1) / 2)
        return side, side

    def work(rows: int) -> float:
        """Flops per weight of the process with most tiles: propagation, forming and contraction, each halved."""
        columns = math.ceil(wanted / rows)
        tiles = math.ceil(rows * columns / processes)
        n, m = train / rows, x / columns
        propagated = (1 + num_logits) * tokens * (min(rows, tiles) * n + tiles * m)
        formed = num_logits * tokens * tiles * (n + m)
        return propagated + formed + num_logits**2 * tiles * n * m

    rows = min(range(1, min(train, wanted) + 1), key=work)
    return rows, math.ceil(wanted / rows)


def even_tile_size(limit: int, examples: int, multiple: int) -> int:
    """Return a tile size of at most `limit` that cuts an axis evenly.

    Args:
        limit: The largest tile size.
        examples: The number of examples on the axis.
        multiple: The number of tiles is a multiple of this.

    Example:
        >>> even_tile_size(32, 100, 1)  # four tiles of 25, not three of 32 and one of 4
        25
    """
    rounds = max(1, -(-examples // (limit * multiple)))
    return max(1, -(-examples // (rounds * multiple)))


def _split_by_length(shapes: Sequence[Any], size: int) -> list[tuple[int, ...]]:
    # Longest first: if memory is too small, it shows at once.
    order = sorted(range(len(shapes)), key=lambda index: (shapes[index], index), reverse=True)
    return [tuple(order[start : start + size]) for start in range(0, len(order), max(size, 1))]
