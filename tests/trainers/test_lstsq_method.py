"""Runs whose least squares leaves the kernel in its file: the same predictions, and what is left out is said."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import Workplace, read_results
from lmntk.solvers import blocked_cholesky, blocked_least_squares
from lmntk.storage import tensor_files
from lmntk.trainers import lstsq_method

RIDGE = ("--kernel_regularization", "0.01")
CG = ("--lstsq_method", "cg", "--cg_tolerance", "1e-13")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and panels, kernels that are mapped, and memory for the direct method of seven rows at most."""
    monkeypatch.setattr(blocked_cholesky, "TILE", 3)
    monkeypatch.setattr(blocked_least_squares, "PANEL_NUMBERS", 20)
    monkeypatch.setattr(tensor_files, "MAPPED_BYTES", 1)
    monkeypatch.setattr(lstsq_method, "ALWAYS_DIRECT_BYTES", 0)
    monkeypatch.setattr(lstsq_method, "free_bytes", lambda device: 5 * 8 * 7**2)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run_sst-2.json").read_text(encoding="utf-8"))


def predictions_of(folder: Path, split: str) -> np.ndarray:
    with (folder / f"{split}_predictions_sst-2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[float(row[name]) for name in row if name.startswith("logit")] for row in rows])


@pytest.fixture(scope="module")
def direct(place: Workplace) -> Path:
    return place.run(*RIDGE, "--lstsq_method", "direct", "--kernel_per_layer", output="direct")


@pytest.mark.parametrize(
    "flags",
    [(), ("--adjust_for_init", "--f0_scaling", "10"), ("--binary_classification",)],
    ids=["several logits", "adjusted", "one logit"],
)
@pytest.mark.parametrize("method", [("--lstsq_method", "cholesky"), CG], ids=["cholesky", "cg"])
def test_a_run_predicts_as_with_the_direct_method(
    place: Workplace, flags: tuple[str, ...], method: tuple[str, ...]
) -> None:
    name = f"{method[1]} {len(flags)}"
    wanted = place.run(*RIDGE, *flags, "--lstsq_method", "direct", output=f"direct {name}")
    found = place.run(*RIDGE, *flags, *method, "--load_kernels", str(wanted), output=name)
    for split in ("dev", "test"):
        np.testing.assert_allclose(predictions_of(found, split), predictions_of(wanted, split), rtol=0, atol=1e-9)
    results, of_direct = (read_results(folder / "test_results_sst-2.txt") for folder in (found, wanted))
    assert results["lstsq_residual"] <= 1e-12 and "rank0" not in results
    assert ("cg_steps" in results) == (method == CG)
    assert "loo_acc" in of_direct and not [key for key in results if key.startswith(("loo", "gcv"))]
    assert not [path for path in found.iterdir() if path.name.startswith(".")]


def test_the_method_is_chosen_by_memory_and_said(place: Workplace, direct: Path) -> None:
    outcome = place.call(place.argv(*RIDGE, "--load_kernels", str(direct), output="large"))
    assert outcome.status == 0
    assert "--lstsq_method direct takes about 0.0 GB of memory for a train kernel of 8 rows" in outcome.messages
    assert "the leave-one-out metrics and gcv are left out: they need the eigenvectors" in outcome.messages
    large = place.folder / "large"
    assert record_of(large)["lstsq_method"] == "cholesky"
    np.testing.assert_allclose(predictions_of(large, "test"), predictions_of(direct, "test"), rtol=0, atol=1e-9)
    # One logit has four rows, for which there is room.
    small = place.call(place.argv(*RIDGE, "--binary_classification", output="small"))
    assert small.status == 0 and "takes about" not in small.messages
    assert record_of(place.folder / "small")["lstsq_method"] == "auto"
    for flags in ((), ("--lstsq_method", "cholesky"), ("--load_kernels", str(direct))):
        dry = place.call(place.argv(*RIDGE, *flags, "--dry_run", output="dry"))
        assert "--lstsq_method cholesky leaves the kernel in its file, and takes 0.0 GB of disk" in dry.messages
    dry = place.call(place.argv(*RIDGE, *CG, "--dry_run", output="dry"))
    assert dry.messages.count("--lstsq_method cg leaves the kernel in its file\n") == 1


def test_small_kernels_are_solved_directly_whatever_memory_is_free(
    place: Workplace, direct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lstsq_method, "free_bytes", lambda device: 0)
    monkeypatch.setattr(lstsq_method, "ALWAYS_DIRECT_BYTES", 5 * 8 * 8**2)
    assert "rank0" in read_results(
        place.run(*RIDGE, "--load_kernels", str(direct), output="8") / "test_results_sst-2.txt"
    )
    monkeypatch.setattr(lstsq_method, "ALWAYS_DIRECT_BYTES", 5 * 8 * 8**2 - 1)
    found = place.run(*RIDGE, "--load_kernels", str(direct), output="less")
    assert "rank0" not in read_results(found / "test_results_sst-2.txt")


def test_what_the_chosen_method_cannot_do_is_said_before_kernels_are_computed(place: Workplace) -> None:
    flags = ("--select_by", "loo", "--kernel_regularization", "0.01,0.1")
    for dry in ((), ("--dry_run",)):
        outcome = place.call(place.argv(*flags, *dry, output="early"))
        assert outcome.status == 2 and "--select_by loo needs the eigenvectors" in outcome.err
        assert not (place.folder / "early").exists()
    warned = "--lstsq_method cholesky needs a positive definite kernel: with --kernel_regularization 0 an example"
    assert warned in place.call(place.argv("--dry_run", output="early")).messages
    assert warned not in place.call(place.argv(*RIDGE, "--dry_run", output="early")).messages


def test_an_asymmetric_kernel_stays_with_the_direct_method(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstsq_method, "free_bytes", lambda device: 0)
    flags = ("--kernel_formula", "asymmetric_signgd", "--binary_classification")
    assert "rank0" in read_results(place.run(*flags, output="asymmetric") / "test_results_sst-2.txt")


def test_candidates_are_chosen_on_dev_and_layers_are_solved_alone(place: Workplace, direct: Path) -> None:
    flags = ("--kernel_regularization", "0.01,0.1", "--kernel_per_layer", "--load_kernels", str(direct))
    found = {
        method: place.run(*flags, "--lstsq_method", method, output=f"chosen {method}")
        for method in ("direct", "cholesky", "cg")
    }
    tables = [(folder / "layer_results_sst-2.csv").read_text(encoding="utf-8") for folder in found.values()]
    assert tables[0] == tables[1] == tables[2]
    numbers = {record_of(folder)["kernel_regularization"] for folder in found.values()}
    assert len(numbers) == 1
    refused = place.call(place.argv(*flags, "--select_by", "loo", output="refused"))
    assert refused.status == 2 and "--select_by loo needs the eigenvectors" in refused.err


def test_what_needs_eigenvectors_is_left_out_and_said(place: Workplace) -> None:
    outcome = place.call(place.argv(*RIDGE, "--kernel_variance", "--kernel_influence", output="left out"))
    assert outcome.status == 0
    assert "the metrics nll and ece are left out: they need the eigenvectors" in outcome.messages
    assert "--kernel_influence: nothing is written: it needs --lstsq_method direct, not cholesky" in outcome.messages
    assert not [path for path in (place.folder / "left out").iterdir() if path.name.startswith("influence")]


def test_a_system_that_cannot_be_solved_leaves_the_kernels(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked_least_squares, "MOST_STEPS", 1)
    outcome = place.call(place.argv(*RIDGE, *CG, output="short"))
    assert outcome.status == 2
    assert "in 1 steps, short of --cg_tolerance 1e-13 with --kernel_regularization 0.01: take a larger" in outcome.err
    assert (place.folder / "short" / "train_kernels_sst-2.pt").exists()
    assert place.call(place.argv(*RIDGE, "--lstsq_method", "direct", output="short")).status == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--cg_tolerance", "1e-6"), "--cg_tolerance 1e-06 is for --lstsq_method cg: add it, or leave this out"),
        ((*CG[:2], "--cg_tolerance", "0"), "--cg_tolerance is 0.0, but it must be from 1e-15 to 0.1"),
        ((*CG, "--kernel_solver", "svr"), "--lstsq_method cg is for --kernel_solver lstsq, not svr"),
        (
            (*CG, "--kernel_formula", "asymmetric_signgd", "--binary_classification"),
            "--lstsq_method cg needs a symmetric kernel: take --lstsq_method direct, or another formula",
        ),
        ((*CG, "--kernel_variance"), "--kernel_variance needs the eigenvectors of the kernel"),
        ((*CG, "--kernel_influence"), "--kernel_influence needs the eigenvectors of the kernel"),
        (
            (*CG, "--select_by", "loo", "--kernel_regularization", "auto"),
            "--select_by loo needs the eigenvectors of the kernel, which --lstsq_method cg does not have",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(place: Workplace, flags: tuple[str, ...], sentence: str) -> None:
    outcome = place.call(place.argv(*flags, output="refused"))
    assert outcome.status == 2
    assert sentence in outcome.err
