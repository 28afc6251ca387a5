"""docs/reference/kernel-files.md: its Python runs on the files of tiny runs, and its tables are what these leave."""

import contextlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Workplace, flags_of, read_kernel, read_results
from doc_commands import blocks, page_text
from lmntk.data.tasks import find_task
from lmntk.storage.paths import RunPaths
from lmntk.storage.training_snapshots import read_snapshot

PAGE = page_text("kernel-files")
BLOCKS = blocks(PAGE, "python")
RESULT = "result/SST-2-roberta-base-prompt-kernel-{}/16-42"
SGD, ASYMMETRIC = RESULT.format("kernel-prompting"), RESULT.format("kernel-asymmetric")
DRIFT = "result/SST-2-roberta-base-prompt-standard-drift/16-42"


@pytest.fixture(scope="module")
def place(place: Workplace) -> Workplace:
    """A place with the runs whose folders the page names, with the data where a relative path leads."""
    place.run("--kernel_per_layer", "--data_dir", "data", output=SGD)
    place.run(*flags_of("asymmetric_signgd"), output=ASYMMETRIC)
    place.run("--trainer", "standard", "--max_steps", "2", "--kernel_steps", "0,1,last", output=DRIFT)
    return place


@pytest.fixture(scope="module")
def names(place: Workplace) -> dict[str, Any]:
    """What all the page's Python blocks, run one after the other, leave."""
    script = place.folder / "kernel_files.py"
    script.write_text("\n".join(BLOCKS), encoding="utf-8")
    with contextlib.chdir(place.folder):
        return runpy.run_path(str(script))


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its own heading."""
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def predictions(folder: Path, columns: slice) -> np.ndarray:
    """Some columns of the test predictions."""
    return np.loadtxt(folder / "test_predictions_sst-2.csv", delimiter=",", skiprows=1)[:, columns]


def test_least_squares_by_hand_are_the_predictions_of_the_run(place: Workplace, names: dict[str, Any]) -> None:
    folder = place.folder / SGD
    assert names["accuracy"] == read_results(folder / "test_results_sst-2.txt")["eval_acc"]
    # The page's driver of LAPACK is another than the program's: equal but for rounding.
    np.testing.assert_allclose(names["predictions"], predictions(folder, slice(3, None)), rtol=1e-6, atol=1e-8)
    assert names["rank"] == read_results(folder / "test_results_sst-2.txt")["rank0"] == 8


def test_one_logit_of_two_is_the_kernel_and_the_machine_of_binary_classification(
    place: Workplace, names: dict[str, Any]
) -> None:
    folder = place.run("--binary_classification", "--kernel_solver", "svc", output="binary")
    for split in ("train", "test"):
        found, expected = names[split], read_kernel(folder, split)[:, 0, :, 0].numpy()
        assert np.linalg.norm(found - expected) <= 2e-6 * np.linalg.norm(expected), "both are rounded to float32"
    assert names["decisions"].tolist() == predictions(folder, slice(2, 3))[:, 0].tolist()


def test_neighbours_are_the_texts_whose_gradients_point_alike(names: dict[str, Any]) -> None:
    texts, nearest = names["texts"], names["nearest"]
    assert (len(texts["train"]), len(texts["test"]), nearest.shape) == (4, 6, (3, 6))
    for x, text in enumerate(texts["test"]):
        if text in texts["train"]:
            assert texts["train"][nearest[0, x]] == text, "nobody is nearer than one's own copy"
    assert set(texts["train"]) & set(texts["test"])


def test_the_shares_are_those_of_the_table_of_layers(place: Workplace, names: dict[str, Any]) -> None:
    lines = (place.folder / SGD / "layer_results_sst-2.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert {name: f"{share:.4f}" for name, share in names["shares"].items()} == dict(
        line.split(",")[:2] for line in lines
    )
    assert sum(names["shares"].values()) == pytest.approx(1)


def test_what_a_kernel_looks_like_is_what_it_is(place: Workplace, names: dict[str, Any]) -> None:
    look = names["looks_like"]
    signs = read_kernel(place.run("--kernel_formula", "signgd", output="signs"), "test").numpy()
    assert look(names["test_kernel"]) == ("sgd", "2 logits")
    assert look(signs) == ("signgd", "2 logits")
    assert look(read_kernel(place.folder / ASYMMETRIC, "test").numpy()) == ("asymmetric_signgd", "1 logits")


def test_the_table_of_files_has_all_that_a_run_leaves(place: Workplace) -> None:
    told = set()
    for first, _ in rows_of(PAGE, "The files"):
        for name in re.findall(r"`([^`]+)`", first):
            told |= {name.replace("<split>", split).replace("<task>", "sst-2") for split in ("train", "dev", "test")}
    left = {path.name for path in (place.folder / SGD).iterdir()}
    assert left <= told
    # What is predicted is predicted of dev and test; the rest takes other flags.
    slices = {f"{split}_{kind}_kernels_sst-2.pt" for split in ("train", "dev", "test") for kind in ("part", "lora")}
    others = slices | {"solver_selection_sst-2.csv", "step-<T>_sst-2.safetensors"}
    others |= {f"influence_{split}_sst-2.csv" for split in ("train", "dev", "test")}
    others |= {f"feature_predictions_{split}_sst-2.csv" for split in ("train", "dev", "test")}
    others |= {f"features_{split}_sst-2.safetensors" for split in ("train", "dev", "test")}
    others |= {"feature_results_sst-2.csv", "feature_error_sst-2.json"}
    others |= {f"{split}_variance_sst-2.csv" for split in ("train", "dev", "test")}
    assert told - left == {"train_predictions_sst-2.csv", "train_diagonal_sst-2.pt", *others}


def test_cosines_of_the_difference_are_those_of_its_gradients(names: dict[str, Any]) -> None:
    own = [
        (i, x)
        for x, text in enumerate(names["texts"]["test"])
        for i in [*range(4)]
        if names["texts"]["train"][i] == text
    ]
    assert own and [names["cosines"][pair] for pair in own] == pytest.approx([1] * len(own), abs=1e-5)


def test_the_changes_of_a_training_are_those_of_its_kernels(place: Workplace, names: dict[str, Any]) -> None:
    assert list(names["changes"]) == [0, 1, 2]
    for step, change in names["changes"].items():
        kernels = [
            read_snapshot(RunPaths(place.folder / DRIFT, "sst-2").snapshot(number)).kernel for number in (0, step)
        ]
        first, last = kernels
        assert first is not None and last is not None
        assert change == pytest.approx(np.sqrt(((last - first) ** 2).sum() / (first**2).sum()))
    assert names["changes"][0] == 0 < names["changes"][1] < names["changes"][2]


def test_the_table_of_the_description_has_all_its_keys(place: Workplace) -> None:
    told = [key for first, _ in rows_of(PAGE, "Its description") for key in re.findall(r"`([^`]+)`", first)]
    description = json.loads((place.folder / SGD / "test_kernels_sst-2.json").read_text(encoding="utf-8"))
    assert len(told) == len(set(told))
    of_estimates = {"projection_error", "projection_check", "projection_tolerance"}
    assert set(told) - set(description) == {"custom_columns", "labels", "gguf_file", "lora_kernels"} | of_estimates
    assert set(description) <= set(told)


def test_several_templates_multiply_both_sides_and_draws_only_the_other(place: Workplace) -> None:
    template = find_task("sst-2").template
    (place.folder / "two.txt").write_text(f"{template}\n{template.replace('It', 'This')}\n", encoding="utf-8")
    folder = place.run("--template_path", "two.txt", "--top_n_template", "2", output="templates")
    assert read_kernel(folder, "test").shape == (2 * 4, 2, 2 * 6, 2)
    one = read_kernel(place.folder / SGD, "test")
    assert (read_kernel(folder, "test")[:4, :, :6] - one).norm() <= 2e-6 * one.norm(), "the first template comes first"
    folder = place.run("--few_shot_type", "prompt-demo", "--num_sample", "3", output="draws")
    assert read_kernel(folder, "test").shape == (4, 2, 3 * 6, 2)
