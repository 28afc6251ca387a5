"""Runs that are killed, stopped, or find their files damaged: nothing is lost, nothing is wrong, all is said."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import ROOT, Workplace, read_kernel
from interrupted_runs import KERNELS, TILED, TILES, count_tiles, interrupted, stop_after, undisturbed_kernels
from lmntk import interrupts
from lmntk.experiment import provenance
from lmntk.models import checkpoints
from lmntk.storage.output_folder import LOCK_NAME, locked_output_folder
from lmntk.storage.tile_store import TileStore

# Kills the process in the middle of the so-manieth write of a file whose name ends in that.
KILLED_WHILE_WRITING = """
import contextlib, os, signal, sys
sys.path[:0] = [{src!r}, {root!r}]
from lmntk.storage import atomic, kernel_writer
ending, count = sys.argv[1], int(sys.argv[2])
real = atomic.temporary_file
seen = 0

class Half:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(bytes(data)[: len(bytes(data)) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def __getattr__(self, name):
        return getattr(self.file, name)

@contextlib.contextmanager
def temporary_file(path):
    global seen
    with real(path) as file:
        matches = str(path).endswith(ending)
        seen += matches
        yield Half(file) if matches and seen == count else file

atomic.temporary_file = kernel_writer.temporary_file = temporary_file
import run
sys.exit(run.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def undisturbed(place: Workplace) -> dict[str, bytes]:
    return undisturbed_kernels(place)


@pytest.mark.parametrize(
    ("ending", "count", "kept"),
    [(".tile", 2, 1), (".tile", 10, 9), ("test_kernels_sst-2.pt", 1, 13), ("dev_kernels_sst-2.json", 1, 7)],
    ids=["after 1 tile", "in the middle", "while the kernel is written", "while the description is written"],
)
def test_a_run_that_is_killed_while_it_writes_goes_on_to_the_same_bytes(
    place: Workplace,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    warm_python: str,
    ending: str,
    count: int,
    kept: int,
) -> None:
    output = f"killed {ending} {count}"
    program = place.folder / "killed_while_writing.py"
    program.write_text(KILLED_WHILE_WRITING.format(src=str(ROOT / "src"), root=str(ROOT)), encoding="utf-8")
    command = [warm_python, str(program), ending, str(count), *place.argv(*TILED, output=output)]
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


def test_a_run_clears_what_was_being_saved_when_the_one_before_was_killed(place: Workplace) -> None:
    output = place.folder / "saving"
    ours = [output / ".saving-abcd_123", output / "checkpoint-2" / ".saving-zyxw9876"]
    others = [output / ".saving-abcd_124", output / ".saving-more-than-eight", output / "elsewhere/.saving-abcd_123"]
    for folder in (*ours, *others):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    (others[0] / "notes.txt").touch()
    (output / "checkpoint-2" / f".training_settings.json.{'0' * 32}.tmp").touch()
    with locked_output_folder(output):
        assert not any(folder.exists() for folder in ours)
        assert all((folder / "model.safetensors").exists() for folder in others)
        assert not list((output / "checkpoint-2").iterdir())


@pytest.mark.parametrize("moved", range(6))
def test_a_model_that_was_being_replaced_when_a_run_was_killed_is_the_old_one_none_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    folder, fresh = tmp_path / "model", tmp_path / "fresh"
    for place, text, names in (
        (folder, "old", ("config.json", "model.safetensors", "head.safetensors", "adapter_config.json")),
        (fresh, "new", ("config.json", "model.safetensors", "generation_config.json")),
    ):
        place.mkdir()
        for name in names:
            (place / name).write_text(text)
    steps = []

    def killed(real: Callable[..., object]) -> Callable[..., object]:
        def step(*args: Any, **more: Any) -> object:
            if len(steps) == moved:
                raise KeyboardInterrupt
            steps.append(1)
            return real(*args, **more)

        return step

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, killed(getattr(Path, name)))
    with contextlib.suppress(KeyboardInterrupt):
        checkpoints._put_in_place(fresh, folder, adapters=False)
    weights = folder / "model.safetensors"
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert not weights.exists() or len(set(texts.values())) == 1, texts


def test_results_of_an_earlier_run_are_not_beside_those_of_one_that_was_killed(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place.run(output="two runs")
    monkeypatch.setattr("lmntk.storage.run_results.write_metrics", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert place.call(place.argv("--kernel_solver", "svr", output="two runs")).status == 143
    assert (folder / "dev_predictions_sst-2.csv").exists()
    for name in ("eval_results_sst-2.txt", "test_results_sst-2.txt", "test_predictions_sst-2.csv", "run_sst-2.json"):
        assert not (folder / name).exists(), name


@pytest.mark.parametrize(
    "output", ["x" * 256, "missing/" + "é" * 128, "/".join(["y" * 250] * 16)], ids=["a name", "bytes", "a path"]
)
def test_an_output_folder_with_too_long_a_name_is_refused_before_anything_is_read(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr("lmntk.experiment.build.build", lambda *args: pytest.fail("too late"))
    outcome = place.call([*place.argv(), "--output_dir", output])
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: --output_dir {output}: the names of the files in it")
    assert outcome.err.count("\n") == 1 and "255 bytes a name and 4096 in all" in outcome.err


def test_a_folder_to_read_from_with_too_long_a_name_is_one_sentence(place: Workplace) -> None:
    outcome = place.call(place.argv("--data_dir", "x" * 256))
    assert outcome.status == 2
    assert "File name too long: take a shorter name" in outcome.err and outcome.err.count("\n") == 1


def test_ctrl_c_before_there_is_anything_says_so_too(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmntk.experiment.build.build", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    outcome = place.call(place.argv(output="early"))
    assert (outcome.status, outcome.err) == (
        130,
        "stopped by SIGINT: kernels that were finished are kept; the same command goes on from there\n",
    )


def test_a_stop_that_a_library_turns_into_another_error_is_still_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("cut short") from error

    assert interrupts.exit_status(work) == 130
    assert capsys.readouterr().err.startswith("stopped by SIGINT: ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_nobody_asked_for_stays_an_error() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupts.exit_status(work)


def test_a_run_goes_on_with_the_tiles_of_its_first_plan_though_memory_has_changed(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, 1)
        place.call(place.argv(output="memory"))
    plan = json.loads((place.folder / "memory/train_tiles_sst-2/plan.json").read_text(encoding="utf-8"))
    monkeypatch.setattr("lmntk.kernels.memory.free_bytes", lambda device: 2**30)
    folder = place.run(output="memory")
    note = json.loads((folder / "train_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert note["memory_gb"] == plan["memory_gb"] != 0.6


def test_tiles_of_a_version_that_left_out_what_is_null_are_used(
    place: Workplace, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(provenance, "OFF_BY_DEFAULT", ("from_linearhead", "random_model_init", "lora"))
        store = interrupted(place, "older")
    assert "segments" not in json.loads((store / "plan.json").read_text(encoding="utf-8"))
    for _ in range(2):  # the plan stays as it is, so that a second stop loses nothing either
        with pytest.MonkeyPatch.context() as patched:
            stop_after(patched, 1)
            outcome = place.call(place.argv(*TILED, output="older"))
        assert (outcome.status, "tiles of a run that was stopped are used" in outcome.messages) == (143, True)
    assert len(list(store.glob("*.tile"))) == 5
    computed = count_tiles(monkeypatch)
    place.run(*TILED, output="older")
    assert len(computed) == 1
    assert {name: (store.parent / name).read_bytes() for name in KERNELS} == undisturbed


def test_tiles_that_are_dropped_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "0123456789ab-000000-0.tile").write_bytes(b"")
    TileStore.open(tmp_path, {}).create()
    assert caplog.messages == [f"dropped 1 tile of another plan in {tmp_path}"]
    assert not list(tmp_path.glob("*.tile"))


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
        patched.setattr("lmntk.storage.run_results.append_log", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
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
