"""The least-squares problem of a saved run: what leave-one-out, influence, forecasts and selections stand on."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmntk.analysis.only_run import the_one
from lmntk.analysis.saved_kernel import SavedKernel
from lmntk.analysis.saved_run import SavedRun, read_runs
from lmntk.analysis.scores import score
from lmntk.analysis.solver_choice import SolverChoice, choose_solver, records_solver
from lmntk.data.metrics import mean_over_samples
from lmntk.errors import FileError, SolverError
from lmntk.solvers.problem import Array, ClassIds, predicted_classes
from lmntk.solvers.ridge_problem import RidgeProblem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LeastSquaresRun:
    """A run whose kernels predict by `lstsq`.

    Attributes:
        run: The run.
        choice: How its kernels predict: the run's own settings, or given ones.
        train: The kernel of the train examples.
        problem: The least-squares problem of all its train examples.
    """

    run: SavedRun
    choice: SolverChoice
    train: SavedKernel
    problem: RidgeProblem

    @property
    def x_splits(self) -> list[str]:
        """The splits beside train that have a kernel: ``["dev", "test"]``."""
        return [split for split in self.run.kernel_splits if split != "train"]

    @functools.cache  # noqa: B019, a run lives as long as the command
    def kernel(self, split: str) -> SavedKernel:
        """Read the kernel of train and another split."""
        return self.run.kernel(split)

    @functools.cache  # noqa: B019
    def f0(self, split: str) -> Array | None:
        """Read the untrained model's logits of a split, ``[X, C]``, if the run fits around them."""
        return self.run.untrained_logits(split) if self.choice.adjust_for_init else None

    def predict(self, split: str, problem: RidgeProblem | None = None, kernel: Array | None = None) -> Array:
        """Predict a split.

        Args:
            split: One of `x_splits`.
            problem: A problem with the same train examples; None: `problem`.
            kernel: The kernel of that problem's train examples with the split; None: the one in the file.

        Returns:
            Logits, float64 ``[X, C]``, mean over samples.
        """
        saved = self.kernel(split)
        values = saved.values if kernel is None else kernel
        found = (problem or self.problem).predict(values, saved.labels, self.f0(split), split)
        return mean_over_samples(found.logits, len(saved.class_ids))

    def score(self, split: str, logits: Array) -> float:
        """Return the task's main metric of logits, ``[X, C]``, of the examples of a split, train included."""
        return score(self.run.task, split, predicted_classes(logits), self.classes(split))

    def classes(self, split: str) -> ClassIds:
        """Return the class ids of a split's examples, ``[X]``."""
        return self.problem.classes if split == "train" else self.kernel(split).class_ids


def read_least_squares(run: SavedRun, given: Mapping[str, Any]) -> LeastSquaresRun:
    """Read what `lstsq` needs of a run.

    Args:
        run: The run, from `lmntk.analysis.saved_run.read_runs`.
        given: Solver settings by name in place of the run's own; None counts as absent.

    Raises:
        FileError: The folder has no kernels, or one is damaged.
        SolverError: The run predicts with another solver, for which nothing of this is defined.
    """
    if not run.kernel_splits:
        raise FileError(
            f"{run.folder} holds no kernels of {run.key}: give the folder of a run with `trainer=kernel`",
            path=run.folder,
        )
    choice = choose_solver(run, given)
    if choice.solver != "lstsq":
        raise SolverError(
            f"{run.folder} predicts with `kernel_solver={choice.solver}`, but this is closed form for lstsq alone: "
            "give `kernel_solver=lstsq` to see what lstsq makes of its kernel",
            solver=choice.solver,
        )
    if not records_solver(run) and given.get("kernel_regularization") is None:
        logger.warning(
            "%s records no solver settings: lstsq with `kernel_regularization=%g` is taken; give the run's own",
            run.folder,
            choice.settings.regularization,
        )
    train = run.kernel("train")
    f0 = run.untrained_logits("train") if choice.adjust_for_init else None
    problem = RidgeProblem(train.values, train.labels, choice.settings, f0, train.samples_per_example[0])
    return LeastSquaresRun(run, choice, train, problem)


def find_kernel_run(folder: Path) -> SavedRun:
    """Find the one run in a folder that has kernels.

    Raises:
        FileError: The folder is not that of a run, or holds no kernels.
        KernelMismatchError: It holds kernels of several tasks.
    """
    with_kernels = [run for run in read_runs(folder) if run.kernel_splits]
    if not with_kernels:
        raise FileError(f"{folder} holds no kernels: give the folder of a run with `trainer=kernel`", path=folder)
    return the_one(with_kernels, folder, "kernels")
