"""How well fewer examples would do: the scores of balanced random subsets of the train examples of one kernel.

The kernel of a subset is a sub-matrix of the kernel of all, so that no model is asked again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lmntk.analysis.least_squares import LeastSquaresRun
from lmntk.analysis.scores import score
from lmntk.analysis.statistics import Array
from lmntk.errors import SettingError
from lmntk.solvers.problem import ClassIds, predicted_classes
from lmntk.solvers.ridge_problem import RidgeProblem

Indices = NDArray[np.int64]
INTERVAL = (2.5, 97.5)
"""The percentiles between which 95 percent of the draws lie."""


@dataclass(frozen=True)
class Spread:
    """A number over several draws; NaN where no draw has it.

    Attributes:
        mean: The mean.
        deviation: The standard deviation, with divisor draws − 1; NaN for a single draw.
        low: The percentile 2.5.
        high: The percentile 97.5.
    """

    mean: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | Array) -> "Spread":
        """Summarise numbers; if one is NaN, so is the summary."""
        array = np.asarray(values, dtype=np.float64)
        deviation = float(array.std(ddof=1)) if len(array) > 1 else float("nan")
        low, high = np.percentile(array, INTERVAL)
        return cls(float(array.mean()), deviation, float(low), float(high))


@dataclass(frozen=True)
class CurvePoint:
    """The scores of k examples a class.

    Attributes:
        k: Examples of each class.
        draws: How many subsets were drawn; one if there is one only.
        scores: The score of each split.
        left_out_score: The score of leave-one-out on the subset itself.
        left_out_loss: Its mean squared error.
        gcv: Generalised cross-validation; NaN with several samples of an example.
        drawn: The score of each split, for each draw.
    """

    k: int
    draws: int
    scores: dict[str, Spread]
    left_out_score: Spread
    left_out_loss: Spread
    gcv: Spread
    drawn: dict[str, list[float]]


def largest_k(classes: ClassIds) -> int:
    """Return how many examples the rarest class has.

    Examples:
        >>> largest_k(np.array([0, 0, 1, 1, 1]))
        2
    """
    return int(np.unique(classes, return_counts=True)[1].min())


def usual_ks(most: int) -> list[int]:
    """Return 1, 2, 4, … and the most that there is.

    Examples:
        >>> usual_ks(12)
        [1, 2, 4, 8, 12]
    """
    powers = [2**power for power in range(most.bit_length())]
    return [*powers, *([] if powers[-1] == most else [most])]


def check_k(k: int, classes: ClassIds) -> None:
    """Refuse a k that the train examples do not have.

    Raises:
        SettingError: It is below 1, or above the number of examples of the rarest class.
    """
    most = largest_k(classes)
    if not 1 <= k <= most:
        sentence = f"`k={k}`: the rarest class has {most} train examples, so that k runs from 1 to {most}"
        raise SettingError(sentence, setting="k", value=k)


def draw_balanced(classes: ClassIds, k: int, generator: np.random.Generator) -> Indices:
    """Draw k examples of each class without replacement, and return their indices, ascending.

    Examples:
        >>> draw_balanced(np.array([0, 1, 0, 1]), 2, np.random.default_rng(0)).tolist()
        [0, 1, 2, 3]
    """
    chosen = [generator.choice(np.flatnonzero(classes == label), k, replace=False) for label in np.unique(classes)]
    return np.sort(np.concatenate(chosen))


def learning_curve(
    run: LeastSquaresRun,
    ks: Sequence[int],
    draws: int,
    seed: int,
    *,
    left_out: bool = True,
    show_progress: bool = False,
) -> list[CurvePoint]:
    """Score balanced random subsets of the train examples.

    λ‖K‖₂ is taken from the norm of each subset's own kernel, as a run with that many examples would have it.

    Args:
        run: The run whose kernel holds all examples.
        ks: Examples of each class.
        draws: How many subsets are drawn for each k; where all examples are taken there is only one.
        seed: Seeds the draws; those of one k do not depend on which other k are asked for.
        left_out: Whether leave-one-out and GCV of each subset are computed too.
        show_progress: Whether to show a progress bar.

    Raises:
        SettingError: There are not k examples of each class.
    """
    classes = run.problem.classes
    for k in ks:
        check_k(k, classes)
    number = {k: 1 if k * len(np.unique(classes)) == len(classes) else draws for k in ks}
    points = []
    with tqdm(total=sum(number.values()), desc="subsets", unit="fit", disable=not show_progress, leave=False) as bar:
        for k in ks:
            generator = np.random.default_rng([seed, k])
            subsets = (draw_balanced(classes, k, generator) for _ in range(number[k]))
            points.append(_curve_point(run, k, [_scores(run, subset, left_out, bar.update) for subset in subsets]))
    return points


def subset_scores(run: LeastSquaresRun, examples: Indices) -> dict[str, float]:
    """Return the score of each split when `lstsq` is fitted to some of the train examples."""
    return _scores(run, examples, False, lambda: None)


def _scores(run: LeastSquaresRun, examples: Indices, left_out: bool, done: Callable[[], object]) -> dict[str, float]:
    part = run.problem.restricted_to(examples)
    found = {}
    for split in run.x_splits:
        kernel = run.problem.restrict(run.kernel(split).values, examples)
        found[split] = run.score(split, run.predict(split, part, kernel))
    if left_out:
        found |= _left_out(run, part)
    done()
    return found


_LEFT_OUT = ("left_out_score", "left_out_loss", "gcv")


def _left_out(run: LeastSquaresRun, part: RidgeProblem) -> dict[str, float]:
    """Return leave-one-out and GCV of a subset; NaN where they are not defined."""
    if part.num_examples < 2 or not part.has_leave_one_out:
        return dict.fromkeys(_LEFT_OUT, float("nan"))
    of_score = score(run.run.task, "train", predicted_classes(part.leave_one_out()), part.classes)
    return dict(zip(_LEFT_OUT, (of_score, part.leave_one_out_loss(), part.gcv()), strict=True))


def _curve_point(run: LeastSquaresRun, k: int, found: Sequence[dict[str, float]]) -> CurvePoint:
    spreads = {name: Spread.of([each[name] for each in found]) for name in found[0]}
    left_out, loss, gcv = (spreads.get(name, Spread(*[float("nan")] * 4)) for name in _LEFT_OUT)
    drawn = {split: [each[split] for each in found] for split in run.x_splits}
    return CurvePoint(k, len(found), {split: spreads[split] for split in drawn}, left_out, loss, gcv, drawn)
