"""The picture of how far a training moves from its linearisation and its kernel."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lmntk.analysis.drift import Drift
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.report import plots

TITLES = ("the model and its linearisation", "distance of the linearisation", "distance of the kernel", "the kernel")
LEAST_GAP = 0.08  # of the axis, between the numbers of two steps
SHOWN = (-0.5, 1.5)  # ends of the recovery that is drawn: it explodes where the model has gained nothing yet
BLUE, RED, GREEN, PINK = plots.COLOURS[:4]
HEIGHT = 3.9
Lines = Mapping[str, tuple[Sequence[float] | np.ndarray, Mapping[str, str]]]
"""Lines by their labels: a value for each step, and how they are drawn."""


def drift_figure(drift: Drift) -> bytes:
    """Draw the scores, the distances of the linearisation and of the kernel, and the kernel's alignment and rank.

    Args:
        drift: A training, or the mean of several.

    Returns:
        The bytes of a PNG: four pictures, or two without kernels, over the step on a logarithmic scale from 0 on.
    """
    pictures = [_scores(drift), _linearisation(drift)]
    if any(step.distances for step in drift.steps):
        pictures += [_distances(drift), _kernel(drift)]
    return plots.as_png(*pictures, titles=TITLES, columns=2, height=HEIGHT)


def _scores(drift: Drift) -> plots.Draw:
    lines = {}
    for split, marker in ((drift.split, "o"), ("dev", "s"), ("test", "D")):
        if split in drift.steps[0].scores and f"f, {split}" not in lines:
            colour = RED if split == drift.split else plots.COLOURS[5]
            for name, kind, style in (("f", "scores", "-"), ("lin", "linearised_scores", "--")):
                values = [100 * getattr(step, kind)[split] for step in drift.steps]
                lines[f"{name}, {split}"] = (values, {"color": colour, "linestyle": style, "marker": marker})
    return _lines(drift, lines, f"{METRIC_NAMES.get(drift.metric, drift.metric)}, percent")


def _linearisation(drift: Drift) -> plots.Draw:
    recovery = np.array([step.recovery for step in drift.steps])
    within = np.where((recovery >= SHOWN[0]) & (recovery <= SHOWN[1]), recovery, np.nan)
    lines: Lines = {
        "recovery": (within, {"color": RED, "marker": "D", "linestyle": ":"}),
        "‖f − lin‖ / ‖f − f₀‖": ([step.logits_distance for step in drift.steps], {"color": BLUE, "marker": "o"}),
        "equal predictions": ([step.equal_predictions for step in drift.steps], {"color": GREEN, "marker": "s"}),
    }
    return _lines(drift, lines, f"on {drift.split}")


def _distances(drift: Drift) -> plots.Draw:
    styles = {
        "mean |ΔK| / |K₀|": ("mean", {"color": RED, "marker": "D"}),
        "median": ("median", {"color": PINK, "marker": "s", "linestyle": "--"}),
        "‖ΔK‖ / ‖K₀‖": ("frobenius", {"color": BLUE, "marker": "o"}),
    }
    found = [step.distances for step in drift.steps]
    lines = {
        label: ([getattr(one, name) if one else np.nan for one in found], style)
        for label, (name, style) in styles.items()
    }
    lines["1 − CKA"] = ([1 - one.cka if one else np.nan for one in found], {"color": GREEN, "marker": "^"})
    return _lines(drift, lines, "train × train")


def _kernel(drift: Drift) -> plots.Draw:
    lines = {
        "alignment with labels": ([step.alignment for step in drift.steps], {"color": BLUE, "marker": "o"}),
        "signs against gradient": ([step.sign_share for step in drift.steps], {"color": GREEN, "marker": "^"}),
    }
    ranks = [step.effective_rank for step in drift.steps]

    def draw(axes: Axes) -> None:
        right = axes.twinx()
        right.plot(_steps(drift), ranks, color=RED, marker="s", ms=4.5, linestyle="--", label="effective rank (right)")
        right.set_ylim(bottom=0)
        right.spines["right"].set_visible(True)
        _lines(drift, lines, "share")(axes)
        axes.set_ylim(min(0.0, *np.nan_to_num([step.alignment for step in drift.steps])), 1.05)
        handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (axes, right)), strict=True))
        _legend(axes, handles, labels)

    return draw


def _lines(drift: Drift, lines: Lines, name: str) -> plots.Draw:
    """Draw lines over the steps; those without a number are left out."""

    def draw(axes: Axes) -> None:
        for label, (values, style) in lines.items():
            if np.isfinite(values).any():
                axes.plot(_steps(drift), values, label=label, ms=4.5, **style)  # type: ignore[arg-type]
        axes.set(xlabel="step", ylabel=name)
        axes.set_xscale("symlog", linthresh=1, linscale=0.5)
        axes.set_xlim(left=-0.15)
        ticks = _ticks(axes, _steps(drift))
        axes.set_xticks(ticks, [str(step) for step in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color="#DDDDDD")
        axes.set_axisbelow(True)
        _legend(axes, *axes.get_legend_handles_labels())

    return draw


def _legend(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Write the legend below the axes, where no line passes."""
    if handles:
        axes.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2,
            handlelength=2.4,
        )  # fmt: skip


def _steps(drift: Drift) -> list[int]:
    return [step.step for step in drift.steps]


def _ticks(axes: Axes, steps: Sequence[int]) -> list[int]:
    """Choose the steps whose numbers do not touch: the first, the last, and those between with room on both sides."""
    places = axes.transAxes.inverted().transform(axes.transData.transform([(step, 0) for step in steps]))[:, 0]
    kept = [0]
    for index in range(1, len(steps) - 1):
        if places[index] - places[kept[-1]] >= LEAST_GAP and places[-1] - places[index] >= LEAST_GAP:
            kept.append(index)
    return [steps[index] for index in [*kept, len(steps) - 1]]
