"""Runs that are killed, stopped, or find their files damaged: nothing is lost, nothing is wrong, all is said."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from command_line import ROOT, SIZES, Workplace, read_kernel
from lmntk import stopping, tile_store
from lmntk.errors import UsageError
from lmntk.kernels.engines.factored import FactoredEngine
from lmntk.output_folder import LOCK_NAME, claimed
from lmntk.tile_store import TileStore

# 2 × 3 tiles of the kernel of test, 2 × 2 of dev, 3 (of 4) of train × train.
TILED = ("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2")
TILES = {"train": 3, "dev": 4, "test": 6}
KERNELS = [f"{split}_kernels_sst-2.pt" for split in SIZES]

# Kills the process in the middle of the so-manieth write of a file whose name ends in that.
KILLED_WHILE_WRITING = """
import os, signal, sys
sys.path[:0] = [{src!r}, {root!r}]
import lmntk.results as results
ending, count = sys.argv[1], int(sys.argv[2])
real = results.write_atomically
seen = 0

def write_atomically(path, write, **more):
    global seen
    if str(path).endswith(ending):
        seen += 1
        if seen == count:
            def half(file):
                class Half:
                    def write(self, data):
                        file.write(bytes(data)[: len(bytes(data)) // 2])
                        file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    def flush(self):
                        pass
                write(Half())
            return real(path, half, **more)
    return real(path, write, **more)

results.write_atomically = write_atomically
import lmntk.tile_store
lmntk.tile_store.write_atomically = write_atomically
import run
sys.exit(run.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def undisturbed(place: Workplace) -> dict[str, bytes]:
    """The bytes of the kernels of a run that nothing disturbed."""
    folder = place.run(*TILED, output="undisturbed")
    assert not list(folder.glob("*_tiles_*"))
    return {name: (folder / name).read_bytes() for name in KERNELS}


def count_tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the engine count the tiles that it computes."""
    computed: list[int] = []
    real = FactoredEngine._tile

    def counting(self: FactoredEngine, *args: object) -> torch.Tensor:
        computed.append(1)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(FactoredEngine, "_tile", counting)
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


@pytest.mark.parametrize(
    ("ending", "count", "kept"),
    [(".tile", 2, 1), (".tile", 10, 9), ("test_kernels_sst-2.pt", 1, 13), ("dev_kernels_sst-2.json", 1, 7)],
    ids=["after 1 tile", "in the middle", "while the kernel is written", "while the description is written"],
)
def test_a_run_that_is_killed_while_it_writes_goes_on_to_the_same_bytes(
    place: Workplace,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    count: int,
    kept: int,
) -> None:
    output = f"killed {ending} {count}"
    program = KILLED_WHILE_WRITING.format(src=str(ROOT / "src"), root=str(ROOT))
    command = [sys.executable, "-c", program, ending, str(count), *place.argv(*TILED, output=output)]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = place.folder / output
    assert list(folder.rglob(".*.tmp"))  # what was being written
    computed = count_tiles(monkeypatch)
    place.run(*TILED, output=output)
    assert len(computed) == sum(TILES.values()) - kept
    assert {name: (folder / name).read_bytes() for name in KERNELS} == undisturbed
    assert not list(folder.rglob(".*.tmp")) and not list(folder.glob("*_tiles_*"))
    assert not (folder / LOCK_NAME).exists()


@pytest.mark.parametrize("tiles", [1, 5])
def test_sigterm_ends_a_run_within_a_tile_and_says_what_is_kept_and_how_to_go_on(
    place: Workplace, undisturbed: dict[str, bytes], tiles: int
) -> None:
    output = f"stopped {tiles}"
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, tiles)
        outcome = place.call(place.argv(*TILED, output=output))
    split, kept = ("train", 1) if tiles == 1 else ("dev", 2)
    store = place.folder / output / f"{split}_tiles_sst-2"
    assert (outcome.status, outcome.err) == (
        143,
        f"stopped by SIGTERM: {kept} of {TILES[split]} tiles of the train × {split} kernel are kept in {store}; "
        "the same command goes on from there\n",
    )
    dry = place.call(place.argv(*TILED, "--dry_run", output=output))
    assert len(list(store.glob("*.tile"))) == kept
    assert dry.status == 0
    with pytest.MonkeyPatch.context() as patched:
        computed = count_tiles(patched)
        again = place.call(place.argv(*TILED, output=output))
    assert f"{kept} of {TILES[split]} tiles of a run that was stopped are used" in again.messages
    assert len(computed) == sum(TILES.values()) - tiles
    assert {name: (place.folder / output / name).read_bytes() for name in KERNELS} == undisturbed
    note = json.loads((place.folder / output / f"{split}_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert note["tiles_of_a_stopped_run"] == kept


def test_ctrl_c_before_there_is_anything_says_so_too(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmntk.build.build", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    outcome = place.call(place.argv(output="early"))
    assert (outcome.status, outcome.err) == (
        130,
        "stopped by SIGINT: what was finished is kept; the same command goes on from there\n",
    )


def test_a_stop_that_a_library_turns_into_another_error_is_still_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("cut short") from error

    assert stopping.exit_status(work) == 130
    assert capsys.readouterr().err.startswith("stopped by SIGINT: ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_nobody_asked_for_stays_an_error() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopping.exit_status(work)


def tile_name(store: Path, number: int) -> str:
    """The name of a tile's file, which begins with its plan's key."""
    return next(store.glob(f"*-{number:06d}-0.tile")).name


def interrupted(place: Workplace, output: str, *flags: str, tiles: int = 10) -> Path:
    """A run that was stopped with three tiles of the kernel of test, and all of the others', kept."""
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, tiles)
        assert place.call(place.argv(*TILED, *flags, output=output)).status == 143
    return place.folder / output / "test_tiles_sst-2"


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


def test_a_run_goes_on_with_the_tiles_of_its_first_plan_though_memory_has_changed(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 1)
        place.call(place.argv(output="memory"))
    plan = json.loads((place.folder / "memory/train_tiles_sst-2/plan.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("lmntk.trainers.kernel.free_bytes", lambda device: 2**30)
    folder = place.run(output="memory")
    note = json.loads((folder / "train_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert note["memory_gb"] == plan["memory_gb"] != 0.6


@pytest.mark.parametrize("flags", [[], ["--per_device_eval_batch_size", "4"]], ids=["as before", "other tiles"])
def test_a_flag_left_out_is_another_command(place: Workplace, flags: list[str]) -> None:
    store = interrupted(place, f"left out {flags}", "--kernel_memory_gb", "1")
    outcome = place.call(place.argv(*TILED, *flags, output=store.parent.name))
    assert outcome.status == 2
    assert "--kernel_memory_gb: stored 1.0, now nothing" in outcome.err
    assert len(list(store.glob("*.tile"))) == 3


def test_tiles_of_a_plan_of_more_tiles_disturb_nobody(place: Workplace, undisturbed: dict[str, bytes]) -> None:
    store = interrupted(place, "more tiles", "--overwrite_kernels")
    flags = ("--per_device_eval_batch_size", "6", "--overwrite_kernels", "--disable_tqdm", "False")
    outcome = place.call(place.argv(*TILED, *flags, output="more tiles"))
    assert outcome.status == 0
    assert "train × test: 100%|" in outcome.err
    assert (store.parent / KERNELS[0]).read_bytes() == undisturbed[KERNELS[0]]


def spoil(folder: Path) -> None:
    """Write zeros into the kernels of a folder."""
    for name in KERNELS:
        kernel, labels = torch.load(folder / name, weights_only=True)
        torch.save((kernel * 0, labels), folder / name)


def test_overwriting_goes_on_where_it_was_stopped(
    place: Workplace, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.run(*TILED, output="overwritten")
    spoil(folder)
    interrupted(place, "overwritten", "--overwrite_kernels")
    refused = place.call(place.argv(*TILED, output="overwritten"))
    assert refused.status == 2
    assert f"{folder / KERNELS[2]} was being replaced by a command with --overwrite_kernels" in refused.err
    computed = count_tiles(monkeypatch)
    place.run(*TILED, "--overwrite_kernels", output="overwritten")
    assert len(computed) == 3
    assert {name: (folder / name).read_bytes() for name in KERNELS} == undisturbed
    assert not list(folder.glob("overwriting*"))
    place.run(*TILED, "--overwrite_kernels", output="overwritten")
    assert len(computed) == 3 + sum(TILES.values())


def test_kernels_that_overwriting_has_made_stay_until_their_results_are_written(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.run(*TILED, output="unrecorded")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lmntk.results.append_log", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        assert place.call(place.argv(*TILED, "--overwrite_kernels", output="unrecorded")).status == 143
    (folder / KERNELS[1]).write_bytes(b"damaged")
    computed = count_tiles(monkeypatch)
    place.run(*TILED, "--overwrite_kernels", output="unrecorded")
    assert len(computed) == TILES["dev"]


def test_overwriting_more_splits_than_before_it_was_stopped_overwrites_these_too(
    place: Workplace, undisturbed: dict[str, bytes]
) -> None:
    folder = place.run(*TILED, output="more splits")
    spoil(folder)
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 5)
        place.call(place.argv(*TILED, "--overwrite_kernels", "--no_predict", output="more splits"))
    place.run(*TILED, "--overwrite_kernels", output="more splits")
    assert (folder / KERNELS[2]).read_bytes() == undisturbed[KERNELS[2]]


def test_overwriting_drops_the_tiles_of_another_command(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(place, "dropped")
    place.run("--kernel_formula", "signgd", *TILED, "--overwrite_kernels", output="dropped")
    kernel = read_kernel(place.folder / "dropped", "test")
    assert torch.equal(kernel, kernel.round())


def test_tiles_that_were_left_beside_a_finished_kernel_go(place: Workplace, undisturbed: dict[str, bytes]) -> None:
    folder = place.run(*TILED, output="left")
    (folder / "test_tiles_sst-2").mkdir()
    place.run(*TILED, output="left")
    assert not (folder / "test_tiles_sst-2").exists()


def test_groups_of_parameters_are_kept_one_by_one(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--kernel_engine", "jacobian", "--kernel_memory_gb", "0.0002", *TILED)
    whole = place.run(*flags, output="groups")
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 8)
        outcome = place.call(place.argv(*flags, output="groups stopped"))
    kept, total = (int(word) for word in outcome.err.split(": ")[1].split(" tiles")[0].split(" of "))
    assert kept == 8 > TILES["train"] and total % TILES["train"] == 0
    folder = place.run(*flags, output="groups stopped")
    for name in KERNELS:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


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
    assert f"{name} (No space left on device): make room, or clear the way, and give the same command" in outcome.err
    assert not list((place.folder / output).rglob(".*.tmp"))
    computed = count_tiles(monkeypatch)
    place.run(*TILED, output=output)
    assert len(computed) == sum(TILES.values()) - (2 if "tile" in name else 3)
    assert (place.folder / output / KERNELS[0]).read_bytes() == undisturbed[KERNELS[0]]


def test_a_second_run_on_the_same_folder_says_who_is_there_and_stops(place: Workplace, tmp_path: Path) -> None:
    with claimed(place.folder / "claimed"):
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
    with claimed(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_where_files_cannot_be_locked_a_warning_takes_the_locks_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available): see that no other run writes there" in caplog.messages


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train_kernels_sst-2.json", "{", "train_kernels_sst-2.json cannot be read"),
        ("train_kernels_sst-2.json", "[]", "train_kernels_sst-2.json is no JSON object"),
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
    store = TileStore(tmp_path / "tiles")
    store.use(store.key({"formula": "sgd"}))
    plan = tile_store.Plan((((0,), ((1,),)),), 1, 1, 1, 2, symmetric=False)
    with pytest.raises(UsageError, match="000000-0.tile was written, but is missing or damaged now"):
        list(store.blocks(plan, 1, (1, 1), patience=0.0))
