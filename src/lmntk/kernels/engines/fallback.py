"""What the jacobian engine adds to a tile of the factored one, for parameters that no layer type knows."""

from dataclasses import replace

import torch
from torch import Tensor

from lmntk.kernels.engines.jacobian import JacobianEngine
from lmntk.kernels.tiling import Tile, TileRequest, TileRow


def fallback_tile(fallback: JacobianEngine, tile: Tile, with_diagonal: bool) -> tuple[Tensor, Tensor | None]:
    """Return the contribution of the fallback's parameters to a tile, computed in smaller tiles if memory asks.

    Returns:
        Its block and, if wanted, its diagonal.
    """
    plan = fallback.plan(TileRequest(len(tile.train), len(tile.x)))
    trains, xs = _cut(tile.train, plan.tile_size.row), _cut(tile.x, plan.tile_size.column)
    plan = replace(plan, tile_rows=tuple(TileRow(train, xs) for train in trains), symmetric=False)
    with_diagonals = {Tile(trains[0], x) for x in xs} if with_diagonal else set()
    sums: dict[Tile, Tensor] = {}
    diagonals: dict[Tile, Tensor] = {}
    for group in range(fallback.num_parameter_groups(plan)):
        for small, values, diagonal in fallback.tiles_of_group(plan, group, with_diagonals):
            sums[small] = sums[small] + values if small in sums else values
            if diagonal is not None:
                diagonals[small] = diagonals[small] + diagonal if small in diagonals else diagonal
    if len(sums) == 1:
        return sums.popitem()[1], diagonals.popitem()[1] if with_diagonal else None
    block = torch.cat([torch.cat([sums[Tile(train, x)] for x in xs], dim=3) for train in trains], dim=1)
    return block, torch.cat([diagonals[Tile(trains[0], x)] for x in xs], dim=1) if with_diagonal else None


def fallback_diagonal(fallback: JacobianEngine, x: tuple[int, ...]) -> Tensor:
    """Return the contribution of the fallback's parameters to K(x, x), float64 ``[D, x, C, C]``."""
    plan = fallback.plan(TileRequest(1, len(x)))
    groups = range(fallback.num_parameter_groups(plan))
    small = _cut(x, plan.tile_size.column)
    found = [[fallback.diagonal(plan, part, group) for part in small] for group in groups]
    return torch.stack([torch.cat(parts, dim=1) for parts in found]).sum(dim=0)


def _cut(indices: tuple[int, ...], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(indices[start : start + size] for start in range(0, len(indices), size))
