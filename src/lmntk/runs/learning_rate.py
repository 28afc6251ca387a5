"""The learning rate of a training, chosen on dev among those of a stated grid."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmntk.errors import DataError, SettingError, UnknownNameError, suggest
from lmntk.runs.log import LogEntry, metric_keys, task_of

DEFAULT_RATES = {
    "sgd": ("1e-4", "1e-3", "1e-2", "1e-1"),
    "signgd": ("1e-6", "1e-5", "1e-4", "1e-3"),
    "adam": ("1e-5", "1e-4", "1e-3"),
}
"""The grid of each optimizer where the user gives none.

A step of SignGD moves every parameter by the learning rate, a step of Adam by about as much; a step of SGD moves it by
the learning rate times a gradient, which is far below 1.
"""

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class ChosenRate:
    """The learning rate that is best on dev.

    Attributes:
        rate: The learning rate as it was written.
        score: Its metric on dev.
        ties: The larger learning rates with the same metric.
        scores: The metric of each learning rate, NaN for a training that diverged.
    """

    rate: str
    score: float
    ties: tuple[str, ...]
    scores: Mapping[str, float]

    def __str__(self) -> str:
        """Say what was chosen among what, and why among equals."""
        if len(self.scores) == 1:
            return f"learning rate {self.rate}, the only one"
        sentence = f"learning rate {self.rate}, the best of {', '.join(self.scores)} on dev ({self.score:.4g})"
        if self.ties:
            verb = "has" if len(self.ties) == 1 else "have"
            sentence += f"; {', '.join(self.ties)} {verb} the same score, and the smallest counts"
        return sentence


def choose_rate(scores: Mapping[str, float]) -> ChosenRate:
    """Choose the learning rate with the best metric on dev; of equal ones the smallest.

    Args:
        scores: The metric of each learning rate as it was written; NaN is worse than any number.

    Raises:
        DataError: No training has a metric that is a number; data: ``scores``.

    Examples:
        >>> print(choose_rate({"0.1": 0.75, "0.2": 0.875, "0.4": 0.875}))
        learning rate 0.2, the best of 0.1, 0.2, 0.4 on dev (0.875); 0.4 has the same score, and the smallest counts
    """
    numbers = {rate: score for rate, score in scores.items() if not math.isnan(score)}
    if not numbers:
        tried = f"the learning rates {', '.join(scores)}" if scores else "no learning rate"
        sentence = f"no training has a metric on dev to choose by, of {tried}: give smaller learning rates"
        raise DataError(sentence, scores=dict(scores))
    best = max(numbers.values())
    rate, *ties = sorted((rate for rate, score in numbers.items() if score == best), key=float)
    return ChosenRate(rate, best, tuple(ties), dict(scores))


def dev_score(entry: LogEntry) -> float:
    """Return the main metric on dev of a run's record or line of the log; NaN if it is missing or not a number."""
    task = task_of(entry)
    value = entry.get(metric_keys(task, task).dev or "")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def read_rates(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read ``optimizer=rate,rate``; an optimizer that is not named has its default grid.

    Args:
        words: One for each optimizer that has another grid.

    Returns:
        The learning rates of every optimizer of `DEFAULT_RATES`, as they are written.

    Raises:
        UnknownNameError: There is no such optimizer.
        SettingError: A rate is not a number above 0, or is given twice.

    Examples:
        >>> read_rates(["sgd=1e-3,1e-2"])["sgd"]
        ('1e-3', '1e-2')
    """
    rates = dict(DEFAULT_RATES)
    for word in words:
        name, _, text = word.partition("=")
        if name not in rates:
            raise UnknownNameError(suggest(name, rates, "optimizer"), name=name, kind="optimizer", options=[*rates])
        rates[name] = tuple(text.split(","))
        numbers = {float(rate) for rate in rates[name] if _NUMBER.fullmatch(rate)}
        if len(numbers) < len(rates[name]) or min(numbers) <= 0:
            sentence = f"`learning_rates={word}`: give different numbers above 0, as in sgd=1e-3,1e-2"
            raise SettingError(sentence, setting="learning_rates", value=word)
    return rates
