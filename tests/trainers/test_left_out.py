"""Metrics of leave-one-out: named by the task's main metric, scored as a split is."""

import numpy as np
import pytest

from lmntk.data.tasks import TASKS
from lmntk.solvers.problem import SolverSettings
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.trainers.base import score
from lmntk.trainers.left_out import leave_one_out_metrics
from random_kernels import Case


@pytest.mark.parametrize(("task", "metric"), [("MRPC", "f1"), ("SST-2", "acc"), ("CoLA", "mcc")])
def test_the_score_of_leave_one_out_is_the_tasks_main_metric(task: str, metric: str) -> None:
    case, row = Case(2), TASKS[task]
    problem = RidgeProblem(case.train, case.train_labels, SolverSettings(regularization=0.1))
    name = row.main_metrics[0]
    assert name == metric
    key = f"{row.metric_prefix}{name}"
    found = leave_one_out_metrics(problem, name, lambda logits: score(row, logits, problem.classes)[key])
    assert [*found] == [f"loo_{metric}", "loo_loss", "gcv"]
    left_out = problem.leave_one_out()
    assert found[f"loo_{metric}"] == score(row, left_out, case.train_labels)[key]
    assert found["loo_loss"] == pytest.approx(np.mean((left_out - np.eye(2)[case.train_labels]) ** 2))


def test_several_prompts_of_an_example_have_no_gcv_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(2)
    case.train_labels = np.tile(case.train_labels[:10], 2)
    problem = RidgeProblem(case.train, case.train_labels, SolverSettings(regularization=0.1), samples=2)
    with caplog.at_level("INFO"):
        found = leave_one_out_metrics(problem, "acc", lambda logits: 0.5)
    assert [*found] == ["loo_acc", "loo_loss"] and "gcv is left out: it takes the prompts" in caplog.text
