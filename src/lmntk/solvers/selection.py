"""Choose a solver's settings among candidates: by their score on dev, or by exact leave-one-out of `lstsq`."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from lmntk.errors import NotFiniteError, SolverError
from lmntk.solvers import SOLVERS, FittedSolver, checked_kernel, fit, limited_threads, warn_of_one_class
from lmntk.solvers.candidates import numbers_of, used_settings
from lmntk.solvers.leave_one_out import LeftOut
from lmntk.solvers.problem import (
    Array,
    FitInputs,
    Predict,
    SolverSettings,
    check_fit_inputs,
    divided_f0,
    squared_error,
    targets,
    validate_predict_inputs,
)

Score = Callable[[Array], float]
"""Scores predicted logits, ``[X, C]``, a row for each row of the kernel; the higher the better."""


@dataclass(frozen=True)
class Examples:
    """The examples of a split, as a solver sees them.

    Attributes:
        kernel: That of the train examples with them, ``[N, C, X, C]`` or ``[2, N, C, X, C]``.
        labels: ``[X]``, class ids, or -1 and +1 when C = 1.
        f0: ``[X, C]``, logits of the untrained model for `adjust_for_init`, or None.
    """

    kernel: ArrayLike
    labels: ArrayLike
    f0: ArrayLike | None = None


@dataclass(frozen=True)
class Candidate:
    """One combination of settings and how well it predicts.

    Attributes:
        settings: The settings.
        score: Its score, NaN if it gives no predictions.
        loss: Its loss, a mean over the examples.
    """

    settings: SolverSettings
    score: float
    loss: float

    @property
    def rank(self) -> tuple[float, ...]:
        """The best candidate has the largest: the score counts, and in ties the more regularised one.

        That is the larger λ, then the larger divisor of f₀ (0 leaves f₀ out), then the smaller γ, then the weight of
        the first direction that is nearer 1/2, then the larger one.
        """
        own = self.settings
        score = -math.inf if math.isnan(self.score) else self.score
        return score, own.regularization, own.f0_scaling or math.inf, -own.gamma, -abs(own.lambda_ - 0.5), own.lambda_


@dataclass(frozen=True)
class Selection:
    """The choice among the candidates.

    Attributes:
        by: ``"dev"`` or ``"loo"``.
        used: The settings that the solver reads, by their names.
        candidates: All of them, in the order of the grid.
        chosen: The best one.
        fitted: The solver, fitted with the chosen settings.
    """

    by: str
    used: Sequence[str]
    candidates: Sequence[Candidate]
    chosen: Candidate
    fitted: FittedSolver

    @property
    def ties(self) -> int:
        """How many other candidates have the score of the chosen one."""
        return sum(candidate.score == self.chosen.score for candidate in self.candidates) - 1

    def numbers(self) -> dict[str, float]:
        """Return the chosen numbers under the names of the settings."""
        return numbers_of(self.chosen.settings)

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each candidate: its settings, its score and loss, and whether it is chosen, 0 or 1."""
        return [
            {setting: number for setting, number in numbers_of(row.settings).items() if setting in self.used}
            | {f"{self.by}_score": row.score, f"{self.by}_loss": row.loss, "chosen": int(row is self.chosen)}
            for row in self.candidates
        ]

    def sentence(self, metric: str) -> str:
        """Say what is chosen, its score, among how many settings, and how ties were resolved.

        Args:
            metric: The name of the score.
        """
        numbers = self.numbers()
        varied = [name for name in self.used if len({numbers_of(row.settings)[name] for row in self.candidates}) > 1]
        chosen = " ".join(f"`{name}={numbers[name]:g}`" for name in varied)
        by = "on dev" if self.by == "dev" else "by leave-one-out"
        score = f"{metric} = {self.chosen.score:.6g}"
        text = f"chosen {by}: {chosen}, with {score} the best of {len(self.candidates)} settings"
        left_out = sum(math.isnan(row.score) for row in self.candidates)
        if self.ties:
            others = "another has" if self.ties == 1 else f"{self.ties} others have"
            text += f"; {others} the same score, and the larger λ, or else the more regularised setting, counts"
        if left_out:
            why = "give no finite predictions" if self.by == "dev" else "leave the kernel singular"
            text += f"; {left_out} {why} and are left out"
        return text


