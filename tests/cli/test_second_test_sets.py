"""Runs of MNLI, which has two test sets."""

import json
import shutil
from pathlib import Path

import pytest

from command_line import Workplace, read_results, read_tensors, sst2_rows, write_rows
from training_runs import RESULTS, STEPS, files, results

INFERENCE = ("contradiction", "entailment", "neutral")


@pytest.fixture(scope="module")
def inference(place: Workplace) -> list[str]:
    """The flags for tiny MNLI data, its second test set of other size and order."""
    texts = [text for text, _ in sst2_rows(8)]
    for stem, size, start in (
        ("train", 6, 0),
        ("dev_matched", 6, 1),
        ("test_matched", 6, 2),
        ("test_mismatched", 8, 3),
    ):
        rows = [
            ["x"] * 8 + [texts[(i + start) % 8].capitalize() + ".", texts[-i], INFERENCE[(i + start) % 3]]
            for i in range(size)
        ]
        write_rows(place.folder / "MNLI" / f"{stem}.tsv", [["h"] * 11, *rows])
    return ["--task_name", "mnli", "--data_dir", str(place.folder / "MNLI")]


@pytest.mark.parametrize(
    "how", [["--trainer", "kernel"], STEPS, ["--no_train"]], ids=["kernel", "standard", "zero-shot"]
)
def test_mnli_is_tested_on_both_its_test_sets(place: Workplace, inference: list[str], how: list[str]) -> None:
    folder = place.run(*how, *inference, output=f"mnli {len(how)}")
    record = place.last_record()
    for task, own in (("mnli", "mnli"), ("mnli-mm", "mnli-mm")):
        found = read_results(folder / f"test_results_{task}.txt")
        assert {"eval_loss", f"eval_{own}/acc"} <= found.keys()
        assert record[f"{task}_test_eval_{own}/acc"] == found[f"eval_{own}/acc"]
    assert "eval_mnli/acc" in read_results(folder / "eval_results_mnli.txt")
    assert "mnli_dev_eval_mnli/acc" in record
    if how[-1] == "kernel":
        for task, size in (("mnli", 6), ("mnli-mm", 8)):
            kernel, labels = read_tensors(folder / f"test_kernels_{task}.pt")
            assert (kernel.shape, len(labels)) == ((6, 3, size, 3), size)
            described = json.loads((folder / f"test_kernels_{task}.json").read_text(encoding="utf-8"))
            name = "test_matched.tsv" if task == "mnli" else "test_mismatched.tsv"
            assert described["data_files"]["test"] == str(place.folder / "MNLI" / name)


def test_the_second_test_set_has_the_numbers_that_its_own_task_finds(place: Workplace, inference: list[str]) -> None:
    both = place.run("--no_train", *inference, output="mnli both")
    own = place.run("--no_train", *inference, "--task_name", "mnli-mm", output="mnli own")
    name = "test_results_mnli-mm.txt"
    assert read_results(both / name) == read_results(own / name)


def test_a_missing_second_test_set_is_a_warning(place: Workplace, inference: list[str], tmp_path: Path) -> None:
    shutil.copytree(place.folder / "MNLI", tmp_path / "data")
    (tmp_path / "data" / "test_mismatched.tsv").unlink()
    outcome = place.call(place.argv("--no_train", *inference, "--data_dir", str(tmp_path / "data"), output="matched"))
    assert (outcome.status, outcome.err) == (0, "")
    assert (
        f"there is no {tmp_path}/data/test_mismatched.tsv: the second test set, mnli-mm, is left out"
        in outcome.messages
    )
    assert files(place.folder / "matched") == {name.replace("sst-2", "mnli") for name in RESULTS}


def test_the_best_model_of_mnli_is_the_best_on_its_dev_set(place: Workplace, inference: list[str]) -> None:
    flags = (*STEPS, "--evaluate_during_training", "--eval_steps", "1", "--save_total_limit", "9")
    folder = place.run(*flags, *inference, output="best mnli")
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    seen = [entry["eval_mnli/acc"] for entry in state["log_history"] if "eval_mnli/acc" in entry]
    assert len(seen) == 4
    assert results(folder, "mnli")[0]["eval_mnli/acc"] == max(seen)
