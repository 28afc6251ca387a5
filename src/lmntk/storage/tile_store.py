"""Finished tiles on disk, until the kernel that they make is there: a run that is killed goes on from them.

A tile's file holds a SHA-256 and then the numbers, float64 little-endian. The hash is over the numbers and over what
they are: the plan, the examples on both sides, the part. A file that is cut, damaged, or of another plan does not
match and counts as missing; it can never become a wrong number.
"""

import contextlib
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
from lmntk.kernels.problem import Block
from lmntk.kernels.tiling import Tile
from lmntk.storage.atomic import remove_unfinished_files, write_atomically
from lmntk.storage.kernel_metadata import kernel_differences
from lmntk.storage.readers import read_json

logger = logging.getLogger(__name__)

DIGEST_BYTES = hashlib.sha256().digest_size
KEY_LENGTH = 12
NUMBERS = np.dtype("<f8")
SECONDS_BETWEEN_LOOKS = 0.5


class TileStore:
    """The finished tiles of one kernel.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ""

    def stored_plan(self, wanted: Mapping[str, Any], overwrite: bool = False) -> dict[str, Any] | None:
        """Return the plan that an earlier run wrote down here; None where there is none, or it cannot be read.

        Args:
            wanted: What this run asks for: the kernel, and of the plan what its flags say.
            overwrite: A plan of another kind is as none, and not refused.

        Raises:
            UsageError: The tiles here are another kernel's, or of another plan.
        """
        try:
            stored = read_json(self._plan_file)
            if not isinstance(stored, dict):
                raise ValueError("it is no JSON object")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); tiles beside it that fit are used", self._plan_file, error)
            return None
        differences = kernel_differences(stored, _with_version(wanted))
        if not differences:
            return stored
        if overwrite:
            return None
        raise UsageError(
            f"{self.folder} holds tiles of an unfinished kernel that another command was computing "
            f"({'; '.join(differences)}): give that command again to finish it, or pass --overwrite_kernels to drop "
            "them, or another TAG or --output_dir to keep both"
        )

    def key(self, plan: Mapping[str, Any]) -> str:
        """Return what `use` wants to know of a plan; see `begin`."""
        return hashlib.sha256(self._text_of(plan)).hexdigest()

    def _text_of(self, plan: Mapping[str, Any]) -> bytes:
        """The text of a plan, or of the one written down here, if both mean the same.

        An earlier version of the program leaves out what is null, and its tiles are named after the text.
        """
        now = _with_version(plan)
        try:
            stored = read_json(self._plan_file)
        except (OSError, ValueError):
            return _as_text(now)
        same = isinstance(stored, dict) and not kernel_differences(stored, now) and not kernel_differences(now, stored)
        return _as_text(stored if same else now)

    def use(self, key: str) -> None:
        """Read and write tiles of the plan with this key, on all processes."""
        self._key = key

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Write the plan in use down, unless it is there, and drop the tiles of others.

        Args:
            plan: Everything that the numbers of a tile, or its bounds, depend on; what JSON can hold.

        Raises:
            UsageError: The file system refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be made ({error.strerror}): clear the way") from error
        remove_unfinished_files(self.folder)
        others = set(self.folder.glob("*.tile")) - set(self._files())
        if others:
            logger.warning("tiles of another plan in %s are dropped: %d", self.folder, len(others))
        for path in others:
            with contextlib.suppress(OSError):
                path.unlink()
        text = self._text_of(plan)
        if not self._plan_file.exists() or self._plan_file.read_bytes() != text:
            write_atomically(self._plan_file, lambda file: file.write(text))

    def wait_until_seen(self, patience: float) -> None:
        """Wait until the folder that another process has made shows here.

        Args:
            patience: How many seconds.

        Raises:
            UsageError: It does not.
        """
        deadline = time.monotonic() + patience
        while not self._plan_file.exists():
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{self.folder}, made by the first process, does not show here: the machines that share a run must "
                    "share its --output_dir too"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def write(self, number: int, part: int, tile: Tile, values: Tensor) -> None:
        """Keep one part of a tile.

        Args:
            number: Which tile of the plan.
            part: Which part of it.
            tile: Its examples.
            values: float64 ``[S, n, C, x, C]``.

        Raises:
            UsageError: The file system refuses.
        """
        numbers = values.cpu().contiguous().numpy().astype(NUMBERS, copy=False).reshape(-1).view(np.uint8).data
        digest = self._digest(part, tile, numbers)
        # A power cut may take a tile that is not yet on the disk itself: its hash would tell.
        write_atomically(
            self._file(number, part), lambda file: (file.write(digest), file.write(numbers)), lasting=False
        )

    def read(self, number: int, part: int, tile: Tile) -> Tensor | None:
        """Return the numbers of one part of a tile, float64, flat; None where they are missing or damaged."""
        path = self._file(number, part)
        try:
            content = memoryview(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}): clear the way, or remove it") from error
        numbers = content[DIGEST_BYTES:]
        if content[:DIGEST_BYTES] != self._digest(part, tile, numbers):
            return None
        return torch.from_numpy(np.frombuffer(numbers, NUMBERS).astype(np.float64))

    def undamaged(self, plan: Plan, parts: int) -> set[tuple[int, int]]:
        """Return which tiles, by number and part, are here; say which of them are damaged."""
        there = set(self._files())
        found = set()
        for number, tile in enumerate(plan):
            for part in range(parts):
                path = self._file(number, part)
                if path not in there:
                    continue
                if self.read(number, part, tile) is None:
                    logger.warning("%s is cut or damaged: computing the tile again", path)
                else:
                    found.add((number, part))
        return found

    def blocks(self, plan: Plan, parts: int, shape: tuple[int, int], patience: float) -> Iterator[Block]:
        """Read all tiles, part after part in the order of the plan, whoever wrote them and when.

        Args:
            plan: The whole plan.
            parts: How many parts a tile comes in.
            shape: S and C.
            patience: How many seconds, in all, to wait for files that do not show.

        Raises:
            UsageError: One is missing or damaged.
        """
        slices, logits = shape
        deadline = time.monotonic() + patience
        for part in range(parts):
            for number, tile in enumerate(plan):
                while (numbers := self.read(number, part, tile)) is None:
                    if time.monotonic() > deadline:
                        raise UsageError(
                            f"the tile {self._file(number, part)} was written, but is missing or damaged now: the same "
                            "command computes it again; machines that share a run must share its --output_dir too"
                        )
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                yield tile, numbers.reshape(slices, len(tile.train), logits, len(tile.x), logits)

    def numbers_there(self) -> list[int]:
        """Return the number of each tile that is here, once for each of its parts, without a look into the files."""
        return [int(path.name.split("-")[1]) for path in self._files()]

    def drop(self) -> None:
        """Remove the folder: the kernel is there, or the tiles are not wanted."""
        # The plan last: while it is there the tiles that are left are of use.
        for path in self.folder.glob("*.tile"):
            with contextlib.suppress(OSError):
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def _plan_file(self) -> Path:
        return self.folder / "plan.json"

    def _file(self, number: int, part: int) -> Path:
        return self.folder / f"{self._key[:KEY_LENGTH]}-{number:06d}-{part}.tile"

    def _files(self) -> Iterator[Path]:
        """The tiles of this plan, parts and damaged ones among them."""
        return self.folder.glob(f"{self._key[:KEY_LENGTH]}-*.tile") if self._key else iter(())

    def _digest(self, part: int, tile: Tile, numbers: memoryview) -> bytes:
        digest = hashlib.sha256(json.dumps([self._key, part, tile.train, tile.x]).encode())
        digest.update(numbers)
        return digest.digest()


def _as_text(plan: Mapping[str, Any]) -> bytes:
    return (json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _with_version(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A plan of another version of the program, or of torch, may round, or number its tiles, in another way."""
    return {**plan, "lmntk": lmntk.__version__, "torch": torch.__version__}
