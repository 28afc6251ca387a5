"""`lstsq` with kernels that stay in their files: Cholesky and conjugate gradients against the direct method."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmntk.errors import FileError, SettingError, SolverError
from lmntk.solvers import blocked_cholesky, blocked_least_squares, fit
from lmntk.solvers.blocked import METHODS, Blocked
from lmntk.solvers.blocked_cholesky import BlockedCholesky
from lmntk.solvers.blocked_least_squares import PanelMatrix
from lmntk.solvers.conjugate_gradients import conjugate_gradients
from lmntk.solvers.problem import SolverSettings
from lmntk.solvers.selection import Examples, select_on_dev

BLOCKED = [method for method in METHODS if method != "direct"]
LABELS = np.arange(30) % 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and panels, the last ones smaller."""
    monkeypatch.setattr(blocked_cholesky, "TILE", 17)
    monkeypatch.setattr(blocked_least_squares, "PANEL_NUMBERS", 1000)
    monkeypatch.setattr(blocked_least_squares, "SMALL", 10)


def kernels(logits: int = 3, train: int = 30, x: int = 8, rank: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of random features, whose eigenvalues decay."""
    features = np.random.default_rng(0).standard_normal((train + x, logits, rank)) * np.linspace(0.02, 1, rank) ** 2
    whole = np.einsum("iad,jbd->iajb", features, features)
    whole = (whole + whole.transpose(2, 3, 0, 1)) / 2
    return whole[:train, :, :train], whole[:train, :, train:]


def settings(folder: Path, method: str, regularization: float = 0.01, **more: Any) -> SolverSettings:
    return SolverSettings(regularization=regularization, blocked=Blocked(method, folder, tolerance=1e-13, **more))


@pytest.mark.parametrize("method", BLOCKED)
@pytest.mark.parametrize("adjusted", [False, True], ids=["plain", "adjusted"])
@pytest.mark.parametrize("logits", [1, 3])
def test_predictions_are_those_of_the_direct_method(tmp_path: Path, method: str, logits: int, adjusted: bool) -> None:
    train, x = kernels(logits)
    labels, of_x = (2 * (LABELS[:n] == 1) - 1.0 if logits == 1 else LABELS[:n] for n in (30, 8))
    f0 = [np.random.default_rng(n).standard_normal((n, logits)) for n in (30, 8)] if adjusted else [None, None]
    found = []
    for chosen in (settings(tmp_path, method), SolverSettings(regularization=0.01)):
        fitted = fit("lstsq", train, labels, replace(chosen, f0_scaling=3.0), f0[0])
        found.append(fitted.predict(x, of_x, f0[1]))
    np.testing.assert_allclose(found[0].logits, found[1].logits, rtol=0, atol=1e-10)
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-10)
    assert found[0].metrics.keys() == {"lstsq_residual"} | ({"cg_steps"} if method == "cg" else set())
    assert found[0].metrics["lstsq_residual"] < 1e-11
    assert found[1].metrics == {"rank0": 30 * logits}
    assert not list(tmp_path.iterdir()), "the scratch file has no name"


def test_a_positive_definite_kernel_needs_no_regularization(tmp_path: Path) -> None:
    train, x = kernels()
    direct = fit("lstsq", train, LABELS, SolverSettings()).predict(x, LABELS[:8])
    for method in BLOCKED:
        found = fit("lstsq", train, LABELS, settings(tmp_path, method, 0.0)).predict(x, LABELS[:8])
        np.testing.assert_allclose(found.logits, direct.logits, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", BLOCKED)
def test_a_kernel_that_is_not_positive_definite_is_refused_with_the_way_out(tmp_path: Path, method: str) -> None:
    train, _ = kernels()
    train = train - 0.5 * np.eye(90).reshape(train.shape) * np.linalg.norm(train.reshape(90, 90), 2)
    with pytest.raises(SolverError, match="not positive definite with `kernel_regularization=0.01`") as caught:
        fit("lstsq", train, LABELS, settings(tmp_path, method))
    assert "take a larger one, such as `kernel_regularization=0.1`, or `lstsq_method=direct`" in str(caught.value)
    assert caught.value.data == {"solver": "lstsq", "regularization": 0.01}


def twice(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train and other kernels of one logit, and labels, in an order by chance: two texts are there twice.

    One of them has both labels, which no α fits without λ.
    """
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((24, 200)) * np.linspace(0.02, 1, 200) ** 2
    features[14], features[15] = features[0], features[1]
    labels = np.where(np.arange(16) % 3 == 0, 1.0, -1.0)
    labels[14], labels[15] = -labels[0], labels[1]
    order = rng.permutation(16)
    train, x = features[order], features[16:]
    return (train @ train.T).reshape(16, 1, 16, 1), (train @ x.T).reshape(16, 1, 8, 1), labels[order]


@pytest.mark.parametrize("regularization", [0.0, 1e-17, 1e-16, 1e-15, 1e-14])
def test_a_factor_that_exists_by_rounding_alone_is_refused_with_the_way_out(
    tmp_path: Path, regularization: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    sentences = []
    for seed in range(40):
        train, _, labels = twice(seed)
        with pytest.raises(SolverError) as caught:
            fit("lstsq", train, labels, settings(tmp_path, "cholesky", regularization))
        sentences.append(str(caught.value))
    found = [text for text in sentences if text.startswith("Cholesky left a residual of ")]
    assert found, "in some of the orders rounding makes every pivot positive"
    assert "where at most 1e-08 is allowed, because the train kernel is singular to rounding" in found[0]
    assert "take a larger one, such as `kernel_regularization=1e-06`, or `lstsq_method=direct`" in found[0]
    others = [text for text in sentences if text not in found]
    assert all("is not positive definite with" in text for text in others)


def test_the_regularization_that_is_advised_solves_a_text_with_both_labels(tmp_path: Path) -> None:
    for seed in range(10):
        train, x, labels = twice(seed)
        found = fit("lstsq", train, labels, settings(tmp_path, "cholesky", 1e-6)).predict(x, np.ones(8))
        direct = fit("lstsq", train, labels, SolverSettings(regularization=1e-6)).predict(x, np.ones(8))
        assert found.metrics["lstsq_residual"] <= 1e-9
        np.testing.assert_allclose(found.logits, direct.logits, rtol=0, atol=1e-8)


def test_candidates_whose_factor_exists_by_rounding_alone_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train, x, labels = twice(0)
    grid = [settings(tmp_path, "cholesky", number) for number in (1e-14, 1e-4)]
    with caplog.at_level(logging.WARNING):
        found = select_on_dev("lstsq", grid, Examples(train, labels), Examples(x, np.ones(8)), lambda logits: 0.0)
    assert [message for message in caplog.messages if "Cholesky left a residual of" in message]
    assert np.isnan(found.candidates[0].score) and found.chosen.settings.regularization == 1e-4


def test_refinement_mends_a_solution_of_a_factor_that_is_inexact() -> None:
    rng = np.random.default_rng(0)
    train, right_sides = kernels()[0].reshape(90, 90), rng.standard_normal((90, 2))
    exact = train + 0.1 * np.eye(90)
    inexact = exact + 1e-5 * np.diag(rng.standard_normal(90))
    found, residuals = blocked_least_squares._refined(
        PanelMatrix(train), 0.1, right_sides, lambda b: np.linalg.solve(inexact, b)
    )
    np.testing.assert_allclose(found, np.linalg.solve(exact, right_sides), rtol=0, atol=1e-11)
    assert (residuals <= 1e-12).all()


@pytest.mark.parametrize("method", BLOCKED)
@pytest.mark.parametrize("regularization", [0.0, 0.01])
def test_a_kernel_of_zeros_has_the_solution_0_of_the_direct_method(
    tmp_path: Path, method: str, regularization: float
) -> None:
    zeros, x = np.zeros((30, 3, 30, 3)), np.zeros((30, 3, 8, 3))
    found = fit("lstsq", zeros, LABELS, settings(tmp_path, method, regularization)).predict(x, LABELS[:8])
    direct = fit("lstsq", zeros, LABELS, SolverSettings(regularization=regularization)).predict(x, LABELS[:8])
    assert not found.logits.any() and not direct.logits.any() and found.loss == direct.loss
    assert found.metrics == {"lstsq_residual": 1.0} | ({"cg_steps": 0} if method == "cg" else {})


@pytest.mark.parametrize("method", BLOCKED)
def test_logits_whose_kernels_are_almost_equal_are_solved_as_by_the_direct_method(tmp_path: Path, method: str) -> None:
    """K = G ⊗ I and noise, whose largest eigenvalues are as many as logits and closer than 1e-8."""
    rng = np.random.default_rng(0)
    whole = np.kron(kernels(1)[0].reshape(30, 30), np.eye(6))
    noise = rng.standard_normal((180, 180))
    train = (whole + 1e-8 * np.abs(whole).max() * (noise + noise.T) / 27).reshape(30, 6, 30, 6)
    labels, of_x = np.arange(30) % 6, np.arange(5)
    found = fit("lstsq", train, labels, settings(tmp_path, method)).predict(train[:, :, :5], of_x)
    direct = fit("lstsq", train, labels, SolverSettings(regularization=0.01)).predict(train[:, :, :5], of_x)
    np.testing.assert_allclose(found.logits, direct.logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", BLOCKED)
def test_a_kernel_that_is_not_symmetric_is_refused(tmp_path: Path, method: str) -> None:
    train, _ = kernels(logits=1)
    train[3, 0, 20, 0] += 1e-6
    labels = 2.0 * (LABELS == 1) - 1
    for kernel in (train, np.stack([train, train.transpose(2, 3, 0, 1)])):
        with pytest.raises(SolverError, match="needs a symmetric kernel"):
            fit("lstsq", kernel, labels, settings(tmp_path, method))


def test_conjugate_gradients_that_fall_short_are_refused_with_what_they_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = kernels()
    monkeypatch.setattr(blocked_least_squares, "MOST_STEPS", 5)
    with pytest.raises(SolverError, match=r"a residual of \S+ in 5 steps, short of `cg_tolerance=1e-13`") as caught:
        fit("lstsq", train, LABELS, settings(tmp_path, "cg", 1e-6))
    assert "or `lstsq_method=cholesky`" in str(caught.value)
    with pytest.raises(SettingError, match="`cg_tolerance` is 0"):
        Blocked("cg", tmp_path, tolerance=0.0)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
def test_the_residual_is_within_the_tolerance_and_the_prediction_near_by(tmp_path: Path, tolerance: float) -> None:
    train, x = kernels()
    chosen = SolverSettings(regularization=0.01, blocked=Blocked("cg", tmp_path, tolerance))
    found = fit("lstsq", train, LABELS, chosen).predict(x, LABELS[:8])
    direct = fit("lstsq", train, LABELS, SolverSettings(regularization=0.01)).predict(x, LABELS[:8])
    assert 0 < found.metrics["lstsq_residual"] <= tolerance
    # ‖K_xᵀ(α − α')‖ ≤ ‖K_x‖ ‖A⁻¹‖ ‖r‖, with ‖A⁻¹‖ ≤ 1 / (λ‖K‖) and ‖K_x‖ ≤ ‖K‖ about.
    assert np.linalg.norm(found.logits - direct.logits) <= 100 * tolerance * np.sqrt(30)


@pytest.mark.parametrize("method", BLOCKED)
def test_candidates_share_passes_and_those_without_a_solution_are_left_out(
    tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, x = kernels()
    train = train - 0.005 * np.eye(90).reshape(train.shape) * np.linalg.norm(train.reshape(90, 90), 2)
    numbers = (0.001, 0.03, 0.3)
    examples, others = Examples(train, LABELS), Examples(x, LABELS[:8])

    def score(logits: np.ndarray) -> float:
        return -float(((logits - np.eye(3)[LABELS[:8]]) ** 2).mean())

    with caplog.at_level(logging.WARNING):
        found = select_on_dev("lstsq", [settings(tmp_path, method, n) for n in numbers], examples, others, score)
    assert [message for message in caplog.messages if "not positive definite" in message]
    monkeypatch.undo()
    direct = select_on_dev("lstsq", [SolverSettings(regularization=n) for n in numbers[1:]], examples, others, score)
    assert np.isnan(found.candidates[0].score)
    assert [row.score for row in found.candidates[1:]] == pytest.approx(
        [row.score for row in direct.candidates], rel=1e-9
    )
    assert found.chosen.settings.regularization == direct.chosen.settings.regularization
    logits = [fitted.predict(x, LABELS[:8]).logits for fitted in (found.fitted, direct.fitted)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-9)


def test_if_no_candidate_has_a_solution_a_larger_one_is_named(tmp_path: Path) -> None:
    train, x = kernels()
    grid = [settings(tmp_path, "cholesky", n) for n in (0.001, 0.01)]
    with pytest.raises(
        SolverError, match="with `kernel_regularization=0.01`, which .*such as `kernel_regularization=0.1`"
    ):
        select_on_dev("lstsq", grid, Examples(-train, LABELS), Examples(x, LABELS[:8]), lambda logits: 0.0)


def test_the_norm_is_the_largest_singular_value() -> None:
    train = kernels()[0].reshape(90, 90)
    for kernel in (train, train - 2 * np.eye(90) * np.linalg.norm(train, 2)):
        assert PanelMatrix(kernel).norm() == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-13)


def test_a_folder_without_room_for_the_factor_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = kernels()
    monkeypatch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(FileError, match="cannot hold the .* of a Cholesky factor .No space left on device.: make room"):
        fit("lstsq", train, LABELS, settings(tmp_path, "cholesky"))
    with pytest.raises(FileError, match="take `lstsq_method=cg`"):
        fit("lstsq", train, LABELS, settings(tmp_path / "missing", "cholesky"))


def test_the_progress_of_a_factor_ends_at_its_total(tmp_path: Path) -> None:
    train, done = kernels()[0].reshape(90, 90), []
    with BlockedCholesky(lambda r, c: train[r, c].copy(), 90, tmp_path, done.append) as factor:
        lower = np.linalg.cholesky(train)
        np.testing.assert_allclose(np.tril(factor._read(1, 0)), np.tril(lower[17:34, :17]), atol=1e-10)
    assert sum(done) == BlockedCholesky.products(90) == 56


def test_conjugate_gradients_start_again_where_rounding_has_moved_the_residual() -> None:
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    matrix = (basis * np.logspace(0, -9, 40)) @ basis.T
    b = rng.standard_normal((40, 2))
    b[:, 1] = 0
    found = conjugate_gradients(lambda v: matrix @ v, np.array([1e-7, 0.0]), b, 1e-9, 5000)
    true = np.linalg.norm(b[:, 0] - (matrix + 1e-7 * np.eye(40)) @ found.values[:, 0]) / np.linalg.norm(b[:, 0])
    assert true <= 1e-9
    assert found.residuals[0] == pytest.approx(true, rel=0.2) and found.residuals[1] == 0
    assert not found.values[:, 1].any() and not found.indefinite.any()
    # A tolerance below rounding ends, and says what it has reached.
    stuck = conjugate_gradients(lambda v: matrix @ v, np.array([1e-7, 0.0]), b, 1e-16, 5000)
    assert 1e-16 < stuck.residuals[0] < 1e-7 and stuck.steps < 5000


@pytest.mark.parametrize("penalty", [0.01, 0.001])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-8])
def test_conjugate_gradients_take_no_more_steps_than_their_bound(penalty: float, tolerance: float) -> None:
    """√κ ln(2 √κ / tolerance) / 2 for the residual; that of the error's A-norm, without the second √κ, is exceeded."""
    values = (1 - np.cos(np.pi * (np.arange(400) + 0.5) / 400)) / 2
    b = 1 / np.sqrt(values + penalty)
    found = conjugate_gradients(lambda v: values[:, None] * v, np.array([penalty]), b[:, None], tolerance, 5000)
    root = np.sqrt(1 + 1 / penalty)
    assert found.residuals[0] <= tolerance
    assert root * np.log(2 / tolerance) / 2 < found.steps <= root * np.log(2 * root / tolerance) / 2
