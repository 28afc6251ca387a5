"""Snapshots of a training: what is written is read again, and damaged files are named."""

from pathlib import Path

import numpy as np
import pytest

from lmntk.errors import FileError
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import (
    SplitSnapshot,
    TrainingSnapshot,
    find_snapshots,
    read_snapshot,
    write_snapshot,
)


def make_snapshot(step: int) -> TrainingSnapshot:
    rng = np.random.default_rng(step)
    labels = rng.integers(2, size=5)
    # A transposed array is not contiguous: its numbers, not its memory, must be written.
    split = SplitSnapshot(labels, rng.standard_normal((2, 5)).T, rng.standard_normal((5, 2)))
    return TrainingSnapshot(step, {"test": split}, rng.standard_normal((3, 2, 3, 2)), {"learning_rate": 1e-3})


def test_a_snapshot_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = make_snapshot(20)
    read = read_snapshot(write_snapshot(RunPaths(tmp_path, "sst-2"), written))
    assert (read.step, read.description) == (20, {"learning_rate": 1e-3})
    for name in ("labels", "logits", "linearised"):
        found, wanted = getattr(read.splits["test"], name), getattr(written.splits["test"], name)
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(read.kernel, written.kernel)


def test_equal_snapshots_have_equal_bytes(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "mr")
    assert len({write_snapshot(paths, make_snapshot(3)).read_bytes() for _ in range(20)}) == 1


def test_snapshots_of_a_task_are_found_in_the_order_of_steps(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "sst-2")
    written = {step: write_snapshot(paths, make_snapshot(step)) for step in (100, 2, 1_000_000)}
    write_snapshot(RunPaths(tmp_path, "mr_sst-2"), make_snapshot(5))
    assert find_snapshots(paths) == [written[2], written[100], written[1_000_000]]


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_missing_or_damaged_snapshot_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = RunPaths(tmp_path, "mr").snapshot(1)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_snapshot(path)
    assert caught.value.data["path"] == path
