"""Finished tiles on disk, kept until their kernel is written: a run that was killed continues from them.

A tile's file holds a SHA-256 and the numbers, float64 little-endian. The hash covers the numbers and what they are: the
plan, the examples on both sides, the parameter group. A file that is cut, damaged or of another plan does not match its
hash and counts as missing; it can never become a wrong number.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lmntk
from lmntk.errors import FileError, KernelMismatchError
from lmntk.kernels import Plan
from lmntk.kernels.problem import Block
from lmntk.kernels.tiling import Tile
from lmntk.storage.atomic import remove_unfinished_files, write_atomically
from lmntk.storage.kernel_metadata import kernel_differences
from lmntk.storage.readers import read_json
from lmntk.storage.wording import quantity

logger = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size
KEY_LENGTH = 12
NUMBERS = np.dtype("<f8")
SECONDS_BETWEEN_LOOKS = 0.5


def read_stored_plan(
    folder: Path, wanted: Mapping[str, Any], overwrite: bool = False, left_out: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Return the plan that an unfinished run left in a folder of tiles; None if there is none that can be read.

    Args:
        folder: The folder of the tiles.
        wanted: What defines the kernel now wanted, and the settings of its plan.
        overwrite: Return None for another kernel's plan, too.
        left_out: Keys that `wanted` lacks where they do not apply: a plan that has one then is another's.

    Raises:
        KernelMismatchError: The tiles belong to another kernel or to a plan of other settings.
    """
    path = _plan_file(folder)
    try:
        stored = read_json(path)
        if not isinstance(stored, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read (%s); the tiles beside it that match are used", path, error)
        return None
    differences = kernel_differences(stored, {**dict.fromkeys(left_out), **_with_version(wanted)})
    if not differences:
        return stored
    if overwrite:
        return None
    raise KernelMismatchError(
        f"{folder} holds tiles of an unfinished kernel that another command was computing ({'; '.join(differences)}): "
        "give that command again to finish it, or pass `overwrite_kernels=True` to drop them, or another TAG or "
        "`output_dir` to keep both",
        path=folder,
        differences=differences,
    )


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the plan in a folder of tiles, whatever kernel it is of; empty if there is none that can be read."""
    try:
        stored = read_json(_plan_file(folder))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def drop_tiles(folder: Path) -> None:
    """Remove a folder of tiles: their kernel is written, or they are not wanted."""
    # The plan goes last: as long as it is there, the remaining tiles can be used.
    for path in folder.glob("*.tile"):
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class TileShape:
    """Which numbers the file of a tile holds: its block and, with some tiles, the diagonal of its X examples.

    Attributes:
        slices: S, the slices of a block.
        directions: D, those of a diagonal.
        logits: C.
        with_diagonal: The tiles that have a diagonal too.
    """

    slices: int
    directions: int
    logits: int
    with_diagonal: Container[Tile] = frozenset()

    def count(self, tile: Tile) -> int:
        """Return how many numbers a tile's file holds; a file of a version without diagonals may hold fewer."""
        diagonal = self.directions * len(tile.x) if tile in self.with_diagonal else 0
        return (self.slices * tile.pairs + diagonal) * self.logits**2

    def block(self, numbers: Tensor, tile: Tile) -> Tensor:
        """Return the block in a tile's numbers, ``[S, n, C, x, C]``."""
        n, x, c = len(tile.train), len(tile.x), self.logits
        return numbers[: self.slices * n * x * c**2].reshape(self.slices, n, c, x, c)

    def diagonal(self, numbers: Tensor, tile: Tile) -> Tensor:
        """Return the diagonal after the block, ``[D, x, C, C]``, of a tile that has one."""
        c = self.logits
        return numbers[self.slices * tile.pairs * c**2 :].reshape(self.directions, len(tile.x), c, c)


@dataclass(frozen=True)
class TileStore:
    """The finished tiles of one plan in a folder.

    `open` makes a store without writing anything, so that a dry run can count the tiles that exist. All processes of a
    run must use the store that the first one has opened. To compute a kernel, the first process calls `create`, the
    others `wait_until_created`; `verified_tiles` lists what need not be computed; each process `write`s its tiles;
    `blocks` reads all of them, and `drop_tiles` removes the folder once the kernel is written.

    Attributes:
        folder: The folder of the tiles.
        plan_text: The plan as plan.json holds it; its hash names the tiles.
    """

    folder: Path
    plan_text: bytes

    @classmethod
    def open(cls, folder: Path, plan: Mapping[str, Any]) -> "TileStore":
        """Return the store of a plan.

        Args:
            folder: The folder of the tiles, which may be missing.
            plan: Everything that a tile's numbers and bounds depend on, as JSON can hold it.
        """
        now = _with_version(plan)
        try:
            stored = read_json(_plan_file(folder))
        except (OSError, ValueError):
            return cls(folder, _as_text(now))
        # An earlier version of the program leaves out what is null, and its tiles are named after that text.
        same = isinstance(stored, dict) and not kernel_differences(stored, now) and not kernel_differences(now, stored)
        return cls(folder, _as_text(stored if same else now))

    @property
    def key(self) -> str:
        """The hash of the plan."""
        return hashlib.sha256(self.plan_text).hexdigest()

    def create(self) -> None:
        """Make the folder, write the plan, and drop the tiles of other plans.

        Raises:
            FileError: The file system refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"{self.folder} cannot be made ({error.strerror}): free the path", path=self.folder
            ) from error
        remove_unfinished_files(self.folder)
        others = set(self.folder.glob("*.tile")) - set(self._files())
        if others:
            logger.warning("dropped %s of another plan in %s", quantity(len(others), "tile"), self.folder)
        for path in others:
            with contextlib.suppress(OSError):
                path.unlink()
        plan_file = _plan_file(self.folder)
        if not plan_file.exists() or plan_file.read_bytes() != self.plan_text:
            write_atomically(plan_file, lambda file: file.write(self.plan_text))

    def wait_until_created(self, patience: float) -> None:
        """Wait until the folder that the first process has made is visible to this one.

        Args:
            patience: How many seconds to wait at most.

        Raises:
            FileError: The folder is still missing.
        """
        deadline = time.monotonic() + patience
        while not _plan_file(self.folder).exists():
            if time.monotonic() > deadline:
                raise FileError(
                    f"{self.folder}, made by the first process, is missing here: the machines that share a run must "
                    "share its `output_dir` too",
                    path=self.folder,
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def write(self, number: int, group: int, tile: Tile, block: Tensor, diagonal: Tensor | None = None) -> None:
        """Write one tile of one parameter group.

        Args:
            number: The tile's place in the plan.
            group: The number of the parameter group.
            tile: The tile's examples.
            block: float64 ``[S, n, C, x, C]``.
            diagonal: float64 ``[D, x, C, C]`` of a tile that has one.

        Raises:
            FileError: The file system refuses.
        """
        numbers = [_bytes_of(values) for values in (block, diagonal) if values is not None]
        digest = self._digest(group, tile, *numbers)
        # Not durable: the hash reveals a tile that a power cut has damaged.
        path = self._file(number, group)
        write_atomically(path, lambda file: (file.write(digest), [file.write(part) for part in numbers]), durable=False)

    def read(self, number: int, group: int, tile: Tile) -> Tensor | None:
        """Return what `write` wrote as a flat float64 tensor; None if it is missing or damaged."""
        path = self._file(number, group)
        try:
            content = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FileError(f"{path} cannot be read ({error.strerror}): remove it", path=path) from error
        numbers = content[DIGEST_BYTES:]
        if content[:DIGEST_BYTES] != self._digest(group, tile, numbers):
            return None
        return torch.from_numpy(np.frombuffer(numbers, NUMBERS).astype(np.float64))

    def verified_tiles(self, plan: Plan, groups: int, shape: TileShape) -> set[tuple[int, int]]:
        """Return the numbers and groups of the undamaged and complete tiles; warn about the others.

        Args:
            plan: The whole plan.
            groups: The number of parameter groups.
            shape: What a tile's file holds.
        """
        existing = set(self._files())
        found = set()
        for number, tile in enumerate(plan):
            for group in range(groups):
                path = self._file(number, group)
                if path not in existing:
                    continue
                numbers = self.read(number, group, tile)
                if numbers is None:
                    logger.warning("%s is cut or damaged: computing the tile again", path)
                elif len(numbers) != shape.count(tile):
                    logger.warning("%s comes from a version that kept no K(x, x): computing the tile again", path)
                else:
                    found.add((number, group))
        return found

    def blocks(
        self,
        tiles: Iterable[tuple[int, Tile]],
        groups: int,
        shape: TileShape,
        deadline: float,
        diagonal: Tensor | None = None,
    ) -> Iterator[Block]:
        """Read some tiles, group by group in their order.

        Args:
            tiles: The tiles with their numbers in the plan.
            groups: The number of parameter groups.
            shape: What a tile's file holds.
            deadline: Until when, by `time.monotonic`, to wait for files that other machines have written.
            diagonal: ``[D, X, C, C]``, to which the diagonals of the tiles are added; None if they are not wanted.

        Raises:
            FileError: A tile is missing or damaged.
        """
        tiles = list(tiles)
        for group in range(groups):
            for number, tile in tiles:
                while (numbers := self.read(number, group, tile)) is None:
                    if time.monotonic() > deadline:
                        path = self._file(number, group)
                        raise FileError(
                            f"the tile {path} was written, but is missing or damaged now: the same command computes it "
                            "again; machines that share a run must share its `output_dir` too",
                            path=path,
                        )
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                if diagonal is not None and tile in shape.with_diagonal:
                    diagonal[:, torch.tensor(tile.x)] += shape.diagonal(numbers, tile)
                yield tile, shape.block(numbers, tile)

    def finished_tiles(self) -> list[int]:
        """Return the number of each tile that exists, once for each group, without reading the files."""
        return [int(path.name.split("-")[1]) for path in self._files()]

    def complete_tiles(self, plan: Plan, shape: TileShape) -> list[int]:
        """Return those of `finished_tiles` whose files are as long as what they are to hold, without reading them."""
        sizes = [DIGEST_BYTES + NUMBERS.itemsize * shape.count(tile) for tile in plan]
        numbers = ((int(path.name.split("-")[1]), path.stat().st_size) for path in self._files())
        return [number for number, size in numbers if size == sizes[number]]

    def _file(self, number: int, group: int) -> Path:
        return self.folder / f"{self.key[:KEY_LENGTH]}-{number:06d}-{group}.tile"

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"{self.key[:KEY_LENGTH]}-*.tile")

    def _digest(self, group: int, tile: Tile, *numbers: memoryview) -> bytes:
        digest = hashlib.sha256(json.dumps([self.key, group, tile.train, tile.x]).encode())
        for part in numbers:
            digest.update(part)
        return digest.digest()


def _bytes_of(values: Tensor) -> memoryview:
    """Return the numbers of a tensor as a tile's file holds them, without a copy if they lie there like that."""
    return values.cpu().contiguous().numpy().astype(NUMBERS, copy=False).reshape(-1).view(np.uint8).data


def _plan_file(folder: Path) -> Path:
    return folder / "plan.json"


def _as_text(plan: Mapping[str, Any]) -> bytes:
    return (json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _with_version(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Another version of the program, or of torch, may round or number tiles differently."""
    return {**plan, "lmntk": lmntk.__version__, "torch": torch.__version__}
