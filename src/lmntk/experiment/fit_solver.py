"""Fit the solver of `KernelClassifier`, and choose its settings by leave-one-out where there are candidates."""

import logging
from typing import Any

import numpy as np

from lmntk import solvers
from lmntk.data.metrics import compute_metrics
from lmntk.experiment.prompt_kernel import PromptKernel
from lmntk.solvers.candidates import numbers_of, settings_grid
from lmntk.solvers.problem import predicted_classes, signed
from lmntk.solvers.ridge_problem import RidgeProblem
from lmntk.solvers.selection import Examples, select_by_leave_one_out

logger = logging.getLogger(__name__)


def fit_solver(
    arguments: Any, prompts: PromptKernel, kernel: np.ndarray
) -> tuple[solvers.FittedSolver, dict[str, float], RidgeProblem | None]:
    """Fit the solver to the kernel of the train texts.

    Args:
        arguments: Those of `lmntk.KernelClassifier`, by attribute.
        prompts: The model and the train texts.
        kernel: The train kernel, ``[N, C, N, C]`` or ``[2, N, C, N, C]``.

    Returns:
        The solver; its numbers by the names of settings, chosen by leave-one-out; and for `lstsq` the least-squares
        problem that it has solved, else None.

    Raises:
        UsageError: As `lmntk.solvers.fit` raises it.
    """
    labels = np.array(prompts.train.labels)
    labels = signed(labels).astype(np.float32) if arguments.binary_classification else labels
    f0 = prompts.logits(prompts.train) if arguments.adjust_for_init else None
    grid = settings_grid(arguments.solver, vars(arguments))
    if len(grid) == 1:
        fitted = solvers.fit(arguments.solver, kernel, labels, grid[0], f0)
        problem = RidgeProblem(kernel, labels, grid[0], f0) if arguments.solver == "lstsq" else None
        return fitted, numbers_of(grid[0]), problem
    classes, task = np.array(prompts.train.labels), prompts.train.task

    def score(logits: np.ndarray) -> float:
        metrics = compute_metrics(task, predicted_classes(logits), classes)
        return metrics[f"{task.metric_prefix}{task.main_metrics[0]}"]

    selection = select_by_leave_one_out(grid, Examples(kernel, labels, f0), score)
    logger.info(selection.sentence(task.main_metrics[0]))
    problem = RidgeProblem(kernel, labels, selection.chosen.settings, f0)
    return selection.fitted, selection.numbers(), problem
