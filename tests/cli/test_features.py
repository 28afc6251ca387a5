"""`lmntk features` from command lines to files and predictions, on a tiny run."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command_line import Workplace, read_kernel, refusal, snapshot
from lmntk.commands import features as command
from lmntk.storage.feature_files import FeatureWriter, StoredFeatures, partial_path
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
    given = ["--width", "3", "--dimension", "50", "--check", "2"]
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


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_file_that_lacks_part_of_a_batch_gets_the_bytes_of_an_undisturbed_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: int
) -> None:
    """In float32, whose last bits depend on the batch; the write of the test features is cut after some prompts."""
    given = [str(run), "--width", "3", "--check", "2", "--output_dir"]
    assert command.main([*given, str(tmp_path / "whole")]) == 0
    write = FeatureWriter.write

    def cut(self: FeatureWriter, rows: list[int], features: np.ndarray, logits: np.ndarray) -> None:
        write(self, rows[:kept], features[:kept], logits[:kept])
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureWriter, "write", cut)
    assert command.main([*given, str(tmp_path / "cut")]) == 130
    monkeypatch.undo()
    assert command.main([*given, str(tmp_path / "cut")]) == 0
    for split in ("train", "dev", "test"):
        name = f"features_{split}_sst-2.safetensors"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_features_alone_are_not_a_run(place: Workplace, capsys: Any, tmp_path: Path) -> None:
    of_run = place.argv("--output_dir", str(tmp_path))
    assert command.main(["--width", "3", "--check", "2", "--", *of_run]) == 0
    capsys.readouterr()
    assert command.main([str(tmp_path), "--width", "3"]) == 2
    assert capsys.readouterr().err.endswith("holds features without a kernel: repeat the flags of run.py after --\n")


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


def error_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "feature_error_sst-2.json").read_text(encoding="utf-8"))


def test_the_error_is_that_of_the_stored_features_and_is_kept_beside_them(
    run: Path, capsys: Any, tmp_path: Path
) -> None:
    given = [str(run), "--width", "2", "--seed", "5", "--output_dir", str(tmp_path)]
    assert command.main(given) == 0
    kept = error_file(tmp_path)
    assert (kept["width"], kept["seed"], kept["dimension"]) == (2, 5, stored(tmp_path, "train").shape[2])
    assert kept["kernel"] == json.loads(stored(tmp_path, "train").metadata["kernel"])
    train = stored(tmp_path, "train").rows(0, 4).astype(float)
    found, exact = np.einsum("iad,jbd->iajb", train, train), read_kernel(run, "train").numpy()
    error = kept["projection_error"]
    assert (error["examples"], error["draws"]) == ([4, 4], 8)
    assert error["own"] == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-3)
    assert 0 < error["std"] < error["mean"] and error["own"] > 0.01
    assert f"{error['own']:.1%} ± {error['sampling']:.1%}" in capsys.readouterr().out
    assert "--check 1 is too few" in refusal(capsys, command.main, [*given, "--check", "1"])


def test_a_tolerance_chooses_the_smallest_width_whose_error_it_allows(
    place: Workplace, capsys: Any, tmp_path: Path
) -> None:
    def of(tolerance: str) -> list[str]:
        flags = "--kernel_engine", "projected", "--projection_tolerance", tolerance, "--kernel_dtype", "float64"
        return place.argv(*flags, "--output_dir", str(tmp_path))

    errors = {}
    for width in (8, 12, 16, 24):
        assert command.main(["--width", str(width), "--overwrite", "--", *of("9")]) == 0
        error = error_file(tmp_path)["projection_error"]
        errors[width] = max(error["own"], error["mean"] + error["std"])
    tolerance = (errors[12] + min(errors[8], 2 * errors[12])) / 2
    assert errors[12] < tolerance < errors[8]
    assert command.main(["--overwrite", "--", *of(f"{tolerance}")]) == 0
    assert stored(tmp_path, "train").metadata["width"] == "12" and error_file(tmp_path)["width"] == 12
    said = refusal(capsys, command.main, ["--width", "8", "--overwrite", "--", *of(f"{tolerance}")])
    assert "--width 8 is too small for --projection_tolerance" in said
    said = refusal(capsys, command.main, ["--dimension", "9", "--overwrite", "--", *of("0.01")])
    assert "--projection_tolerance 0.01 is not reached" in said and "leave --dimension out" in said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--load_kernels", "run"], "--load_kernels run has no effect on features: it opens no model"),
        (["--kernel_solver", "svc", "--binary_classification"], "--kernel_solver svc has no effect on features"),
        (["--kernel_variance"], "--kernel_variance has no effect on features"),
        (["--kernel_parts", "layer"], "--kernel_parts layer has no effect on features"),
        (["--overwrite_kernels"], "--overwrite_kernels has no effect on features: --overwrite replaces them"),
        (["--kernel_engine", "jvp"], "--kernel_engine jvp has no effect on features"),
        (["--per_device_train_batch_size", "2"], "--per_device_train_batch_size 2 has no effect on features"),
        (["--kernel_memory_gb", "0.00001"], "--kernel_memory_gb: the longest prompt, with its features, takes"),
        (["--kernel_regularization", "0.5"], "--kernel_regularization is for --solve"),
        (["--adjust_for_init"], "--adjust_for_init is for --solve"),
    ],
)
def test_flags_of_run_py_that_features_cannot_follow_are_refused(
    place: Workplace, flags: list[str], told: str, capsys: Any
) -> None:
    output = str(place.folder / "refused")
    assert told in refusal(capsys, command.main, ["--", *place.argv(*flags, "--output_dir", output)])
    assert not (place.folder / "refused").exists()


def test_a_dry_run_on_either_side_of_the_dashes_writes_nothing(place: Workplace, capsys: Any) -> None:
    for own, of_run in ((["--dry_run"], []), ([], ["--dry_run"])):
        given = ["--solve", "--dimension", "1000000", *own, "--", *place.argv(*of_run, output="dry")]
        assert command.main(given) == 0
        said = capsys.readouterr().err
        assert "solving 8 equations" in said and "by Cholesky, about" in said
        assert "--dimension 1000000 is no less than these numbers: all are kept" in said
        assert not (place.folder / "dry").exists()


def test_features_of_another_seed_are_never_replaced_or_joined_unless_asked(
    place: Workplace, capsys: Any, tmp_path: Path
) -> None:
    def of_run(*flags: str) -> list[str]:
        return ["--", *place.argv(*flags, "--output_dir", str(tmp_path))]

    solving = ["--width", "2", "--solve"]
    assert command.main([*solving, *of_run()]) == 0
    before = snapshot(tmp_path)
    assert {"feature_results_sst-2.csv", "feature_predictions_test_sst-2.csv"} < before.keys()
    results = (tmp_path / "feature_results_sst-2.csv").read_text(encoding="utf-8").splitlines()
    assert results[0].endswith(",width,seed,dimension,error") and ",2,0," in results[1] and len(results) == 7
    for flags, told in ((["--seed", "1"], "seed: stored 0, now 1"), (["--dimension", "9"], "layout: stored ")):
        said = refusal(capsys, command.main, [*solving, *flags, *of_run()])
        assert told in said and "pass --overwrite to replace" in said
    assert snapshot(tmp_path) == before
    dev, without_dev = tmp_path / "features_dev_sst-2.safetensors", ["--do_eval", "False"]
    for split in ("train", "test"):
        (tmp_path / f"features_{split}_sst-2.safetensors").unlink()
    said = refusal(capsys, command.main, ["--width", "2", "--seed", "1", *of_run(*without_dev)])
    assert str(dev) in said and "seed: stored 0, now 1" in said
    assert command.main(["--width", "2", *of_run(*without_dev)]) == 0, "dev of the same seed belongs to these"
    assert dev.read_bytes() == before[dev.name][0]
    assert command.main(["--width", "2", "--seed", "1", "--overwrite", *of_run(*without_dev)]) == 0
    assert stored(tmp_path, "train").metadata["seed"] == "1" and not dev.exists()
    assert not list(tmp_path.glob("feature_predictions_*")) and not list(tmp_path.glob("feature_results_*"))
    assert error_file(tmp_path)["seed"] == 1


def test_one_regularization_of_run_py_is_taken_and_leaves_no_table_of_an_earlier_choice(
    place: Workplace, run: Path, capsys: Any, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run"
    assert command.main([str(folder), "--width", "2", "--solve"]) == 0
    assert (folder / "feature_results_sst-2.csv").is_file()
    chosen = ("--kernel_regularization", "0.5", "--do_eval", "False", "--output_dir", str(folder))
    f0 = ("--kernel_dtype", "float64", "--adjust_for_init", "--f0_scaling", "3")
    assert command.main(["--width", "2", "--solve", "--", *place.argv(*f0, *chosen)]) == 0
    assert "kernel_regularization 0.5, by Cholesky" in capsys.readouterr().out
    assert not (folder / "feature_results_sst-2.csv").exists()
    assert not (folder / "feature_predictions_dev_sst-2.csv").exists()
    assert (folder / "feature_predictions_test_sst-2.csv").is_file()


def test_a_regularization_that_is_not_solved_leaves_the_choice_among_the_others(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("lmntk.solvers.feature_ridge.MOST_STEPS", 3)
    given = [str(run), "--width", "2", "--output_dir", str(tmp_path), "--solve", "--conjugate_gradients"]
    assert command.main([*given, "--kernel_regularization", "1e-12,1000"]) == 0
    assert "1e-12 could not be solved" in caplog.text
    with (tmp_path / "feature_results_sst-2.csv").open(encoding="utf-8", newline="") as file:
        assert [row["kernel_regularization"] for row in csv.DictReader(file)] == ["1000"]
    assert "kernel_regularization 1000, by conjugate gradients" in capsys.readouterr().out


def test_a_disk_without_room_is_noticed_before_anything_is_computed(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("lmntk.storage.output_folder.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr(FeatureJob, "error", lambda self: pytest.fail("the disk comes first"))
    said = refusal(capsys, command.main, [str(run), "--output_dir", str(tmp_path / "full")])
    assert "the features take" in said and "0 MB are free" in said
    assert not (tmp_path / "full").exists()


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
