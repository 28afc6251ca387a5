"""The choice of a solver's settings: the best of fits that are made one by one, and how ties are resolved."""

import logging
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from lmntk import solvers
from lmntk.errors import SettingError, SolverError
from lmntk.solvers.candidates import AUTO, numbers_of, read_candidates, settings_grid
from lmntk.solvers.problem import Array, SolverSettings, predicted_classes
from lmntk.solvers.selection import Candidate, Examples, select_by_leave_one_out, select_on_dev
from random_kernels import CLOSE, Case

ONE = dict(zip(AUTO, (0.0, 1.0, 1.0, 0.5), strict=True))
SWITCHES = {"adjust_for_init": False, "flattened_targets": False, "plain_lbfgs": False}


def grid_of(solver: str, **given: Any) -> list[SolverSettings]:
    return settings_grid(solver, ONE | SWITCHES | given)


def examples(case: Case, f0: bool) -> tuple[Examples, Examples]:
    """The train examples and those to predict."""
    train = Examples(case.train, case.train_labels, case.train_f0 if f0 else None)
    return train, Examples(case.test, case.test_labels, case.test_f0 if f0 else None)


def closeness(labels: np.ndarray, case: Case) -> Callable[[Array], float]:
    """A score without ties: less the squared error."""
    return lambda logits: -float(((logits - case.targets(labels)) ** 2).sum())


SOLVERS = [
    ("lstsq", Case(1), True), ("lstsq", Case(2), True), ("lstsq", Case(6), False), ("lstsq", Case(2, 12), True),
    ("lstsq", Case(1, asymmetric=True), True), ("asym", Case(1, asymmetric=True), True),
    ("asym", Case(1, asymmetric=True), False), ("svr", Case(2), True), ("svc", Case(2), False),
    ("logistic", Case(1), False),
]  # fmt: skip
IDS = [f"{solver}-{case.logits}-{case.train.ndim}-{f0}" for solver, case, f0 in SOLVERS]


@pytest.mark.parametrize(("solver", "case", "f0"), SOLVERS, ids=IDS)
def test_every_candidate_scores_as_a_fit_of_its_own(solver: str, case: Case, f0: bool) -> None:
    numbers: dict[str, Any] = {"kernel_regularization": "0,0.01,1", "f0_scaling": "10,0", "adjust_for_init": f0}
    if solver == "asym":
        numbers |= {"kernel_gamma": "0.1,10", "kernel_lambda": "0,0.5"}
    grid = grid_of(solver, **numbers)
    assert len(grid) == 3 * (2 if f0 else 1) * (4 if solver == "asym" else 1)
    train, dev = examples(case, f0)
    selection = select_on_dev(solver, grid, train, dev, closeness(case.test_labels, case))
    assert [row.settings for row in selection.candidates] == grid
    for row in selection.candidates:
        prediction = case.predict(solver, row.settings, f0)
        assert row.loss == pytest.approx(prediction.loss, rel=1e-9)
        assert row.score == pytest.approx(closeness(case.test_labels, case)(prediction.logits), rel=1e-9)
    assert selection.chosen.score == max(row.score for row in selection.candidates)
    found = selection.fitted.predict(case.test, case.test_labels, dev.f0)
    wanted = case.predict(solver, selection.chosen.settings, f0)
    np.testing.assert_allclose(found.logits, wanted.logits, rtol=0, atol=CLOSE)
    assert found.metrics == wanted.metrics