def select_on_dev(
    solver: str, grid: Sequence[SolverSettings], train: Examples, dev: Examples, score: Score
) -> Selection:
    """Choose the settings that predict dev best.

    `lstsq` with a symmetric kernel and `asym` decompose the kernel once for all settings; other solvers are fitted with
    each. The fitted solver's predictions are those of `solvers.fit` with the chosen numbers, to rounding.

    Args:
        solver: A key of `SOLVERS`.
        grid: The candidates, as `candidates.settings_grid` returns them.
        train: The train examples.
        dev: The dev examples.
        score: Scores their predicted logits.

    Raises:
        UsageError: As `solvers.fit` and `FittedSolver.predict` raise it.
    """
    kernel = checked_kernel(solver, train.kernel, f0=train.f0 is not None)
    import_module("scipy.linalg")  # the limit holds for libraries that are loaded by then
    found: list[Candidate] = []
    best: Candidate | None = None
    with limited_threads(grid[0]), np.errstate(over="ignore", invalid="ignore"):
        trains = _inputs(kernel, train, grid)
        x = validate_predict_inputs(trains[0], dev.kernel, dev.labels, dev.f0, "dev")
        for inputs, predict in zip(trains, _fits(solver, trains), strict=True):
            offset = divided_f0(dev.f0, x.f0_offset.shape, inputs.settings.f0_scaling, "dev")
            prediction = predict(dataclasses.replace(x, f0_offset=offset))
            is_finite = np.isfinite(prediction.logits).all() and np.isfinite(prediction.loss)
            value = score(prediction.logits) if is_finite else math.nan
            found.append(Candidate(inputs.settings, value, prediction.loss))
            if best is None or found[-1].rank > best.rank:
                best, fitted = found[-1], FittedSolver(predict, inputs.without_kernel(), adjusted=train.f0 is not None)
    assert best is not None
    if math.isnan(best.score):
        raise NotFiniteError(
            "no candidate of the solver's settings gives finite predictions for dev: the values of its kernel and of "
            "the train kernel are too far apart",
            split="dev",
        )
    warn_of_one_class(solver, fitted.train)
    return Selection("dev", used_settings(solver, f0=train.f0 is not None), found, best, fitted)


def select_by_leave_one_out(
    grid: Sequence[SolverSettings], train: Examples, score: Score, samples: int = 1
) -> Selection:
    """Choose the settings with which `lstsq` predicts the train examples best, each from all the others.

    Args:
        grid: The candidates, as `candidates.settings_grid` returns them.
        train: The train examples, sample by sample.
        score: Scores the logits that are predicted for them.
        samples: The samples of each example, which leave together.

    Raises:
        SolverError: The kernel is singular with every λ; names one that would do.
        UsageError: As `solvers.fit` raises it.
    """
    kernel = checked_kernel("lstsq", train.kernel, f0=train.f0 is not None)
    with threadpool_limits(limits=1):
        inputs = _inputs(kernel, train, grid)
        examples = len(inputs[0].classes)
        left_out = LeftOut(train.kernel, np.tile(np.arange(examples // samples), samples))
        wanted = targets(inputs[0].classes, inputs[0].num_logits)
        found = []
        for regularization in dict.fromkeys(settings.regularization for settings in grid):
            members = [row for row in inputs if row.settings.regularization == regularization]
            if not left_out.is_defined(regularization):
                found += [Candidate(row.settings, math.nan, math.nan) for row in members]
                continue
            residual_targets = np.stack([wanted - row.f0_offset for row in members], axis=2)
            predicted = left_out.predict(residual_targets, regularization)
            for index, row in enumerate(members):
                logits = predicted[..., index] + row.f0_offset
                found.append(Candidate(row.settings, score(logits), squared_error(logits, wanted)))
    best = max(found, key=lambda candidate: candidate.rank)
    if math.isnan(best.score):
        given = ",".join(f"{number:g}" for number in dict.fromkeys(row.regularization for row in grid))
        raise SolverError(
            f"the train kernel is singular, as a whole or without an example, with `kernel_regularization={given}`, so "
            "that leave-one-out is not defined: "
            f"{left_out.remedy()}",
            solver="lstsq",
            regularization=given,
        )
    fitted = fit("lstsq", train.kernel, train.labels, best.settings, train.f0)
    return Selection("loo", used_settings("lstsq", f0=train.f0 is not None), found, best, fitted)


def _inputs(kernel: Array, train: Examples, grid: Sequence[SolverSettings]) -> list[FitInputs]:
    """Return the checked inputs for each of some settings, which share the kernel: it is not regularised yet."""
    plain = check_fit_inputs(kernel, train.labels, None, grid[0])
    offsets = [divided_f0(train.f0, plain.f0_offset.shape, settings.f0_scaling, "train") for settings in grid]
    return [
        dataclasses.replace(plain, settings=settings, f0_offset=offset)
        for settings, offset in zip(grid, offsets, strict=True)
    ]


def _fits(solver: str, trains: Sequence[FitInputs]) -> Iterator[Predict]:
    """Fit the solver with each of some settings."""
    row = SOLVERS[solver]
    if row.family:
        yield from row.fit_family(trains)
    else:
        yield from (row.fit(train.regularised()) for train in trains)
