"""Files that are damaged, full disks, two runs in one folder: a clear sentence or a tile computed again."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from command_line import Workplace
from interrupted_runs import KERNELS, TILED, TILES, count_tiles, interrupted, stop_after, tile_name, undisturbed_kernels
from lmntk.errors import FileError, UsageError
from lmntk.kernels import MemoryBudgetError
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.kernels.tiling import Plan, TileRow, TileSize
from lmntk.storage import tile_store
from lmntk.storage.output_folder import LOCK_NAME, locked_output_folder
from lmntk.storage.run_results import write_metrics
from lmntk.storage.tile_store import TileStore


@pytest.fixture(scope="module")
def undisturbed(place: Workplace) -> dict[str, bytes]:
    return undisturbed_kernels(place)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-8], lambda data: b"", lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:]],
    ids=["cut", "empty", "a bit"],
)
def test_a_damaged_tile_is_computed_again(
    place: Workplace, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, damage, request
) -> None:
    store = interrupted(place, f"damaged {request.node.callspec.id}")
    path = store / tile_name(store, 1)
    path.write_bytes(damage(path.read_bytes()))
    computed = count_tiles(monkeypatch)
    outcome = place.call(place.argv(*TILED, output=store.parent.name))
    assert f"{path} is cut or damaged: computing the tile again" in outcome.messages
    assert (outcome.status, len(computed)) == (0, 4)
    assert (store.parent / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


def test_a_tile_in_another_tiles_place_is_not_used(place: Workplace, undisturbed: dict[str, bytes]) -> None:
    store = interrupted(place, "swapped")
    first, second = store / tile_name(store, 0), store / tile_name(store, 2)
    first.write_bytes(second.read_bytes())
    place.run(*TILED, output="swapped")
    assert (store.parent / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


def test_tiles_that_do_not_fit_any_more_are_named_with_a_way_out(
    place: Workplace, undisturbed: dict[str, bytes]
) -> None:
    """Where numba is missing now, factors may take more memory than the signs for which the tiles were planned."""
    store = interrupted(place, "too large")

    def plan(self: FactoredEngine, *_: object) -> Plan:
        raise MemoryBudgetError(3 * 2**30, 2**30)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FactoredEngine, "plan", plan)
        outcome = place.call(place.argv(*TILED, output="too large"))
    assert (outcome.status, outcome.err) == (
        2,
        f"error: {store} holds tiles of an unfinished kernel that were planned in another environment, such as one "
        "with numba: tiles of their size take 3.00 GB beside the model here, and their plan allows 1.00 GB; go on in "
        "that environment, or remove the folder to compute this kernel anew\n",
    )
    shutil.rmtree(store)
    place.run(*TILED, output="too large")
    assert (store.parent / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


def test_tiles_outlive_a_plan_that_cannot_be_read(
    place: Workplace, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plan depends on memory, which is given here: the same command makes the same one.
    memory = ("--kernel_memory_gb", "1")
    store = interrupted(place, "planless", *memory)
    (store / "plan.json").write_text('{"formula": "sg', encoding="utf-8")
    computed = count_tiles(monkeypatch)
    outcome = place.call(place.argv(*TILED, *memory, output="planless"))
    assert f"{store / 'plan.json'} cannot be read" in outcome.messages
    assert (outcome.status, len(computed)) == (0, 3)
    assert (store.parent / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--kernel_memory_gb", "2"], "--kernel_memory_gb: stored nothing, now 2.0"),
        (["--per_device_eval_batch_size", "3"], "--per_device_eval_batch_size: stored 2, now 3"),
        (["--kernel_engine", "jacobian"], "engine: stored factored, now jacobian"),
    ],
    ids=["memory", "tile", "engine"],
)
def test_tiles_of_another_plan_are_neither_used_nor_lost(
    place: Workplace, undisturbed: dict[str, bytes], flags: list[str], difference: str
) -> None:
    output = f"other plan {flags[0]}"
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 1)
        place.call(place.argv(*TILED, output=output))
    store = place.folder / output / "train_tiles_sst-2"
    outcome = place.call(place.argv(*TILED, *flags, output=output))
    assert (outcome.status, outcome.err) == (
        2,
        f"error: {store} holds tiles of an unfinished kernel that another command was computing ({difference}): give "
        "that command again to finish it, or pass --overwrite_kernels to drop them, or another TAG or --output_dir to "
        "keep both\n",
    )
    assert (store / tile_name(store, 0)).exists()
    place.run(*TILED, output=output)
    assert (store.parent / KERNELS[0]).read_bytes() == undisturbed[KERNELS[0]]


@pytest.mark.parametrize("name", ["-000002-0.tile", "train_kernels_sst-2.json", "train_kernels_sst-2.pt"])
def test_a_full_disk_is_told_and_what_was_finished_is_used_when_there_is_room(
    place: Workplace, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    output = f"full {name}"
    real = Path.open

    class Full:
        def __init__(self, file) -> None:
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            self._file.close()

        def write(self, data) -> int:
            raise OSError(28, "No space left on device")

        def __getattr__(self, name: str):
            return getattr(self._file, name)

    def opened(path: Path, mode: str = "r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if "x" in mode and f"{name}." in path.name else file

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", opened)
        outcome = place.call(place.argv(*TILED, output=output))
    assert outcome.status == 2
    assert f"{name} (No space left on device): make room, or free the path, and give the same command" in outcome.err
    assert not list((place.folder / output).rglob(".*.tmp"))
    computed = count_tiles(monkeypatch)
    place.run(*TILED, output=output)
    assert len(computed) == sum(TILES.values()) - (2 if "tile" in name else 3)
    assert (place.folder / output / KERNELS[0]).read_bytes() == undisturbed[KERNELS[0]]


def test_a_second_run_on_the_same_folder_says_who_is_there_and_stops(place: Workplace, tmp_path: Path) -> None:
    with locked_output_folder(place.folder / "claimed"):
        outcome = place.call(place.argv(output="claimed"))
        assert outcome.status == 2
        folder = place.folder / "claimed"
        assert outcome.err.startswith(f"error: another run (process {os.getpid()} on ")
        assert outcome.err.endswith(
            f") is at work in {folder}: wait for it, or give this one another TAG or --output_dir\n"
        )
        assert place.call(place.argv("--dry_run", output="claimed")).status == 0
        place.run(output="elsewhere")
    place.run(output="claimed")


def test_the_lock_of_a_run_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("process 1 on somewhere\n", encoding="utf-8")
    with locked_output_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_files_cannot_be_locked_a_warning_takes_the_locks_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked_output_folder(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available): make sure no other run writes there" in caplog.messages


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train_kernels_sst-2.json", "{", "train_kernels_sst-2.json cannot be read"),
        ("train_kernels_sst-2.json", "[]", "train_kernels_sst-2.json is not a JSON object"),
        ("test_kernels_sst-2.pt", "PK", "test_kernels_sst-2.pt cannot be read as kernel"),
    ],
)
def test_damaged_kernels_and_descriptions_stop_the_run_and_name_the_way_out(
    place: Workplace, undisturbed: dict[str, bytes], name: str, content: str, sentence: str
) -> None:
    folder = place.folder / "wrecked"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.folder / "undisturbed", folder)
    (folder / name).write_text(content, encoding="utf-8")
    outcome = place.call(place.argv(*TILED, output="wrecked"))
    assert outcome.status == 2
    assert sentence in outcome.err
    assert "--overwrite_kernels" in outcome.err
    place.run(*TILED, "--overwrite_kernels", output="wrecked")
    assert (folder / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


def test_a_folder_in_a_kernels_place_is_told_before_anything_is_computed(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.folder / "folders"
    (folder / KERNELS[0]).mkdir(parents=True)
    computed = count_tiles(monkeypatch)
    outcome = place.call(place.argv(*TILED, "--overwrite_kernels", output="folders"))
    assert (outcome.status, computed) == (2, [])
    assert outcome.err == f"error: {folder / KERNELS[0]} is a folder where a kernel's file belongs: remove it\n"


def test_a_mistake_in_the_data_leaves_no_folder(place: Workplace) -> None:
    assert place.call(place.argv("--data_dir", "nowhere", output="never/made")).status == 2
    assert not (place.folder / "never").exists()


def test_a_kernel_with_one_wrong_bit_is_not_used(place: Workplace, undisturbed: dict[str, bytes]) -> None:
    folder = place.folder / "bit"
    shutil.copytree(place.folder / "undisturbed", folder)
    data = bytearray(undisturbed[KERNELS[2]])
    data[len(data) // 2] ^= 1
    (folder / KERNELS[2]).write_bytes(data)
    outcome = place.call(place.argv(*TILED, output="bit"))
    assert outcome.status == 2
    assert f"{folder / KERNELS[2]} is not the kernel that test_kernels_sst-2.json describes" in outcome.err


def test_a_tile_that_vanishes_while_the_run_is_at_work_is_told(place: Workplace, tmp_path: Path) -> None:
    store = TileStore.open(tmp_path / "tiles", {"formula": "sgd"})
    plan = tile_store.Plan((TileRow((0,), ((1,),)),), TileSize(1, 1), 1, 2, symmetric=False)
    with pytest.raises(UsageError, match="000000-0.tile was written, but is missing or damaged now"):
        list(store.blocks(enumerate(plan), 1, tile_store.TileShape(1, 1, 1), deadline=0.0))


def test_metrics_do_not_make_their_folder_anew(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        write_metrics(tmp_path / "deleted" / "test_results_sst-2.txt", {"eval_acc": 0.5})
    assert not (tmp_path / "deleted").exists()
