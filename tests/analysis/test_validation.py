"""Predictions for subsets against really solving, and the tables and the picture that are made of them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from kernel_folders import SIZES, Folder
from lmntk.analysis.datamodelling import RankCorrelation, half_subsets
from lmntk.analysis.least_squares import LeastSquaresRun, read_least_squares
from lmntk.analysis.saved_run import read_runs
from lmntk.analysis.table_blocks import FORMS
from lmntk.analysis.validation import (
    ADDED,
    CHANCE,
    RESOLVED,
    RETRAINED,
    Trainings,
    Validation,
    added_logits,
    attainable,
    read_logits,
    resolved_logits,
    validate,
)
from lmntk.analysis.validation_tables import CEILING, format_validation
from lmntk.data.tasks import TASKS
from lmntk.errors import FileError, NotFiniteError
from lmntk.report.validation import validation_figure

SUBSETS = half_subsets(np.arange(8) % 2, 12, seed=0)


def read(folder: Folder, **record: object) -> LeastSquaresRun:
    folder.record(kernel_solver="lstsq", **record)
    (run,) = read_runs(folder.path)
    return read_least_squares(run, {})


def trained_in_features(folder: Folder, kept: np.ndarray) -> np.ndarray:
    """Logits [X, C] on test of linear regression on the features themselves, without any kernel."""
    features = {split: values.reshape(-1, values.shape[-1]) for split, values in folder.features.items()}
    rows = np.repeat(kept, folder.logits)
    labels = folder.labels("train")
    targets = labels if folder.logits == 1 else np.eye(folder.logits)[labels].reshape(-1)
    weights = np.linalg.pinv(features["train"][rows]) @ targets[rows]
    return (features["test"] @ weights).reshape(-1, folder.logits)


def validation(tmp_path: Path, seeds: int = 1, logits: int = 1) -> Validation:
    """A validation whose trainings are the regression on features, of further seeds with noise."""
    folder = Folder(tmp_path, logits=logits)
    found = read(folder, kernel_regularization=0.0)
    real = np.array([[trained_in_features(folder, kept)] * seeds for kept in SUBSETS])
    real[:, 1:] += 0.05 * np.random.default_rng(0).normal(size=real[:, 1:].shape)
    trainings = Trainings(SUBSETS, real, "sgd", "1e-2", 100)
    return validate(found, trainings, "test", "a/run", 0)


@pytest.mark.parametrize("logits", [1, 2])
def test_where_training_is_the_kernel_itself_the_score_is_one(tmp_path: Path, logits: int) -> None:
    found = validation(tmp_path, logits=logits)
    kind = found.kinds[RESOLVED]
    assert (kind.of_outputs.score, kind.of_outputs.low, kind.of_outputs.high) == (1, 1, 1)
    assert kind.equal == 1
    np.testing.assert_allclose(found.predicted[RESOLVED], found.real, rtol=0, atol=1e-9)
    assert 0.3 < found.kinds[ADDED].of_outputs.score < 1
    assert found.kinds[CHANCE].of_outputs.low < 0 < found.kinds[CHANCE].of_outputs.high < 0.6


@pytest.mark.parametrize(("logits", "samples"), [(1, 1), (2, 2), (3, 1)])
def test_predictions_for_subsets_are_those_of_really_solving(tmp_path: Path, logits: int, samples: int) -> None:
    folder = Folder(tmp_path, logits=logits, samples=samples)
    f0 = folder.write_untrained_logits()
    regularization, scaling = 0.1, 10
    found = read(folder, kernel_regularization=regularization, adjust_for_init=True, f0_scaling=scaling)
    kernel = {split: folder.kernel(split).reshape(8 * samples * logits, -1) for split in ("train", "test")}
    labels = folder.labels("train")
    one_hot = labels[:, None] if logits == 1 else np.eye(logits)[labels]
    targets = (one_hot - f0["train"] / scaling).reshape(-1)

    def solve(kept: np.ndarray, norm: float | None = None) -> np.ndarray:
        rows = np.repeat(np.tile(kept, samples), logits)
        part = kernel["train"][rows][:, rows]
        ridge = regularization * (np.linalg.norm(part, 2) if norm is None else norm)
        alpha = np.linalg.solve(part + ridge * np.eye(len(part)), targets[rows])
        both = (kernel["test"][rows].T @ alpha).reshape(-1, logits) + f0["test"] / scaling
        return both.reshape(samples, SIZES["test"], logits).mean(axis=0)

    expected = np.array([solve(kept) for kept in SUBSETS])
    np.testing.assert_allclose(resolved_logits(found, SUBSETS, "test"), expected, rtol=0, atol=1e-9)

    norm = float(np.linalg.norm(kernel["train"], 2))
    whole = solve(np.ones(8, dtype=bool), norm)
    lost = np.array([whole - solve(np.arange(8) != left_out, norm) for left_out in range(8)])
    expected = np.array([whole - lost[~kept].sum(axis=0) for kept in SUBSETS])
    np.testing.assert_allclose(added_logits(found, SUBSETS, "test"), expected, rtol=0, atol=1e-9)


def test_a_singular_kernel_has_no_leave_one_out_and_says_why(tmp_path: Path) -> None:
    folder = Folder(tmp_path, logits=1)
    kernel = folder.kernel("train")
    kernel[1], kernel[:, :, 1] = kernel[0], kernel[:, :, 0]
    kernel[1, :, 1], kernel[0, :, 1] = kernel[0, :, 0], kernel[0, :, 0]
    folder.write("train", kernel)
    real = np.random.default_rng(0).normal(size=(12, 1, 10, 1))
    found = validate(read(folder), Trainings(SUBSETS, real, "sgd", "1", 1), "test", "run", 0)
    assert ADDED not in found.kinds and ADDED not in found.predicted
    assert "`kernel_regularization=" in found.remarks[0]


def test_another_seed_of_training_is_compared_one_by_one(tmp_path: Path) -> None:
    found = validation(tmp_path, seeds=3)
    real = found.trainings.logits[..., 0]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = [spearmanr(real[:, a, x], real[:, b, x]).statistic for a, b in pairs for x in range(10)]
    assert found.kinds[RETRAINED].of_outputs.score == pytest.approx(np.mean(expected))
    assert found.kinds[RETRAINED].equal == np.mean([(real[:, a] > 0) == (real[:, b] > 0) for a, b in pairs])


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_a_perfect_prediction_reaches_the_ceiling_and_beats_another_seed(seeds: int) -> None:
    generator = np.random.default_rng(0)
    signal = generator.normal(size=(200, 40))
    trained = signal[:, None] + generator.normal(size=(200, 6, 40))
    reached = RankCorrelation(signal, trained[:, :seeds].mean(axis=1))().mean()
    single = RankCorrelation(trained[:, 0], trained[:, 5])().mean()
    assert reached == pytest.approx(attainable(single, seeds), abs=0.03)
    assert reached > single + 0.15
    assert np.isnan(attainable(-0.1, seeds))


def test_the_ceiling_stands_below_the_seeds_and_dev_says_what_it_chose(tmp_path: Path) -> None:
    folder = Folder(tmp_path, logits=1)
    found = read(folder, kernel_regularization=0.1)
    real = np.random.default_rng(0).normal(size=(12, 1, 1, 1)) + np.random.default_rng(1).normal(size=(12, 2, 6, 1)) / 4
    of_dev = validate(found, Trainings(SUBSETS, real, "sgd", "1e-2", 100, rate_by_dev=True), "dev", "run", 0)
    r = of_dev.kinds[RETRAINED].of_outputs.score
    assert of_dev.ceilings[0] == pytest.approx(np.sqrt(2 * r / (1 + r)))
    lines = format_validation(of_dev, "text").splitlines()
    (seed_row,) = [index for index, line in enumerate(lines) if line.startswith("another seed of the training  ")]
    assert lines[seed_row + 1].startswith(f"{CEILING}  ") and f"{of_dev.ceilings[0]:.3f}" in lines[seed_row + 1]
    assert sum("dev chose the learning rate" in line for line in lines) == 1
    given = validate(found, Trainings(SUBSETS, real, "sgd", "1e-2", 100), "dev", "run", 0)
    assert not given.remarks, "the learning rate was given"
    assert json.loads(format_validation(given, "json"))["ceilings"]["of_outputs"] == given.ceilings[0]


def test_outputs_that_do_not_vary_are_counted(tmp_path: Path) -> None:
    folder = Folder(tmp_path, logits=1)
    real = np.random.default_rng(0).normal(size=(12, 1, 10, 1))
    real[:, :, 3] = 2.0
    found = validate(read(folder), Trainings(SUBSETS, real, "sgd", "1", 1), "test", "run", 0)
    assert np.isnan(found.kinds[RESOLVED].of_outputs.correlations).nonzero()[0].tolist() == [3]
    assert any(remark.startswith("1 of 10 examples") for remark in found.remarks)


@pytest.mark.parametrize("form", FORMS)
def test_every_format_has_the_scores(tmp_path: Path, form: str) -> None:
    found = validation(tmp_path, seeds=2)
    text = format_validation(found, form)
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert [int(row["index"]) for row in rows] == list(range(10))
        correlations = [float(row[f"correlation {ADDED}"]) for row in rows]
        assert np.mean(correlations) == pytest.approx(found.kinds[ADDED].of_outputs.score)
    elif form == "json":
        content = json.loads(text)
        assert content["predictions"][ADDED]["of_outputs"]["score"] == found.kinds[ADDED].of_outputs.score
        np.testing.assert_array_equal(content["outputs"]["trained"], found.real)
        assert content["subsets"][0] == np.flatnonzero(SUBSETS[0]).tolist()
    else:
        for name in (RESOLVED, ADDED, RETRAINED, CHANCE):
            assert f"{found.kinds[name].of_outputs.score:.3f}" in text
        assert "a/run: 12 random subsets of 4 of 8 train examples" in text


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    assert validation_figure(validation(tmp_path)).startswith(b"\x89PNG")


def test_logits_are_read_in_full_and_only_of_the_same_examples(tmp_path: Path) -> None:
    path, task = tmp_path / "test_predictions_sst-2.csv", TASKS["SST-2"]
    path.write_text("index,label,prediction,logit\n0,1,0,-0.12345678\n1,0,1,2\n", encoding="utf-8")
    np.testing.assert_array_equal(read_logits(path, task, np.array([1, 0])), [[-0.12345678], [2]])
    with pytest.raises(FileError):
        read_logits(path, task, np.array([1, 1]))
    path.write_text("index,label,prediction,logit\n0,1,0,nan\n1,0,1,2\n", encoding="utf-8")
    with pytest.raises(NotFiniteError):
        read_logits(path, task, np.array([1, 0]))
    path.write_text("index,label\n0,1\n1,0\n", encoding="utf-8")
    with pytest.raises(FileError):
        read_logits(path, task, np.array([1, 0]))