@pytest.mark.parametrize(("logits", "samples"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_leave_one_out_chooses_the_best_of_real_fits_without_each_example(logits: int, samples: int) -> None:
    case = Case(logits)
    grid = grid_of("lstsq", kernel_regularization="0.001,0.1", f0_scaling="10,0", adjust_for_init=True)
    train, _ = examples(case, True)
    if samples == 2:  # the second half are the same examples with other prompts
        labels = np.tile(case.train_labels[: case.n // 2], 2)
        train = Examples(case.train, labels, case.train_f0)
    labels = np.asarray(train.labels)
    selection = select_by_leave_one_out(grid, train, closeness(labels, case), samples)
    norm = np.linalg.norm(case.flat(case.train), 2)
    for row in selection.candidates:
        ridge = row.settings.regularization * norm * np.eye(case.n * logits).reshape(case.train.shape)
        plain = SolverSettings(f0_scaling=row.settings.f0_scaling)
        logits_out = np.empty((case.n, logits))
        for example in range(case.n // samples):
            out = np.arange(case.n) % (case.n // samples) == example
            ridged = case.train + ridge
            fitted = solvers.fit("lstsq", ridged[~out][:, :, ~out], labels[~out], plain, case.train_f0[~out])
            logits_out[out] = fitted.predict(ridged[~out][:, :, out], labels[out], case.train_f0[out]).logits
        assert row.score == pytest.approx(closeness(labels, case)(logits_out), rel=1e-9)
    assert selection.chosen.score == max(row.score for row in selection.candidates)


def test_ties_go_to_the_most_regularised_setting_and_are_counted() -> None:
    case = Case(2)
    train, dev = examples(case, True)
    grid = grid_of("lstsq", kernel_regularization="auto", f0_scaling="auto", adjust_for_init=True)
    assert len(grid) == 25
    selection = select_on_dev("lstsq", grid, train, dev, lambda logits: 0.5)
    assert selection.numbers() == ONE | {"kernel_regularization": 1.0, "f0_scaling": 0.0}
    assert selection.ties == 24
    sentence = selection.sentence("acc")
    assert "acc = 0.5 the best of 25 settings" in sentence and "24 others have the same score" in sentence


def test_a_candidate_ranks_by_score_then_lambda_then_the_others() -> None:
    def rank(score: float, **settings: float) -> tuple[float, ...]:
        return Candidate(SolverSettings(**settings), score, 0.0).rank

    assert (
        rank(0.6) > rank(0.5, regularization=1) > rank(0.5, regularization=0.1) > rank(float("nan"), regularization=9)
    )
    assert rank(0.5, f0_scaling=0) > rank(0.5, f0_scaling=1e4) > rank(0.5, f0_scaling=10)
    assert rank(0.5, gamma=0.01) > rank(0.5, gamma=1)
    assert rank(0.5, lambda_=0.5) > rank(0.5, lambda_=0.75) > rank(0.5, lambda_=0.25) > rank(0.5, lambda_=0)


def test_one_decomposition_serves_all_settings_of_lstsq(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: calls.append(len(matrix)) or real(matrix))
    case = Case(2)
    grid = grid_of("lstsq", kernel_regularization="auto", f0_scaling="auto", adjust_for_init=True)
    select_on_dev("lstsq", grid, *examples(case, True), closeness(case.test_labels, case))
    assert calls == [case.n * 2]


def test_leave_one_out_leaves_out_the_lambdas_that_keep_the_kernel_singular() -> None:
    case = Case(2)
    twice = Examples(np.tile(case.train, (2, 1, 2, 1)), np.tile(case.train_labels, 2))
    classes = np.tile(case.train_labels, 2)

    def accuracy(logits: Array) -> float:
        return float((predicted_classes(logits) == classes).mean())

    selection = select_by_leave_one_out(grid_of("lstsq", kernel_regularization="auto"), twice, accuracy)
    assert [np.isnan(row.score) for row in selection.candidates] == [True, False, False, False, False]
    assert "1 leave the kernel singular and are left out" in selection.sentence("acc")
    with pytest.raises(SolverError, match="`kernel_regularization=0,1e-30`.*take `kernel_regularization=0.001`"):
        select_by_leave_one_out(grid_of("lstsq", kernel_regularization=(0, 1e-30)), twice, accuracy)


def test_a_table_of_candidates_has_the_settings_that_the_solver_reads() -> None:
    case = Case(2)
    grid = grid_of("lstsq", kernel_regularization="0,1")
    table = select_on_dev("lstsq", grid, *examples(case, False), closeness(case.test_labels, case)).table()
    assert [list(row) for row in table] == 2 * [["kernel_regularization", "dev_score", "dev_loss", "chosen"]]
    assert sorted(row["chosen"] for row in table) == [0, 1]


def test_one_class_is_warned_of_as_by_a_fit(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(2)
    train = Examples(case.train, np.zeros(case.n, dtype=int))
    with caplog.at_level(logging.WARNING):
        grid = grid_of("lstsq", kernel_regularization="0,1")
        select_on_dev("lstsq", grid, train, Examples(case.test, case.test_labels), lambda logits: 0.0)
    assert "all train examples are of class 0" in caplog.text


@pytest.mark.parametrize(
    ("given", "numbers"),
    [("auto", (0.0, 0.001, 0.01, 0.1, 1.0)), ("0.1", (0.1,)), (0.1, (0.1,)), ("0,1e-3", (0.0, 0.001)),
     ([0, 0.5], (0.0, 0.5)), (np.array([0.5, 2]), (0.5, 2.0))],
    ids=str,
)  # fmt: skip
def test_candidates_are_numbers_lists_or_auto(given: Any, numbers: tuple[float, ...]) -> None:
    assert read_candidates("kernel_regularization", given) == numbers


@pytest.mark.parametrize("given", ["0,,1", "auto,1", "much", "", "1,1", "1,1.0", [], None, ["auto"]], ids=str)
@pytest.mark.parametrize("setting", AUTO)
def test_a_bad_list_is_refused_with_the_name_of_its_setting(setting: str, given: Any) -> None:
    with pytest.raises(SettingError, match=f"`{setting}`") as error:
        read_candidates(setting, given)
    assert error.value.data["setting"] == setting


def test_settings_that_a_solver_does_not_read_keep_one_value() -> None:
    assert grid_of("svc", kernel_gamma="auto", f0_scaling="auto") == [SolverSettings()]
    assert grid_of("lstsq", kernel_gamma="3", f0_scaling="auto") == [SolverSettings(gamma=3)]
    of_asym = grid_of("asym", kernel_gamma="auto", kernel_lambda="auto", kernel_regularization="0,1")
    assert len(of_asym) == 2 * 4 * 5
    wanted = set(product((0.0, 1.0), AUTO["kernel_gamma"], AUTO["kernel_lambda"]))
    assert {(row.regularization, row.gamma, row.lambda_) for row in of_asym} == wanted
    assert {0.0, 0.5, 1.0} <= set(AUTO["kernel_lambda"])
    assert numbers_of(of_asym[0])["f0_scaling"] == 1
