"""`lmntk features` from command lines to files and predictions, on a tiny run."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import Workplace, read_kernel, refusal
from lmntk.commands import features as command
from lmntk.storage.feature_files import StoredFeatures, partial_path
from lmntk.trainers.features import FeatureJob

WIDE = ("--width", "64")
"""A width at which all numbers of the tiny model are kept, but for its embeddings of words and positions."""


@pytest.fixture(scope="module")
def run(place: Workplace) -> Path:
    f0 = ("--adjust_for_init", "--f0_scaling", "3")
    return place.run("--kernel_regularization", "0.01", "--kernel_dtype", "float64", *f0, output="run")


def stored(folder: Path, split: str) -> StoredFeatures:
    return StoredFeatures(folder / f"features_{split}_sst-2.safetensors")


def test_features_of_a_run_make_its_kernel_and_solve_to_its_predictions(run: Path, capsys: Any, tmp_path: Path) -> None:
    given = [str(run), *WIDE, "--output_dir", str(tmp_path), "--solve", "--kernel_regularization", "0.01"]
    assert command.main(given) == 0
    said = capsys.readouterr()
    assert "for 14 prompts" in said.err and "relative error" in said.out and "by Cholesky" in said.out
    train, test = (stored(tmp_path, split) for split in ("train", "test"))
    assert train.shape[:2] == (4, 2) and train.labels.tolist() == [0, 1, 0, 1] and train.metadata["width"] == "64"
    found = np.einsum("iad,jbd->iajb", train.rows(0, 4), test.rows(0, 6), dtype=np.float64)
    exact = read_kernel(run, "test").numpy()
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)
    logits = torch.load(run / "test_logits_sst-2.pt", weights_only=True)[0].numpy()
    np.testing.assert_allclose(test.logits, logits, rtol=1e-5)
    with (tmp_path / "feature_predictions_test_sst-2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kernel = np.einsum("iad,jbd->iajb", train.rows(0, 4), train.rows(0, 4), dtype=np.float64).reshape(8, 8)
    kernel += 0.01 * np.linalg.norm(kernel, 2) * np.eye(8)
    alpha = np.linalg.solve(kernel, (np.eye(2)[train.labels] - train.logits / 3).reshape(-1))
    expected = (found.reshape(8, 12).T @ alpha).reshape(6, 2) + test.logits / 3
    np.testing.assert_allclose([[float(row["logit_0"]), float(row["logit_1"])] for row in rows], expected, rtol=1e-6)


def test_flags_of_run_py_give_the_same_features_without_a_kernel_and_a_stopped_command_goes_on(
    place: Workplace, run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_run = place.argv("--kernel_dtype", "float64", "--output_dir", str(tmp_path / "new"))
    monkeypatch.setattr("lmntk.trainers.features.FEATURE_BATCH_BYTES", 1)  # a batch for each prompt
    whole, calls = FeatureJob._features, []

    def stopped(self: FeatureJob, examples: Any, batch: list[int], split: str) -> Any:
        calls.append((split, batch))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, examples, batch, split)

    monkeypatch.setattr(FeatureJob, "_features", stopped)
    given = ["--width", "3", "--dimension", "50", "--check", "0"]
    assert command.main([*given, "--", *of_run]) == 130
    assert partial_path(tmp_path / "new" / "features_train_sst-2.safetensors").is_file()
    assert command.main([*given, "--solve", "--conjugate_gradients", "--", *of_run]) == 0
    assert len(calls) == 4 + 1 + 10, "three prompts were kept"
    assert "by conjugate gradients" in capsys.readouterr().out
    monkeypatch.undo()
    assert command.main([str(run), *given, "--output_dir", str(tmp_path / "run")]) == 0
    for split in ("train", "dev", "test"):
        one, other = stored(tmp_path / "new", split), stored(tmp_path / "run", split)
        assert one.metadata == other.metadata and one.shape[2] == 50
        np.testing.assert_allclose(one.rows(0, 4), other.rows(0, 4), rtol=1e-5, atol=1e-6)
    assert not list((tmp_path / "new").glob("*_kernels_*")) and not list((tmp_path / "new").glob(".*"))


def test_a_model_that_changed_and_kernels_with_signs_are_refused(run: Path, capsys: Any, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = json.loads((run / "run_sst-2.json").read_text(encoding="utf-8"))
    for change, told in (
        ({"only_biases": True}, "grad_dim"),
        ({"kernel_formula": "signgd"}, "take --kernel_formula sgd"),
    ):
        (tmp_path / "run" / "run_sst-2.json").write_text(json.dumps(record | change), encoding="utf-8")
        assert told in refusal(capsys, command.main, [str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("*features*"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "give the folder of a kernel run"),
        (["run", "--", "--trainer", "kernel"], "not both"),
        (["--output_dir", "x", "--", "--trainer", "kernel"], "--output_dir stands among"),
        (["run", "--width", "0"], "--width is 0"),
        (["run", "--kernel_regularization", "0.1"], "is for --solve"),
        (["run", "--solve", "--kernel_regularization", "0"], "above 0"),
        (["nowhere"], "nowhere does not exist"),
    ],
)
def test_a_command_line_that_cannot_be_done_is_answered_with_the_flag(given: list[str], told: str, capsys: Any) -> None:
    assert told in refusal(capsys, command.main, given)
