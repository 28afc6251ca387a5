"""The model that training keeps, and training that goes on from a checkpoint."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from command_line import Workplace, read_results, sst2_rows, write_rows
from training_runs import MODEL, RESULTS, STEPS, files, results, used_again, weights


@dataclass(frozen=True)
class Watched:
    """A run without dropout that looked at dev after each of six steps: its flags, its folder, and each checkpoint's
    numbers on dev, worked out anew."""

    flags: tuple[str, ...]
    folder: Path
    found: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def watched(place: Workplace, still: Path) -> Watched:
    data = place.folder / "more dev"
    shutil.copytree(place.data, data)
    write_rows(data / "dev.tsv", [("sentence", "label"), *sst2_rows(13, "dev")])
    # A seed with which dev is best in the middle.
    own = ("--data_dir", str(data), "--max_steps", "6", "--seed", "3", "--model_name_or_path", str(still))
    watching = ("--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*STEPS, *own, *watching, output="watched")
    found = {}
    for name in (f"checkpoint-{number}" for number in range(1, 7)):
        flags = ("--no_train", "--no_predict", "--data_dir", str(data), "--model_name_or_path", str(folder / name))
        found[name] = read_results(place.run(*flags, output=f"of {name}") / "eval_results_sst-2.txt")
    return Watched((*STEPS, *own), folder, found)


def test_evaluation_during_training_keeps_the_model_that_is_best_on_dev(place: Workplace, watched: Watched) -> None:
    folder, of_checkpoints = watched.folder, watched.found
    accuracies = {name: found["eval_acc"] for name, found in of_checkpoints.items()}
    best = max(accuracies, key=accuracies.__getitem__)
    others = [accuracy for name, accuracy in accuracies.items() if name != best]
    assert best != "checkpoint-6" and accuracies[best] > max(others), "this tests nothing: choose another seed"
    kept, wanted = weights(folder), weights(folder / best)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    assert results(folder)[0] == pytest.approx(of_checkpoints[best], rel=1e-6)
    used_again(place, folder, "--data_dir", str(place.folder / "more dev"))


def test_save_at_last_keeps_the_last_model(place: Workplace, watched: Watched) -> None:
    watching = ("--evaluate_during_training", "--eval_steps", "2", "--save_at_last")
    folder = place.run(*watched.flags, *watching, output="last")
    assert files(folder) == RESULTS | MODEL
    kept, last = weights(folder), weights(watched.folder / "checkpoint-6")
    assert all(torch.equal(kept[name], last[name]) for name in last)
    assert results(folder)[0] == pytest.approx(watched.found["checkpoint-6"], rel=1e-6)


def test_looking_at_dev_changes_no_training(place: Workplace, watched: Watched) -> None:
    unwatched, last = weights(place.run(*watched.flags, output="unwatched")), weights(watched.folder / "checkpoint-6")
    assert all(torch.equal(unwatched[name], last[name]) for name in last)


def test_eval_steps_say_when_dev_is_looked_at(place: Workplace) -> None:
    flags = ("--evaluate_during_training", "--eval_steps", "2", "--save_total_limit", "9")
    folder = place.run(*STEPS, *flags, output="every second")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if "eval_acc" in entry] == [2, 4]
    without = place.run(*STEPS, "--evaluate_during_training", "--save_total_limit", "9", output="every epoch")
    state = json.loads((without / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in state["log_history"] if "eval_acc" in entry] == [1.0, 2.0]


@pytest.fixture(scope="module")
def at_once(place: Workplace) -> Path:
    """Six steps, with a checkpoint after three."""
    return place.run(*STEPS, "--max_steps", "6", "--save_steps", "3", output="at once")


def test_training_goes_on_from_a_checkpoint_by_its_path_as_if_it_had_not_stopped(
    place: Workplace, at_once: Path
) -> None:
    resumed = ("--max_steps", "6", "--save_steps", "3", "--resume_from_checkpoint", str(at_once / "checkpoint-3"))
    folder = place.run(*STEPS, *resumed, output="by path")
    assert (folder / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()
    assert results(folder) == results(at_once)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6"}


def test_training_goes_on_from_the_last_whole_checkpoint_in_its_own_folder(place: Workplace, at_once: Path) -> None:
    folder = place.folder / "by true"
    shutil.copytree(at_once / "checkpoint-3", folder / "checkpoint-3")
    (folder / "checkpoint-6").mkdir()  # a run that was killed while it saved
    resumed = ("--max_steps", "6", "--save_steps", "3", "--resume_from_checkpoint", "true")
    outcome = place.call(place.argv(*STEPS, *resumed, output="by true"))
    assert (outcome.status, outcome.err) == (0, "")
    assert f"continuing from {folder / 'checkpoint-3'}" in outcome.messages
    assert (folder / "model.safetensors").read_bytes() == (at_once / "model.safetensors").read_bytes()


def test_lora_training_goes_on_as_if_it_had_not_stopped(place: Workplace) -> None:
    flags = (*STEPS, "--apply_lora", "--max_steps", "6", "--save_steps", "3")
    whole = place.run(*flags, output="lora at once")
    part = place.run(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-3"), output="lora resumed")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()
