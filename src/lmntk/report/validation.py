"""The picture of a validation: predicted against trained changes, and the correlation of each example."""

import numpy as np
from matplotlib.axes import Axes

from lmntk.analysis.validation import ADDED, RESOLVED, Validation
from lmntk.report import plots

NAMES = {RESOLVED: "kernel solved again", ADDED: "leave-one-out added"}
MOST_POINTS = 4000
BINS = np.linspace(-1, 1, 41).tolist()


def validation_figure(found: Validation) -> bytes:
    """Draw predicted and trained changes of the outputs, and a histogram of the examples' correlations.

    Args:
        found: From `lmntk.analysis.validation.validate`.

    Returns:
        The bytes of a PNG with two pictures.
    """
    return plots.as_png(_changes(found), _correlations(found), titles=("changes of outputs", "each example"))


def _changes(found: Validation) -> plots.Draw:
    """Draw outputs less their mean over subsets, over the standard deviation of all; of many a random part."""
    shown = np.random.default_rng(0).permutation(found.real.size)[:MOST_POINTS]
    trained, predicted = (_in_deviations(outputs)[shown] for outputs in (found.real, found.predicted[RESOLVED]))

    def draw(axes: Axes) -> None:
        axes.scatter(predicted, trained, s=6, alpha=0.25, color=plots.COLOURS[0], linewidths=0)
        end = max(1.0, float(np.quantile(np.abs([predicted, trained]), 0.996)))
        axes.plot([-end, end], [-end, end], color="black", linewidth=1, linestyle=":")
        axes.set(
            xlim=(-end, end),
            ylim=(-end, end),
            xlabel="kernel solved again, in deviations",
            ylabel=f"{found.trainings.optimizer}, in deviations",
        )
        axes.set_aspect("equal")

    return draw


def _correlations(found: Validation) -> plots.Draw:
    def draw(axes: Axes) -> None:
        for (name, label), colour in zip(NAMES.items(), plots.COLOURS, strict=False):
            if name in found.kinds:
                kind = found.kinds[name].of_outputs
                numbers = kind.correlations[np.isfinite(kind.correlations)]
                axes.hist(numbers, BINS, histtype="step", linewidth=1.6, color=colour, label=label)
                axes.axvline(kind.score, color=colour, linewidth=1.2, linestyle="--")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlim=(-1, 1), xlabel="Spearman's correlation over subsets", ylabel=f"examples of {found.split}")
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.06), handlelength=1.2)

    return draw


def _in_deviations(outputs: np.ndarray) -> np.ndarray:
    """Outputs ``[m, X]`` less their mean over subsets, in units of the standard deviation of all, as one row."""
    changes = (outputs - outputs.mean(axis=0)).reshape(-1)
    deviation = changes.std()
    return changes / deviation if deviation > 0 else changes
