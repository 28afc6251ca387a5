"""The picture of subsets of the parameters: how each one predicts, and how many parameters that takes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.subset_choice import WHOLE
from lmntk.analysis.subsets import SubsetNumbers
from lmntk.report import plots

LINE = 0.19  # height of a bar with its name, in inches
WIDTH = 5.2


def subsets_figure(found: Sequence[SubsetNumbers], metric: str) -> bytes:
    """Draw the scores of subsets as bars, and against their numbers of parameters.

    Args:
        found: From `lmntk.analysis.subsets.measure_subsets`.
        metric: The main metric of the task.

    Returns:
        The bytes of a PNG: bars in the order of the table, and points on a logarithmic scale of parameters.
    """
    shown = [subset for subset in found if subset.scores]
    split = list(shown[0].scores)[-1]
    groups = list(dict.fromkeys(subset.group for subset in shown))
    colour = {group: plots.COLOURS[(place - 1) % len(plots.COLOURS)] for place, group in enumerate(groups)} | {
        "": "black"
    }
    label = f"{METRIC_NAMES.get(metric, metric)} on {split}, percent"
    whole = next((100 * subset.scores[split] for subset in shown if subset.name == WHOLE), None)

    def bars(axes: Axes) -> None:
        places = np.arange(len(shown))
        scores = [100 * subset.scores[split] for subset in shown]
        axes.barh(places, scores, color=[colour[subset.group] for subset in shown], height=0.7)
        loo = [100 * subset.loo_score for subset in shown]
        if np.isfinite(loo).any():
            axes.plot(loo, places, "D", color="white", mec="black", ms=3.5)
        axes.set_yticks(places, [subset.name for subset in shown], fontsize=8)
        axes.set_xlim(left=max(0, min([*scores, *(value for value in loo if np.isfinite(value))]) - 5))
        axes.set(xlabel=label, ylim=(len(shown) - 0.4, -0.6))

    def points(axes: Axes) -> None:
        for group in groups:
            own = [subset for subset in shown if subset.group == group and subset.parameters]
            sizes, scores = [one.parameters or 0 for one in own], [100 * one.scores[split] for one in own]
            marker = plots.MARKERS[groups.index(group) % len(plots.MARKERS)]
            axes.scatter(sizes, scores, color=colour[group], marker=marker, s=26, label=group or WHOLE, zorder=3)
        if whole is not None:
            axes.axhline(whole, color="black", lw=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set(xlabel="parameters", ylabel=label)
        axes.legend(fontsize=8)

    height = max(plots.HEIGHT, LINE * len(shown) + 0.8)
    titles = (f"{split} (bars), leave-one-out (diamonds)", "against the number of parameters")
    return plots.as_png(bars, points, titles=titles, height=height, width=WIDTH)
