"""lmntk behaviour with real runs of a tiny model: the table holds the numbers of the runs."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Workplace, read_results
from lmntk.commands import behaviour
from lmntk.storage.training_snapshots import read_snapshot

pytestmark = pytest.mark.slow
SEED = "2-13"
SETTINGS = ("--", "--kernel_regularization", "0.1", "--f0_scaling", "1")


@pytest.fixture(scope="module")
def table(place: Workplace) -> Path:
    """The output folder of a call for one task, one seed and one learning rate."""
    shutil.copytree(place.data, place.folder / "splits" / "SST-2" / SEED)
    output = place.folder / "behaviour"
    words = [f"tiny={place.folder / 'splits' / 'SST-2'}", "--model", str(place.model), "--k", "2", "--seeds", "13"]
    training = ["--pairs", "sgd:sgd", "--learning_rates", "sgd=0.5", "--max_steps", "3", "--batch_size", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.folder)
        patch.setenv("NUM_GPU", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        assert behaviour.main([*words, *training, "--output", str(output), *SETTINGS]) == 0
    return output


def row(table: Path) -> dict[str, Any]:
    (found,) = json.loads((table / "behaviour.json").read_text(encoding="utf-8"))["rows"]
    return found


TRAINING, KERNEL, WITH_F0 = "snapshots-sgd-sgd-lr=0.5-steps=3-batch=2", "kernel-sgd", "kernel-sgd-f0"


@pytest.mark.parametrize(("column", "name"), [("kernel", KERNEL), ("kernel_with_f0", WITH_F0), ("finetuned", TRAINING)])
def test_a_score_is_the_metric_that_its_run_has_on_test(table: Path, column: str, name: str) -> None:
    results = read_results(table / "tiny" / name / SEED / "test_results_sst-2.txt")
    assert row(table)["mean"][column] == results["eval_acc"]


def test_the_pretrained_score_is_that_of_the_model_as_it_is(table: Path, place: Workplace) -> None:
    folder = place.run("--trainer", "standard", "--no_train", output="zero-shot")
    assert row(table)["mean"]["pretrained"] == read_results(folder / "test_results_sst-2.txt")["eval_acc"]


def test_the_linearised_score_and_the_distances_are_those_of_the_snapshots(table: Path) -> None:
    first, last = (read_snapshot(table / "tiny" / TRAINING / SEED / f"step-00000{step}_sst-2.safetensors")
                   for step in (0, 3))  # fmt: skip
    test, start, found = last.splits["test"], first.splits["test"], row(table)
    assert found["mean"]["linearised"] == np.mean(test.linearised.argmax(axis=1) == test.labels)
    moved = np.linalg.norm(test.logits - start.logits)
    assert found["mean"]["logits_distance"] == pytest.approx(np.linalg.norm(test.logits - test.linearised) / moved)
    assert first.kernel is not None and last.kernel is not None
    (seed,) = found["seeds"]
    change = np.linalg.norm(last.kernel - first.kernel) / np.linalg.norm(first.kernel)
    assert seed["distances"]["frobenius"] == pytest.approx(change)


def test_every_format_has_the_row(table: Path) -> None:
    for ending in ("txt", "md", "tex"):
        assert "tiny K=2 sgd:sgd" in (table / f"behaviour.{ending}").read_text(encoding="utf-8")
    with (table / "behaviour.csv").open(encoding="utf-8", newline="") as file:
        seed, mean = csv.DictReader(file)
    assert (seed["name"], seed["seed"], mean["seed"]) == ("tiny K=2 sgd:sgd", "13", "mean")
    assert float(mean["kernel"]) == row(table)["mean"]["kernel"]
    assert (table / "behaviour.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_there_give_the_same_row(
    table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Workplace
) -> None:
    monkeypatch.chdir(place.folder)
    folders = [str(table / "tiny" / name) for name in (KERNEL, WITH_F0)]
    output = place.folder / "of what is there"
    words = ["--kernel_runs", *folders, "--fine_tuned_runs", str(table / "tiny" / TRAINING), "--output", str(output)]
    assert behaviour.main(words) == 0
    assert row(output)["name"] == "sst-2 K=2 sgd:sgd"
    assert {**row(output), "name": ""} == {**row(table), "name": ""}


@pytest.mark.parametrize("setting", ["--kernel_runs", "--fine_tuned_runs"])
def test_kernels_without_trainings_and_trainings_without_kernels_are_refused(
    table: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    capsys.readouterr()
    assert behaviour.main([setting, str(table / "tiny" / KERNEL)]) == 2
    other = {"--kernel_runs": "--fine_tuned_runs", "--fine_tuned_runs": "--kernel_runs"}[setting]
    error = capsys.readouterr().err
    assert other in error and error.count("\n") == 1


def test_a_training_without_snapshots_and_model_is_named_beside_the_others(
    table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    training = tmp_path / "training"
    shutil.copytree(table / "tiny" / TRAINING / SEED, training)
    for path in training.glob("step-*"):
        path.unlink()
    flags = ("--kernel_runs", str(table / "tiny" / KERNEL), "--output", str(tmp_path / "out"))
    assert behaviour.main([*flags, "--fine_tuned_runs", str(training)]) == 1
    out = capsys.readouterr().out
    assert str(training) in out and "--kernel_steps 0,last" in out


def test_of_a_saved_model_the_snapshots_are_made_from_the_kernels_that_are_there(
    table: Path, place: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = place.folder / "splits" / "SST-2" / SEED
    training = ("--optimizer", "sgd", "--learning_rate", "0.5", "--max_steps", "3", "--seed", "13")
    size = ("--per_device_train_batch_size", "2")
    saved = place.run("--trainer", "standard", "--data_dir", str(data), *training, *size, output="saved")
    monkeypatch.chdir(place.folder)
    monkeypatch.setenv("NUM_GPU", "0")
    output = place.folder / "of a saved model"
    kernel = table / "tiny" / KERNEL / SEED
    words = ["--kernel_runs", str(kernel), "--fine_tuned_runs", str(saved), "--output", str(output)]
    assert behaviour.main(words) == 0
    found, wanted = row(output), row(table)
    for name in ("pretrained", "kernel", "linearised", "finetuned", "logits_distance", "equal_predictions", "chi"):
        assert found["mean"][name] == pytest.approx(wanted["mean"][name], rel=1e-5), name
    (mine,), (theirs,) = found["seeds"], wanted["seeds"]
    assert mine["distances"]["frobenius"] == pytest.approx(theirs["distances"]["frobenius"], rel=1e-3)
    made = output / "sst-2-K=2-sgd-sgd" / SEED
    assert (made / "test_kernels_sst-2.pt").samefile(kernel / "test_kernels_sst-2.pt"), "it is not computed again"
    capsys.readouterr()
    assert behaviour.main(words) == 0
    assert "0 runs of snapshots to do" in capsys.readouterr().out
