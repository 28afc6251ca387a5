"""Choosing k examples of each class from the train examples of a kernel run, and how well they do."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from lmntk.analysis import statistics
from lmntk.analysis.learning_curve import CurvePoint, check_k, draw_balanced, learning_curve, subset_scores
from lmntk.analysis.least_squares import LeastSquaresRun
from lmntk.analysis.statistics import Array
from lmntk.analysis.table_blocks import UNKNOWN, Block, as_csv, as_json, format_blocks, percent, with_deviation
from lmntk.errors import FileError, KernelMismatchError
from lmntk.solvers.greedy_choice import LEAST_RIDGE, GrowingFit, by_blocks, choose_greedily, herd, in_turn
from lmntk.solvers.problem import class_ids as class_ids_of
from lmntk.solvers.problem import divided_f0, targets
from lmntk.storage.wording import quantity

WAYS: Mapping[str, str] = {
    "loo": "the least mean squared error over the pool, each example predicted by the other chosen ones",
    "dev": "the least mean squared error on dev",
    "variance": "the largest posterior variance, as in a pivoted Cholesky decomposition; takes no label but the class",
    "herding": "the mean feature of each class nearest to that in the pool",
    "random": "k of each class at random",
}
"""The ways to choose, and what each step of them looks for."""


@dataclass(frozen=True)
class Selection:
    """A choice of examples.

    Attributes:
        by: A key of `WAYS`.
        k: Examples of each class.
        examples: Their indices in the pool, in the order of choice; classes take turns.
        scores: The score of each split with `lstsq` fitted to them.
        random: The scores of random subsets of as many.
        better_than: The share of these that each split's score is above; ties count half. NaN for the whole pool.
    """

    by: str
    k: int
    examples: list[int]
    scores: dict[str, float]
    random: CurvePoint
    better_than: dict[str, float]


def select_examples(
    run: LeastSquaresRun, by: str, k: int, seed: int, draws: int, show_progress: bool = False
) -> Selection:
    """Choose k examples of each class.

    Args:
        run: The run, whose train examples are the pool.
        by: A key of `WAYS`.
        k: Examples of each class.
        seed: Seeds the choice at random, and the subsets to compare with.
        draws: How many random subsets there are to compare with.
        show_progress: Whether to show progress bars.

    Raises:
        SettingError: The pool does not have k examples of each class.
        FileError: The choice is by dev, and the run has no kernel of dev.
        KernelMismatchError: The kernels are asymmetric, and the choice needs a covariance.
    """
    classes = run.problem.classes
    check_k(k, classes)
    generator = np.random.default_rng(seed)
    if by == "random":
        chosen = in_turn(draw_balanced(classes, k, generator).tolist(), classes, k)
    elif by == "herding":
        chosen = herd(run.train.average_over_samples(statistics.logit_differences(run.train.values)), classes, k)
    else:
        _check_symmetric(run, by)
        fit = _growing_fit(run, by)
        score: Mapping[str, Callable[[int], float]] = {
            "loo": lambda example: -fit.loss_with(example),
            "dev": lambda example: -fit.loss_elsewhere_with(example),
            "variance": lambda example: float(fit.variances()[example]),
        }
        total = k * len(np.unique(classes))
        with tqdm(total=total, desc="chosen", unit="example", disable=not show_progress, leave=False) as bar:
            chosen = choose_greedily(score[by], fit.add, classes, k, bar.update)
    scores = subset_scores(run, np.array(chosen))
    (random,), better = _compare(run, k, scores, draws, seed, show_progress)
    return Selection(by, k, chosen, scores, random, better)


def _check_symmetric(run: LeastSquaresRun, by: str) -> None:
    if run.train.values.ndim == 5:
        raise KernelMismatchError(
            f"{run.run.folder} holds asymmetric kernels, of which no one direction is a covariance: `by={by}` is not "
            "defined; choose by herding or at random, or take kernels of another `kernel_formula`",
            path=run.run.folder,
            differences=["kernel_formula"],
        )


def _growing_fit(run: LeastSquaresRun, by: str) -> GrowingFit:
    """Return the fit to none of the pool; λ‖K‖₂ is that of the whole pool."""
    problem, samples = run.problem, run.problem.samples
    pool = by_blocks(problem.kernel, samples)
    wanted = _by_example(problem.targets - problem.offset, samples)
    norm = float(np.linalg.norm(statistics.flattened(problem.kernel), 2))
    ridge = max(problem.settings.regularization, LEAST_RIDGE) * norm
    if by != "dev":
        return GrowingFit(pool, wanted, ridge)
    if "dev" not in run.x_splits:
        path = run.run.kernel_paths.kernel("dev")
        sentence = f"{path} is missing, by which `by=dev` chooses: choose by loo, or repeat the run with `do_eval`"
        raise FileError(sentence, path=path)
    saved = run.kernel("dev")
    others = (
        saved.values.reshape(samples, len(wanted), saved.num_logits, -1)
        .transpose(1, 0, 2, 3)
        .reshape(*wanted.shape, -1)
    )
    logits = targets(class_ids_of(saved.labels, saved.num_logits), saved.num_logits)
    offset = divided_f0(run.f0("dev"), logits.shape, problem.settings.f0_scaling, "dev")
    return GrowingFit(pool, wanted, ridge, others, (logits - offset).reshape(-1))


def _by_example(values: Array, samples: int) -> Array:
    """Return ``[N, C]``, sample by sample, as ``[E, samples · C]``."""
    examples = len(values) // samples
    return values.reshape(samples, examples, -1).transpose(1, 0, 2).reshape(examples, -1)


def _compare(
    run: LeastSquaresRun, k: int, scores: Mapping[str, float], draws: int, seed: int, show_progress: bool
) -> tuple[list[CurvePoint], dict[str, float]]:
    points = learning_curve(run, [k], draws, seed, left_out=False, show_progress=show_progress)
    shares, classes = {}, run.problem.classes
    is_whole = k * len(np.unique(classes)) == len(classes)
    for split, value in scores.items():
        others = np.array(points[0].drawn[split])
        shares[split] = float("nan") if is_whole else float(np.mean(others < value) + np.mean(others == value) / 2)
    return points, shares


_COMPARED = ("at random", "95 % of them", "better than")


def _beside_random(line: Mapping[str, Any]) -> dict[str, str]:
    cells = (
        with_deviation(percent(line["random_mean"]), percent(line["random_deviation"])),
        f"{percent(line['random_low'])} to {percent(line['random_high'])}",
        f"{percent(line['better_than'])} %",
    )
    return dict(zip(_COMPARED, cells, strict=True))


def format_selection(found: Selection, form: str) -> str:
    """Write the scores of a choice beside those of random ones.

    Args:
        found: The choice.
        form: One of `lmntk.analysis.table_blocks.FORMS`; CSV and JSON hold all digits, and fractions.
    """
    lines: list[dict[str, Any]] = [
        {"by": found.by, "k": found.k, "split": split, "score": value, "random_mean": found.random.scores[split].mean,
         "random_deviation": found.random.scores[split].deviation, "random_low": found.random.scores[split].low,
         "random_high": found.random.scores[split].high, "better_than": found.better_than[split]}
        for split, value in found.scores.items()
    ]  # fmt: skip
    if form == "csv":
        return as_csv(lines)
    if form == "json":
        return as_json({"by": found.by, "k": found.k, "examples": found.examples, "splits": lines})
    is_whole = any(map(math.isnan, found.better_than.values()))
    rows = [
        {
            "split": line["split"],
            f"by {found.by}": percent(line["score"]),
            **(dict.fromkeys(_COMPARED, UNKNOWN) if is_whole else _beside_random(line)),
        }
        for line in lines
    ]
    what = f"{len(found.examples)} examples, {found.k} of each class, chosen by {found.by}: {WAYS[found.by]}."
    draws = f"At random: the mean (standard deviation) of {quantity(found.random.draws, 'subset')} of as many."
    if is_whole:
        draws = "These are the whole pool, so that there is nothing to choose, and no other subset to compare with."
    notes = [what, draws]
    if found.by == "dev":
        notes.append("dev chose the examples, so that its score is no fair test of them: read that of test.")
    return format_blocks([Block(rows, ["split"])], notes, form)
