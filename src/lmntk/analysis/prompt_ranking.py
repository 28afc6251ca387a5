"""Prompts ranked by what their kernels say without training: numbers of each, and their table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from lmntk.analysis import statistics
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.saved_run import SavedRun
from lmntk.analysis.scores import METRIC_NAMES, mean_residual, score
from lmntk.analysis.table_blocks import Block, Cells, as_csv, as_json, format_blocks, number, percent
from lmntk.data.metrics import mean_over_samples
from lmntk.solvers.problem import Array, predicted_classes

NUMBERS = ("loo", "loo_loss", "dev", "test", "zero_shot", "chi", "alignment")
"""The numbers of a prompt, by their fields."""

SMALLER_IS_BETTER = ("loo_loss", "chi")
RANKINGS = tuple(name for name in NUMBERS if name != "test")
"""What prompts can be ranked by; test is for looking at the ranking alone."""

COLUMNS: Mapping[str, str] = {
    "loo": "leave-one-out",
    "loo_loss": "its loss",
    "dev": "dev",
    "test": "test",
    "zero_shot": "zero-shot",
    "chi": "χ",
    "alignment": "alignment",
}


@dataclass(frozen=True)
class PromptNumbers:
    """What the kernel of a prompt says, mean over seeds; NaN where a number is not there.

    Attributes:
        template: The template.
        words: The label words.
        loo: The score of exact leave-one-out on train.
        loo_loss: Its mean squared error over examples and logits.
        dev: The kernel's score on dev.
        test: Its score on test.
        zero_shot: The score of the untrained logits on dev; where there is no dev, on train.
        chi: The mean of 1 − p_y on train at θ₀.
        alignment: The centred alignment of the train kernel with the labels.
    """

    template: str
    words: str
    loo: float
    loo_loss: float
    dev: float
    test: float
    zero_shot: float
    chi: float
    alignment: float


def prompt_numbers(template: str, words: str, runs: Sequence[SavedRun]) -> PromptNumbers:
    """Compute the numbers of a prompt from its kernel runs, one for each seed.

    Raises:
        UsageError: A file is missing or damaged, or the runs predict with another solver than `lstsq`.
    """
    found = [_numbers(run) for run in runs]
    means = {name: float(np.mean([numbers.get(name, math.nan) for numbers in found])) for name in NUMBERS}
    return PromptNumbers(template, words, **means)


def _numbers(run: SavedRun) -> dict[str, float]:
    fitted = read_least_squares(run, {})
    problem = fitted.problem
    found = {split: fitted.score(split, fitted.predict(split)) for split in fitted.x_splits}
    if problem.has_leave_one_out:
        left_out = predicted_classes(problem.leave_one_out())
        found["loo"] = score(run.task, "train", left_out, problem.classes)
        found["loo_loss"] = problem.leave_one_out_loss()
    untrained = {
        split: mean_over_samples(run.untrained_logits(split), len(fitted.classes(split)))
        for split in ("train", *(split for split in fitted.x_splits if split == "dev"))
    }
    split = "dev" if "dev" in untrained else "train"
    found["zero_shot"] = fitted.score(split, untrained[split])
    found["chi"] = mean_residual(untrained["train"], problem.classes)
    kernel = fitted.train.average_over_samples(statistics.logit_differences(fitted.train.values))
    found["alignment"] = _alignment(kernel, problem.classes)
    return found


def _alignment(kernel: Array, classes: statistics.Integers) -> float:
    one_hot = statistics.one_hot(classes, int(classes.max()) + 1)
    return statistics.alignment(kernel, one_hot @ one_hot.T)


def ranked(prompts: Sequence[PromptNumbers], by: str) -> list[PromptNumbers]:
    """Order prompts, the best first; of equal ones that with the smaller leave-one-out loss, NaN last.

    Args:
        prompts: The prompts.
        by: One of `RANKINGS`.
    """

    def place(prompt: PromptNumbers) -> tuple[bool, float, bool, float]:
        value, loss = float(getattr(prompt, by)), prompt.loo_loss
        size = value if by in SMALLER_IS_BETTER else -value
        unknown = math.isnan(value), math.isnan(loss)
        return unknown[0], 0.0 if unknown[0] else size, unknown[1], 0.0 if unknown[1] else loss

    return sorted(prompts, key=place)


def agreement_with_test(prompts: Sequence[PromptNumbers]) -> dict[str, float]:
    """Return `agreement_with` test."""
    return agreement_with(prompts, "test")


def agreement_with(prompts: Sequence[PromptNumbers], target: str) -> dict[str, float]:
    """Return Spearman's correlation over prompts of each number with a score, large for a good ranking.

    Args:
        prompts: The prompts.
        target: The field of the score: ``"test"`` or ``"dev"``.

    Returns:
        By number; those of which a correlation is not defined are left out.
    """
    found = {}
    test = np.array([getattr(prompt, target) for prompt in prompts])
    for name in RANKINGS:
        values = np.array([getattr(prompt, name) for prompt in prompts])
        both = np.isfinite(values) & np.isfinite(test)
        if both.sum() > 2 and len({*values[both]}) > 1 and len({*test[both]}) > 1:
            sign = -1 if name in SMALLER_IS_BETTER else 1
            found[name] = sign * float(spearmanr(values[both], test[both]).statistic)
    return found


def format_prompts(prompts: Sequence[PromptNumbers], by: str, form: str, metric: str, seeds: int) -> str:
    """Write a ranking.

    Args:
        prompts: From `ranked`.
        by: What they are ranked by.
        form: One of `lmntk.analysis.table_blocks.FORMS`; CSV and JSON hold all digits, and fractions.
        metric: The name of the scores, ``"acc"``.
        seeds: How many seeds each number is the mean of.
    """
    if form == "csv":
        return as_csv([{"rank": rank, **vars(prompt)} for rank, prompt in enumerate(prompts, start=1)])
    agreement = agreement_with_test(prompts)
    if form == "json":
        rows: list[Any] = [vars(prompt) for prompt in prompts]
        return as_json({"ranked_by": by, "metric": metric, "prompts": rows, "correlation_with_test": agreement})
    shown = [name for name in NUMBERS if any(math.isfinite(getattr(prompt, name)) for prompt in prompts)]
    rows = [_cells(rank, prompt, shown) for rank, prompt in enumerate(prompts, start=1)]
    name = METRIC_NAMES.get(metric, metric)
    notes = [
        f"Ranked by {COLUMNS[by]}. {name[0].upper()}{name[1:]} in percent"
        + (f", means over {seeds} seeds" if seeds > 1 else "")
        + "; zero-shot: of the model as it is; χ: the mean of 1 − p_y on train there; alignment: of the train kernel "
        "with the labels.",
    ]
    if "loo" not in shown:
        notes.append("Leave-one-out is not defined for singular kernels: give `kernel_regularization` to all runs.")
    if agreement:
        known = ", ".join(f"{COLUMNS[name]} {value:.2f}" for name, value in agreement.items())
        notes.append(f"Spearman's correlation over the prompts with test (1: the same order): {known}.")
    return format_blocks([Block(rows, ["template", "label words"])], notes, form)


def _cells(rank: int, prompt: PromptNumbers, shown: Sequence[str]) -> Cells:
    cells = {"": str(rank), "template": prompt.template, "label words": prompt.words}
    for name in shown:
        value = getattr(prompt, name)
        cells[COLUMNS[name]] = number(value) if name in ("loo_loss", "chi", "alignment") else percent(value)
    return cells
