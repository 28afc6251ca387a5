"""--kernel_variance: the metrics and tables of runs, recomputed from their files; kernels with and without K(x, x)."""

import csv
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from command_line import Workplace, read_kernel, read_results, write_rows
from lmntk.analysis.calibration import run_calibration
from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
from lmntk.report import plots, write_report
from lmntk.solvers.gaussian_process import GaussianProcess
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.storage import kernel_metadata
from lmntk.storage.paths import RunPaths
from lmntk.trainers.variance import score_variance

VARIANCE = ("--kernel_variance", "--kernel_regularization", "0.01")


@pytest.fixture(scope="module")
def made(place: Workplace) -> Path:
    return place.run(*VARIANCE, "--adjust_for_init", output="variance")


def table_of(folder: Path, split: str = "test") -> list[dict[str, str]]:
    with (folder / f"{split}_variance_sst-2.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_metrics_and_the_table_follow_from_the_files_of_the_run(made: Path) -> None:
    train, test = (read_kernel(made, split).numpy() for split in ("train", "test"))
    f0, labels = torch.load(made / "train_logits_sst-2.pt", weights_only=True)
    f0_of_test, classes = (found.numpy() for found in torch.load(made / "test_logits_sst-2.pt", weights_only=True))
    diagonal = torch.load(made / "test_diagonal_sst-2.pt", weights_only=True).numpy()
    flat, x = train.reshape(8, 8), test.reshape(8, 12)
    noise = 0.01 * np.linalg.norm(flat, 2)
    inverse = np.linalg.inv(flat + noise * np.eye(8))
    y = (np.eye(2)[labels.numpy()] - f0.double().numpy()).reshape(-1)
    scale = y @ inverse @ y / 8
    mean = (x.T @ inverse @ y).reshape(6, 2) + f0_of_test
    left = x.T @ inverse @ x
    covariance = scale * np.stack([diagonal[i] - left[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] for i in range(6)])
    latent = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    positive = norm.cdf((mean[:, 1] - mean[:, 0]) / np.sqrt(latent + 2 * scale * noise))

    rows = table_of(made)
    found = [[float(row[name]) for row in rows] for name in ("probability_1", "margin_std", "margin")]
    np.testing.assert_allclose(found[0], positive, rtol=1e-5)
    np.testing.assert_allclose(found[1], np.sqrt(latent), rtol=1e-5)
    np.testing.assert_allclose(found[2], np.abs(mean[:, 1] - mean[:, 0]), rtol=1e-5)
    results = read_results(made / "test_results_sst-2.txt")
    assert results["eval_nll"] == pytest.approx(-np.log(np.where(classes == 1, positive, 1 - positive)).mean())
    confidence, right = np.maximum(positive, 1 - positive), (positive > 0.5) == (classes == 1)
    edges = np.linspace(0, 1, 16)  # 15 bins, each with its upper edge
    gaps = [
        abs((right[own].astype(float) - confidence[own]).sum())
        for own in ((confidence > low) & (confidence <= high) for low, high in itertools.pairwise(edges))
    ]
    assert results["eval_ece"] == pytest.approx(sum(gaps) / 6, rel=1e-6) and results["eval_ece"] > 0
    assert [row["label"] for row in rows] == [str(number) for number in classes]
    assert (made / "dev_variance_sst-2.csv").is_file() and not (made / "train_variance_sst-2.csv").exists()


def test_the_report_finds_the_numbers_of_the_run_in_its_files(made: Path) -> None:
    """To the last bit but for the digits that result files keep."""
    found = run_calibration(read_least_squares(find_kernel_run(made), {}))
    assert list(found.splits) == ["dev", "test"] and not found.remarks
    for split, one in found.splits.items():
        results = read_results(made / f"{'eval' if split == 'dev' else split}_results_sst-2.txt")
        assert [one.nll, one.ece] == pytest.approx([results["eval_nll"], results["eval_ece"]], rel=1e-12)
        for row, margin, std, sure in zip(table_of(made, split), one.margins, one.margin_std, one.probabilities,
                                          strict=True):  # fmt: skip
            assert [row["margin"], row["margin_std"], row["probability_1"]] == [
                f"{value:.6g}" for value in (margin, std, sure[1])
            ]


def test_the_report_shows_the_reliability_and_true_cosines(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "as_png", lambda *_, **__: bytes(24))  # pictures take most of a report's time
    page = write_report([made], tmp_path / "report", sentences=[0])
    assert (tmp_path / "report" / "sst-2-reliability.png").is_file()
    train, test = (read_kernel(made, split).numpy() for split in ("train", "test"))
    own = torch.load(made / "test_diagonal_sst-2.pt", weights_only=True).numpy()[0]
    weights = np.array([[0.5, -0.5], [-0.5, 0.5]])
    column = np.einsum("ab,iab->i", weights, test[:, :, 0])
    lengths = np.sqrt([(weights * train[i, :, i]).sum() * (weights * own).sum() for i in range(4)])
    assert f"{(column / lengths).max():.2f}" in page.read_text(encoding="utf-8")


def test_with_three_classes_the_table_predicts_by_the_logits_as_the_run_does(tmp_path: Path) -> None:
    """The largest logit is of class 0, whose chance of the largest target is one in three: the others vary far more."""
    kernel, cross = np.eye(9).reshape(3, 3, 3, 3), np.zeros((3, 3, 1, 3))
    logits = np.array([[0.3, 0.29, 0.28]])
    for label in range(3):
        cross[label, label, 0, label] = logits[0, label]
    process = GaussianProcess(RidgeProblem(kernel, np.arange(3)))
    diagonal = np.diag([0.09, 9.0, 1.0])[None]
    score_variance(process, cross, diagonal, logits, np.array([0]), ["a", "b", "c"], tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    sure = [float(row[f"probability_{label}"]) for label in "abc"]
    assert np.argmax(sure) == 1 and sure[0] < 0.4
    assert row["prediction"] == "a" and float(row["margin"]) == pytest.approx(0.01)
    assert float(row["margin_std"]) == pytest.approx(np.sqrt((9 - 0.29**2) / 3), rel=1e-5)


def test_a_kernel_without_a_diagonal_is_used_and_gets_one_when_it_is_needed(place: Workplace, made: Path) -> None:
    folder = place.folder / "without"
    shutil.copytree(made, folder)
    paths = RunPaths(folder, "sst-2")
    truth = torch.load(paths.diagonal("test"), weights_only=True)
    kernel = paths.kernel("test").read_bytes()
    for split in ("dev", "test"):
        paths.diagonal(split).unlink()
        said = kernel_metadata.read_description(paths.kernel(split)) or {}
        said.pop(kernel_metadata.DIAGONAL_HASH_KEY)
        kernel_metadata.write_description(paths.kernel(split), said)
    place.run(output="without")
    assert not list(folder.glob("*_diagonal_*")) and not list(folder.glob("*_variance_*"))
    refused = place.call(place.argv(*VARIANCE, "--load_kernels", str(folder), output="loaded"))
    assert refused.status == 2
    assert f"{paths.diagonal('dev')} does not exist" in refused.err and "--kernel_variance" in refused.err
    dry = place.call(place.argv(*VARIANCE, "--dry_run", output="without"))
    assert "would compute K(x, x) of 6 examples of test, which the kernel lacks" in dry.messages
    # A run that is killed at once after it has written a diagonal leaves it without a hash in the description.
    torch.save(truth + 1, paths.diagonal("test"))
    place.run(*VARIANCE, "--adjust_for_init", output="without")
    found = torch.load(paths.diagonal("test"), weights_only=True)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=0)
    assert paths.kernel("test").read_bytes() == kernel
    for own, other in zip(table_of(folder), table_of(made), strict=True):
        assert float(own["probability_1"]) == pytest.approx(float(other["probability_1"]), rel=1e-4)
    loaded = place.run(*VARIANCE, "--adjust_for_init", "--load_kernels", str(folder), output="loaded")
    assert table_of(loaded) == table_of(folder)


def test_several_prompts_of_an_example_have_no_variance(place: Workplace) -> None:
    templates = place.folder / "templates.txt"
    templates.write_text("*cls**sent_0*_It_was*mask*.*sep+*\n*cls**sent_0*_A*mask*film.*sep+*\n", encoding="utf-8")
    flags = (*VARIANCE, "--template_path", str(templates), "--num_sample", "1")
    outcome = place.call(place.argv(*flags, output="templates"))
    assert outcome.status == 2
    assert "--kernel_variance needs one prompt for each example, and each of train has 2" in outcome.err


def test_a_singular_kernel_predicts_without_a_variance(place: Workplace, tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write_rows(tmp_path / f"{split}.tsv", [("sentence", "label"), *[("funny", "0"), ("funny", "1")] * 2])
    outcome = place.call(place.argv("--kernel_variance", "--data_dir", str(tmp_path), output="singular"))
    assert outcome.status == 0
    assert "the metrics nll and ece are left out: the train kernel is singular with --kernel_reg" in outcome.messages
    results = read_results(place.folder / "singular" / "test_results_sst-2.txt")
    assert "eval_acc" in results and "eval_nll" not in results
