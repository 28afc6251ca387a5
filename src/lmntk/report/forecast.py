"""The picture of a forecast: scores against the number of examples, losses and scores against the step."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from lmntk.analysis.forecast_tables import LOSS_NAMES, Forecast
from lmntk.analysis.scores import METRIC_NAMES
from lmntk.analysis.training_forecast import StepNumbers, TrainingForecast
from lmntk.report import plots

COLOUR_OF = {"train": plots.COLOURS[2], "dev": plots.DEV, "test": plots.TEST}
STYLES = ("-", "--")
HEIGHT = 3.6


def forecast_figure(found: Forecast) -> bytes:
    """Draw a forecast; a real training and real kernels are drawn as points.

    Args:
        found: The forecast.

    Returns:
        The bytes of a PNG: the scores against k, for each loss its course, and the scores against the step.
    """
    metric = METRIC_NAMES.get(found.metric, found.metric)
    pictures, titles = [_curve(found, metric)], ["fewer examples"]
    for training in found.trainings:
        pictures.append(_losses(training, found.real))
        titles.append(LOSS_NAMES[training.loss])
    if any(_without_train(training.steps[0]) for training in found.trainings):
        pictures.append(_scores(found, metric))
        titles.append(f"{metric} while it trains")
    return plots.as_png(*pictures, titles=titles, columns=2 if len(pictures) == 4 else None, height=HEIGHT)


def _curve(found: Forecast, metric: str) -> plots.Draw:
    def draw(axes: Axes) -> None:
        ks = [point.k for point in found.curve]
        for split in found.curve[0].scores if found.curve else ():
            spreads = [point.scores[split] for point in found.curve]
            colour = COLOUR_OF.get(split, plots.COLOURS[3])
            low, high = ([100 * getattr(spread, end) for spread in spreads] for end in ("low", "high"))
            axes.fill_between(ks, low, high, color=colour, alpha=0.18, lw=0)
            axes.plot(ks, [100 * spread.mean for spread in spreads], color=colour, marker="o", ms=4, label=split)
            real = [(one.k, 100 * one.scores[split]) for one in found.kernels if split in one.scores]
            if real:
                axes.scatter(*_places(real), color=colour, marker="D", s=26, edgecolors="black", lw=0.7,
                             zorder=3, label=f"real kernels, {split}")  # fmt: skip
        left_out = [100 * point.left_out_score.mean for point in found.curve]
        if np.isfinite(left_out).any():
            axes.plot(ks, left_out, color=plots.COLOURS[7], linestyle="--", marker="s", ms=3.5, label="leave-one-out")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        _finish(axes, "k, examples of each class", f"{metric}, percent")

    return draw


def _losses(training: TrainingForecast, real: Sequence[StepNumbers]) -> plots.Draw:
    def draw(axes: Axes) -> None:
        steps = [each.step for each in training.steps]
        top = 1.3 * max(each.losses[split] for each in training.steps[:1] for split in each.losses)
        for split in training.steps[0].losses:
            colour = COLOUR_OF.get(split, plots.COLOURS[3])
            axes.plot(steps, [each.losses[split] for each in training.steps], color=colour, label=split)
            there = [(each.step, each.losses[split]) for each in real if split in each.losses]
            if there:
                axes.scatter(*_places(there), color=colour, marker="D", s=22, label=f"real, {split}")
                top = max(top, *(1.1 * value for _, value in there if value < 2 * top))
        axes.set_ylim(0, top)
        _finish(axes, "step", LOSS_NAMES[training.loss])

    return draw


def _scores(found: Forecast, metric: str) -> plots.Draw:
    def draw(axes: Axes) -> None:
        for training, style in zip(found.trainings, STYLES, strict=False):
            steps = [each.step for each in training.steps]
            for split in _without_train(training.steps[0]):
                label = split if len(found.trainings) == 1 else f"{split}, {LOSS_NAMES[training.loss]}"
                values = [100 * each.scores[split] for each in training.steps]
                axes.plot(steps, values, color=COLOUR_OF.get(split, plots.COLOURS[3]), linestyle=style, label=label)
        for split in _without_train(found.real[0]) if found.real else ():
            there = [(each.step, 100 * each.scores[split]) for each in found.real if split in each.scores]
            axes.scatter(*_places(there), color=COLOUR_OF.get(split, plots.COLOURS[3]), marker="D", s=22,
                         label=f"real, {split}")  # fmt: skip
        best = found.trainings[0].best if len(found.trainings) == 1 else None
        if best is not None:
            axes.axvline(best.step, color="#777777", linestyle=":", label="dev is best")
        _finish(axes, "step", f"{metric}, percent")

    return draw


def _without_train(found: StepNumbers) -> list[str]:
    return [split for split in found.scores if split != "train"]


def _places(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(axes: Axes, across: str, up: str) -> None:
    axes.set(xlabel=across, ylabel=up)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color="#DDDDDD")
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:  # a run of train alone may have nothing to draw
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2, handlelength=2.0)
