"""The picture of subsets of the parameters: how each one predicts, and how many parameters that takes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lmntk.analysis.parameter_subsets import WHOLE
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.subsets import SubsetNumbers
from lmntk.report import plots

LINE = 0.19  # height of a subset with its name, in inches
WIDTH = 5.2


def subsets_figure(found: Sequence[SubsetNumbers], metric: str) -> bytes:
    """Draw the scores of subsets in the order of the table, and against their numbers of parameters.

    Args:
        found: From `lmntk.analysis.subsets.measure_subsets`.
        metric: The main metric of the task.

    Returns:
        The bytes of a PNG: points in the order of the table, and points on a logarithmic scale of parameters. They are
        of test, else of dev, and of leave-one-out; of a run with train alone, of leave-one-out alone.
    """
    split, name = next((list(one.scores)[-1] for one in found if one.scores), ""), METRIC_NAMES.get(metric, metric)
    shown = [subset for subset in found if subset.scores or np.isfinite(subset.loo_score)]
    groups = list(dict.fromkeys(subset.group for subset in shown))
    colour = {group: plots.COLOURS[(place - 1) % len(plots.COLOURS)] for place, group in enumerate(groups)} | {
        "": "black"
    }
    label = f"{name} on {split}, percent" if split else f"{name} of leave-one-out, percent"
    whole = [score_of(subset, split) for subset in shown if subset.name == WHOLE]

    def in_order(axes: Axes) -> None:
        places = np.arange(len(shown))
        axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color="#E4E4E4", lw=0.8, zorder=0)
        if split:
            axes.scatter([score_of(one, split) for one in shown], places, s=26, c=[colour[one.group] for one in shown])
        axes.plot([100 * one.loo_score for one in shown], places, "D", color="white", mec="black", ms=3.5)
        axes.set_yticks(places, [subset.name for subset in shown], fontsize=8)
        axes.set(xlabel=f"{name}, percent" if split else label, ylim=(len(shown) - 0.4, -0.6))

    def by_size(axes: Axes) -> None:
        for group in groups:
            own = [subset for subset in shown if subset.group == group and subset.parameters]
            sizes, scores = [one.parameters or 0 for one in own], [score_of(one, split) for one in own]
            marker = plots.MARKERS[groups.index(group) % len(plots.MARKERS)]
            axes.scatter(sizes, scores, color=colour[group], marker=marker, s=26, label=group or WHOLE, zorder=3)
        for value in whole:
            axes.axhline(value, color="black", lw=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set(xlabel="parameters", ylabel=label)
        if groups:
            axes.legend(fontsize=8)

    height = max(plots.HEIGHT, LINE * len(shown) + 0.8)
    first = f"{split} (points), leave-one-out (diamonds)" if split else "leave-one-out"
    titles = (first, "against the number of parameters")
    return plots.as_png(in_order, by_size, titles=titles, height=height, width=WIDTH)


def score_of(subset: SubsetNumbers, split: str) -> float:
    """Return the score on a split in percent, that of leave-one-out if it is empty; NaN where there is none."""
    return 100 * (subset.scores.get(split, np.nan) if split else subset.loo_score)
