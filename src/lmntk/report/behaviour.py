"""The picture of whether the kernel describes fine-tuning: four scores of each task."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from lmntk.analysis.behaviour import BehaviourRow
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.report import plots

BARS = {
    "pretrained": ("PT, pre-trained", plots.COLOURS[7]),
    "kernel": ("K, kernel", plots.COLOURS[0]),
    "linearised": ("lin, linearised", plots.COLOURS[4]),
    "finetuned": ("FT, fine-tuned", plots.COLOURS[1]),
}
"""The bars of a task by the attributes of `SeedBehaviour`: name and colour."""
CONSTANT = "best constant prediction"
BAR = 0.2
GROUP_INCHES = 1.15
ALONE = 4  # most tasks for which the numbers are written on the bars


def behaviour_figure(rows: Sequence[BehaviourRow]) -> bytes:
    """Draw the scores of the pre-trained, kernel, linearised and fine-tuned model as bars, with sd over seeds.

    Args:
        rows: From `lmntk.analysis.behaviour.behaviour_row`, one for each group of bars.

    Returns:
        The bytes of a PNG.
    """
    return plots.as_png(behaviour_plot(rows), width=max(plots.WIDTH + 1, 1 + GROUP_INCHES * len(rows)))


def behaviour_plot(rows: Sequence[BehaviourRow]) -> plots.Draw:
    """Draw a group of four bars for each row, and its best constant prediction as a line."""
    middles = np.arange(len(rows))

    def draw(axes: Axes) -> None:
        for place, (name, (label, colour)) in enumerate(BARS.items()):
            means = [100 * row.mean(name) for row in rows]
            deviations = [100 * np.nan_to_num(row.deviation(name)) for row in rows]
            x = middles + (place - 1.5) * BAR
            bars = axes.bar(x, means, BAR, color=colour, label=label)
            spread = np.where(np.array(deviations) > 0, deviations, np.nan)
            axes.errorbar(x, means, yerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)
            if len(rows) <= ALONE:
                above = np.nan_to_num(deviations)
                for bar, value, offset in zip(bars, means, above, strict=True):
                    axes.annotate(
                        f"{value:.0f}", (bar.get_x() + BAR / 2, value + offset), (0, 2), textcoords="offset points",
                        ha="center", fontsize=9,
                    )  # fmt: skip
        for middle, row in zip(middles, rows, strict=True):
            axes.hlines(
                100 * row.mean("constant"), middle - 2 * BAR, middle + 2 * BAR, color="black", linestyle=":", lw=1.2,
                label=CONSTANT if middle == 0 else "",
            )  # fmt: skip
        metrics = dict.fromkeys(METRIC_NAMES.get(row.seeds[0].metric, row.seeds[0].metric) for row in rows)
        splits = dict.fromkeys(row.seeds[0].split for row in rows)
        axes.set_ylabel(f"{' or '.join(metrics)} on {' or '.join(splits)}, percent")
        _name_groups(axes, [row.name for row in rows])
        axes.set_ylim(*_limits(rows))
        axes.grid(axis="y", color="#DDDDDD")
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        bars_first = sorted(zip(labels, handles, strict=True), key=lambda entry: entry[0] == CONSTANT)
        axes.figure.legend(
            [handle for _, handle in bars_first], [label for label, _ in bars_first], loc="outside lower center",
            ncols=3 if len(rows) <= ALONE else 5, columnspacing=1.2, handlelength=1.2,
        )  # fmt: skip

    return draw


def _limits(rows: Sequence[BehaviourRow]) -> tuple[float, float]:
    """The ends of the scale: from 0 unless a score is negative, with room for the error bars."""
    ends = [(row.mean(name), np.nan_to_num(row.deviation(name))) for row in rows for name in BARS]
    low = min(100 * (mean - deviation) for mean, deviation in ends)
    high = max(100 * (mean + deviation) for mean, deviation in ends)
    return min(0.0, low - 5), high + 8


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Write the rows' names below their bars, slanted where they would touch."""
    shown = [plots.shortened(name, 24) for name in names]
    slanted = max(map(len, shown)) * plots.LETTER > GROUP_INCHES and len(names) > 1
    axes.set_xticks(
        range(len(names)), shown, rotation=25 if slanted else 0, ha="right" if slanted else "center",
        rotation_mode="anchor",
    )  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(names) - 0.4)
