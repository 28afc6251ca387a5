"""The pictures of prompts ranked without training, and of examples chosen from a pool."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lmntk.analysis.example_selection import Selection
from lmntk.analysis.prompt_ranking import COLUMNS, PromptNumbers, agreement_with
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.report import plots

HEIGHT = 3.3


def prompts_figure(found: Sequence[PromptNumbers], metric: str) -> bytes:
    """Draw numbers of prompts against the score on test, or on dev where test was not predicted.

    Args:
        found: The prompts.
        metric: The main metric of the task.

    Returns:
        The bytes of a PNG: leave-one-out's loss and score, and dev where test is there, a point for each prompt, with
        Spearman's correlation, which is large for a good ranking.
    """
    target = "test" if any(np.isfinite(prompt.test) for prompt in found) else "dev"
    shown = ("loo_loss", "loo", "dev")[: 3 if target == "test" else 2]
    order, name = agreement_with(found, target), METRIC_NAMES.get(metric, metric)
    titles = [f"Spearman's ρ = {order[number]:.2f}" if number in order else "" for number in shown]
    return plots.as_png(*(_against(found, number, target, name) for number in shown), titles=titles, height=HEIGHT)


def _against(found: Sequence[PromptNumbers], number: str, target: str, metric: str) -> plots.Draw:
    unit = 1 if number == "loo_loss" else 100
    of = "on" if number == "dev" else "of"
    label = "loss of leave-one-out" if number == "loo_loss" else f"{metric} {of} {COLUMNS[number]}, percent"

    def draw(axes: Axes) -> None:
        points = np.array([(unit * getattr(one, number), 100 * getattr(one, target)) for one in found])
        axes.scatter(points[:, 0], points[:, 1], color=plots.COLOURS[0], s=30)
        axes.set(xlabel=label, ylabel=f"{metric} on {target}, percent")

    return draw


def selection_figure(found: Selection, metric: str) -> bytes:
    """Draw the scores of chosen examples beside those of random subsets.

    Args:
        found: The choice.
        metric: The main metric of the task.

    Returns:
        The bytes of a PNG: for each split the interval of 95 % of the random subsets, their mean, and the choice.
    """
    splits = list(found.scores)

    def draw(axes: Axes) -> None:
        places = np.arange(len(splits))
        spreads = [found.random.scores[split] for split in splits]
        low, mean, high = ([100 * getattr(spread, name) for spread in spreads] for name in ("low", "mean", "high"))
        axes.hlines(places, low, high, color=plots.COLOURS[7], lw=5, alpha=0.5, label="95 % of random subsets")
        axes.plot(mean, places, "|", color="black", ms=12, label="their mean")
        chosen = [100 * found.scores[split] for split in splits]
        axes.plot(chosen, places, "D", color=plots.COLOURS[1], ms=7, label=f"by {found.by}")
        axes.set_yticks(places, splits)
        axes.set(xlabel=f"{METRIC_NAMES.get(metric, metric)}, percent", ylim=(len(splits) - 0.5, -0.5))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)

    title = f"{found.k} of each class, {found.random.draws} random subsets"
    return plots.as_png(draw, titles=(title,), height=HEIGHT, width=5.0)
