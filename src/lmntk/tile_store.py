"""Finished tiles on disk, until the kernel that they make is there: a run that is killed goes on from them.

A tile's file holds a SHA-256 and then the numbers, float64 little-endian. The hash is over the numbers and over what
they are: the plan, the examples on both sides, the part. A file that is cut, damaged, or of another plan does not
match and counts as missing; it can never become a wrong number.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lmntk
from lmntk.errors import UsageError
from lmntk.kernels import Plan
from lmntk.kernels.engines.base import Block
from lmntk.kernels.tiling import Tile
from lmntk.results import kernel_differences, remove_unfinished_files, write_atomically

logger = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size
NUMBERS = np.dtype("<f8")


class TileStore:
    """The finished tiles of one kernel.

    Args:
        folder: Where they are.
        overwrite: Tiles of another plan are dropped, not refused.
    """

    def __init__(self, folder: Path, overwrite: bool = False) -> None:
        self.folder = folder
        self._overwrite = overwrite
        self._key = ""

    def begun(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the plan that an earlier run wrote down here; None where there is none, or it cannot be read.

        Args:
            wanted: What this run asks for: the kernel, and of the plan what its flags say.

        Raises:
            UsageError: The tiles here are another kernel's, or of another plan.
        """
        try:
            stored = json.loads(self._plan_file.read_text(encoding="utf-8"))
            if not isinstance(stored, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); tiles beside it that fit are used", self._plan_file, error)
            return None
        differences = kernel_differences(stored, {**wanted, "lmntk": lmntk.__version__})
        if not differences:
            return stored
        if self._overwrite:
            return None
        raise UsageError(
            f"{self.folder} holds tiles of an unfinished kernel that another command was computing "
            f"({'; '.join(differences)}): give that command again to finish it, or pass --overwrite_kernels to drop "
            "them, or another TAG or --output_dir to keep both"
        )

    def begin(self, plan: Mapping[str, Any]) -> str:
        """Write the plan down, unless it is there; return its key, for `use`.

        Args:
            plan: Everything that the numbers of a tile, or its bounds, depend on; what JSON can hold.
        """
        text = json.dumps({**plan, "lmntk": lmntk.__version__}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        self._make_folder()
        remove_unfinished_files(self.folder)
        if not self._plan_file.exists() or self._plan_file.read_bytes() != text.encode():
            write_atomically(self._plan_file, lambda file: file.write(text.encode()))
        return hashlib.sha256(text.encode()).hexdigest()

    def use(self, key: str) -> None:
        """Read and write tiles of the plan with this key."""
        self._key = key
        self._make_folder()

    def write(self, number: int, part: int, tile: Tile, values: Tensor) -> None:
        """Keep one part of a tile.

        Args:
            number: Which tile of the plan.
            part: Which part of it.
            tile: Its examples.
            values: float64 ``[D, n, C, x, C]``.

        Raises:
            UsageError: The file system refuses.
        """
        numbers = values.cpu().contiguous().numpy().astype(NUMBERS, copy=False).tobytes()
        content = self._digest(part, tile, numbers) + numbers
        # A power cut may take a tile that is not yet on the disk itself: its hash would tell.
        write_atomically(self._file(number, part), lambda file: file.write(content), lasting=False)

    def read(self, number: int, part: int, tile: Tile) -> Tensor | None:
        """Return the numbers of one part of a tile, float64, flat; None where they are missing or damaged."""
        path = self._file(number, part)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}): clear the way, or remove it") from error
        digest, numbers = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if digest != self._digest(part, tile, numbers):
            logger.warning("%s is cut, damaged or of another plan: computing the tile again", path)
            return None
        return torch.from_numpy(np.frombuffer(numbers, NUMBERS).astype(np.float64))

    def sound(self, plan: Plan, parts: int) -> set[tuple[int, int]]:
        """Return which tiles, by number and part, are here and undamaged."""
        names = {path.name for path in self.folder.iterdir()}
        return {
            (number, part)
            for number, tile in enumerate(plan)
            for part in range(parts)
            if self._file(number, part).name in names and self.read(number, part, tile) is not None
        }

    def blocks(self, plan: Plan, parts: int, shape: tuple[int, int], patience: float) -> Iterator[Block]:
        """Read all tiles, part after part in the order of the plan, whoever wrote them and when.

        Args:
            plan: The whole plan.
            parts: How many parts a tile comes in.
            shape: D and C.
            patience: How many seconds, in all, to wait for files that do not show.

        Raises:
            UsageError: One is missing or damaged.
        """
        directions, logits = shape
        deadline = time.monotonic() + patience
        for part in range(parts):
            for number, tile in enumerate(plan):
                path = self._file(number, part)
                while not path.exists() and time.monotonic() < deadline:
                    time.sleep(0.5)
                numbers = self.read(number, part, tile)
                if numbers is None:
                    raise UsageError(
                        f"the tile {path} is not there, though it was written: if several machines share this run, "
                        "--output_dir must be one folder to all; the same command computes what is missing"
                    )
                yield tile, numbers.reshape(directions, len(tile.train), logits, len(tile.x), logits)

    def finished(self) -> list[int]:
        """Return the number of each tile that is here, once for each of its parts, without a look into the files."""
        return [int(path.name.partition("-")[0]) for path in self.folder.glob("[0-9]*-*.tile")]

    def drop(self) -> None:
        """Remove the folder: the kernel is there, or the tiles are not wanted."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _plan_file(self) -> Path:
        return self.folder / "plan.json"

    def _file(self, number: int, part: int) -> Path:
        return self.folder / f"{number:06d}-{part}.tile"

    def _digest(self, part: int, tile: Tile, numbers: bytes) -> bytes:
        what = json.dumps([self._key, part, tile.train, tile.x])
        return hashlib.sha256(what.encode() + numbers).digest()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be made ({error.strerror}): clear the way") from error
