"""Runs that are stopped at a tile of their own, for the tests of what comes then."""

import os
import signal
from pathlib import Path

import pytest
import torch

from command_line import SIZES, Workplace
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.storage.tile_store import TileStore

# 2 × 3 tiles of the kernel of test, 2 × 2 of dev, 3 (of 4) of train × train.
TILED = ("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2")
TILES = {"train": 3, "dev": 4, "test": 6}
KERNELS = [f"{split}_kernels_sst-2.pt" for split in SIZES]


def undisturbed_kernels(place: Workplace) -> dict[str, bytes]:
    """The bytes of the kernels of a run that nothing disturbed, in the folder of that name."""
    folder = place.run(*TILED, output="undisturbed")
    assert not list(folder.glob("*_tiles_*"))
    return {name: (folder / name).read_bytes() for name in KERNELS}


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the engine count the tiles that it computes."""
    computed: list[int] = []
    real = FactoredEngine._compute_tile

    def counting(self: FactoredEngine, *args: object) -> torch.Tensor:
        computed.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FactoredEngine, "_compute_tile", counting)
    return computed


def stop_after(monkeypatch: pytest.MonkeyPatch, tiles: int) -> None:
    """Send this process a SIGTERM when so many tiles are written."""
    written: list[int] = []
    real = TileStore.write

    def write(self: TileStore, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        written.append(1)
        if len(written) == tiles:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TileStore, "write", write)


def tile_name(store: Path, number: int) -> str:
    """The name of a tile's file, which begins with its plan's key."""
    return next(store.glob(f"*-{number:06d}-0.tile")).name


def interrupted(place: Workplace, output: str, *flags: str, tiles: int = 10) -> Path:
    """A run that was stopped with three tiles of the kernel of test, and all of the others', kept."""
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, tiles)
        assert place.call(place.argv(*TILED, *flags, output=output)).status == 143
    return place.folder / output / "test_tiles_sst-2"
