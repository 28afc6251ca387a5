"""The pictures of a report: each function takes numbers and returns a function that draws on axes; see `as_png`.

Class colours are those of Okabe and Ito (2008), which colour-blind readers can distinguish, with markers; shades are
those of cividis. Sizes suit pictures shown 400 to 500 pixels wide, four inches here, with letters of about ten points.
"""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from lmntk.analysis.statistics import Components, Spectrum
from lmntk.solvers.calibration import ReliabilityBin
from lmntk.solvers.problem import Array, ClassIds

Draw = Callable[[Axes], None]

WIDTH, HEIGHT = 4.0, 3.3
DPI = 144
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A8A8A")
MARKERS = "osD^vPX*"
DEV, TEST = COLOURS[5], COLOURS[0]
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "axes.formatter.use_mathtext": True,
}
LONGEST_NAME = 18
LETTER = 0.076  # mean width of a letter of ten points, in inches
LINE, SLANTED, AXES_INCHES = 0.17, 0.26, 2.0  # distance of lines, of slanted lines, and length of an axis, in inches
NAMED, WRITTEN_OUT, LINED = 12, 12, 20  # most classes for a legend, for written counts, for lines between blocks


def as_png(
    *draws: Draw, titles: Sequence[str] = (), height: float = HEIGHT, width: float = WIDTH, columns: int | None = None
) -> bytes:
    """Draw pictures side by side, or in rows, and return the bytes of a PNG.

    Args:
        *draws: Draw one picture each.
        titles: The titles of the pictures, if any.
        height: The height of a picture in inches.
        width: The width of a picture in inches.
        columns: How many pictures a row has; None: all. The last row is full.
    """
    file = io.BytesIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page has the text.
        warnings.filterwarnings("ignore", message=".*missing from font")
        across = columns or len(draws)
        rows = len(draws) // across
        layout = ConstrainedLayoutEngine(wspace=0.06)
        figure = Figure(figsize=(width * across, height * rows), dpi=DPI, layout=layout)
        for axes, draw in zip(np.ravel(figure.subplots(rows, across)), draws, strict=True):
            draw(axes)
        for axes, title in zip(figure.axes, titles, strict=False):
            axes.set_title(title, pad=14)
        # Drawn labels are wider than expected and move squares: the layout settles when drawn the third time.
        figure.draw_without_rendering()
        figure.draw_without_rendering()
        figure.savefig(file, metadata={"Software": None}, bbox_inches="tight", pad_inches=0.06)
    return file.getvalue()


def heat_map(
    matrix: Array, rows: ClassIds, columns: ClassIds, names: Sequence[str], sides: tuple[str, str] = ("train", "train")
) -> Draw:
    """Draw a kernel as shades, examples sorted by label.

    Args:
        matrix: The kernel, [N, X].
        rows: Class ids of the rows, [N].
        columns: Class ids of the columns, [X].
        names: The names of the classes.
        sides: The names of rows and columns.
    """
    down, across = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
    shown = matrix[np.ix_(down, across)]
    # In many kernels the diagonal, or single examples, are far above all other values.
    square = matrix.shape[0] == matrix.shape[1] and sides[0] == sides[1]
    between = shown[~np.eye(len(shown), dtype=bool)] if square and len(shown) > 1 else shown
    low, high = np.percentile(between, [1, 99])

    def draw(axes: Axes) -> None:
        image = axes.imshow(
            shown, cmap="cividis", vmin=low, vmax=high, aspect="equal" if square else "auto", interpolation="nearest"
        )
        _name_blocks(axes, columns, names, across=True)
        _name_blocks(axes, rows, names, across=False)
        axes.set(xlabel=sides[1], ylabel=sides[0])
        axes.spines[:].set_visible(False)
        extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}
        beyond = bool(shown.min() < low), bool(shown.max() > high)
        shades = ScalarFormatter(useMathText=True)
        shades.set_powerlimits((-2, 4))
        bar = axes.figure.colorbar(
            image, ax=axes, extend=extend[beyond], fraction=0.05, pad=0.03, ticks=MaxNLocator(5), format=shades
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=9)

    return draw


def spectrum_plot(spectrum: Spectrum, lowest: float) -> Draw:
    """Draw singular values over the largest, on a logarithmic scale.

    Args:
        spectrum: The singular values.
        lowest: The lower end of the scale.
    """
    values = spectrum.values / (spectrum.values[0] or 1)

    def draw(axes: Axes) -> None:
        index = np.arange(1, len(values) + 1)
        axes.plot(index, np.maximum(values, lowest / 10), color=TEST, marker="o" if len(values) <= 64 else "", ms=3.5)
        axes.axvline(spectrum.effective_rank, color=COLOURS[1], linestyle="--")
        # On the side of the line that has more room.
        left = spectrum.effective_rank > len(values) / 2
        axes.annotate(
            f"effective rank {spectrum.effective_rank:.1f}", (spectrum.effective_rank, 1), (-5 if left else 5, 0),
            xycoords=("data", "axes fraction"), textcoords="offset points", color="#A64700", va="top",
            ha="right" if left else "left",
        )  # fmt: skip
        axes.set(yscale="log", ylim=(lowest, 2), xlabel="singular value, largest first", ylabel="share of the largest")
        axes.set_xlim(0, len(values) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return draw


def components_plot(
    components: Components, train: ClassIds, others: ClassIds, names: Sequence[str], split: str
) -> Draw:
    """Draw examples on the first two principal axes: train large with an edge, the others small.

    Args:
        components: From `lmntk.analysis.statistics.kernel_components`.
        train: Class ids of the training examples, [N].
        others: Class ids of the other examples, [X].
        names: The names of the classes.
        split: The split of the other examples.
    """

    def draw(axes: Axes) -> None:
        for label in range(len(names)):
            colour, marker = COLOURS[label % 8], MARKERS[(label + label // 8) % 8]
            x, y = components.others[others == label].T
            axes.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.45, lw=0)
            x, y = components.train[train == label].T
            axes.scatter(
                x, y, s=52, color=colour, marker=marker, edgecolors="black", lw=0.9, zorder=3,
                label=shortened(names[label]),
            )  # fmt: skip
        axes.set_xlabel(f"first axis ({components.shares[0]:.0%} of train's variance)")
        axes.set_ylabel(f"second ({components.shares[1]:.0%})")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(scilimits=(-2, 4))
        if len(names) > NAMED:
            return
        if len(axes.figure.axes) > 1:  # beside others there is no room below
            axes.legend(handletextpad=0.2)
            return
        axes.figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", handletextpad=0.2, columnspacing=1.2,
            ncols=2 if len(names) <= 4 or max(map(len, names)) > 10 else 3,
            title=f"outlined: train; small: {split}", title_fontsize=9.5,
        )  # fmt: skip

    return draw


def confusion_plot(counts: ClassIds, names: Sequence[str], split: str) -> Draw:
    """Draw a confusion matrix: counts, on shades of each label's shares.

    Args:
        counts: Numbers of examples, [label, prediction].
        names: The names of the classes.
        split: The split of the examples.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def draw(axes: Axes) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if len(names) <= WRITTEN_OUT:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if shares[row, column] > 0.5 else "black"
                size = 12 if len(names) <= 4 else 9
                axes.text(column, row, f"{count:d}", ha="center", va="center", color=colour, size=size)
        every = np.arange(len(names))
        _name_blocks(axes, every, names, across=True)
        _name_blocks(axes, every, names, across=False)
        axes.set(xlabel="predicted", ylabel=f"label, {split}")
        axes.spines[:].set_visible(False)

    return draw


def scores_plot(labels: Array | ClassIds, predicted: Array | ClassIds, split: str) -> Draw:
    """Draw predicted scores of a regression task against the labels."""

    def draw(axes: Axes) -> None:
        axes.scatter(labels, predicted, s=14, color=TEST, alpha=0.5, lw=0)
        ends = [float(labels.min()), float(labels.max())]
        axes.plot(ends, ends, color="#555555", linestyle=":", label="right")
        axes.set(xlabel=f"label, {split}", ylabel="predicted")
        axes.legend()

    return draw


def curve_plot(
    values: Sequence[float], scores: Mapping[str, Sequence[float]], own: float, metric: str, limits: tuple[float, float]
) -> Draw:
    """Draw scores in percent against λ on a logarithmic scale, with 0 at its left end.

    Args:
        values: λ, ascending.
        scores: By split, one score for each λ.
        own: The run's λ, which is marked.
        metric: The name of the scores.
        limits: The ends of the scale, in percent.
    """
    positive = [value for value in values if value > 0] or [1.0]
    zero = 10 ** (math.floor(math.log10(min(positive))) - 2.0)
    places = [value or zero for value in values]
    colours = {"dev": DEV, "test": TEST}

    def draw(axes: Axes) -> None:
        axes.axvline(own or zero, color="#777777", linestyle=":", label=f"λ of the run, {own:g}")
        for split, line in scores.items():
            dashed = split != "test"
            axes.plot(
                places, [100 * value for value in line], color=colours.get(split, COLOURS[2]),
                marker="s" if dashed else "o", ms=4.5, linestyle="--" if dashed else "-", label=split,
            )  # fmt: skip
        axes.set(xscale="log", ylim=limits, xlabel="λ, regularisation", ylabel=f"{metric} in percent")
        powers = range(round(math.log10(zero)) + 2, math.ceil(math.log10(max(positive))) + 1)
        ticks = [10.0**power for power in powers if power % 2 == 0]
        axes.set_xticks([zero, *ticks], ["0", *(_power(tick) for tick in ticks)])
        axes.minorticks_off()
        axes.grid(axis="y", color="#DDDDDD")
        axes.set_axisbelow(True)
        axes.legend()

    return draw


def reliability_plot(bins: Sequence[ReliabilityBin], split: str) -> Draw:
    """Draw the accuracy of the examples in each bin of confidence, with their number, and the line of equality.

    Args:
        bins: From `lmntk.solvers.calibration.reliability_bins`.
        split: The split of the examples.
    """

    def draw(axes: Axes) -> None:
        lows = [100 * one.low for one in bins]
        widths = [100 * (one.high - one.low) for one in bins]
        bars = axes.bar(
            lows, [100 * one.accuracy for one in bins], widths, align="edge", color=TEST, alpha=0.55, edgecolor="white"
        )
        axes.bar_label(bars, [f"{one.count}" for one in bins], padding=2, fontsize=8.5)
        sure, right = ([100 * getattr(one, name) for one in bins] for name in ("confidence", "accuracy"))
        axes.plot(sure, right, ls="", marker="o", ms=4, color=TEST, label="mean confidence")
        axes.plot([0, 100], [0, 100], color="#555555", linestyle=":", label="confidence = accuracy")
        lowest = min(lows, default=0)
        axes.set(xlim=(lowest, 100), ylim=(0, 108), xlabel=f"confidence, percent, {split}", ylabel="accuracy, percent")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2, handletextpad=0.4)

    return draw


def layers_plot(shares: Mapping[str, float]) -> Draw:
    """Draw each layer's share of the kernel's trace, from the input on."""

    def draw(axes: Axes) -> None:
        names = [shortened(name, 24) for name in shares]
        bars = axes.barh(range(len(shares)), [100 * share for share in shares.values()], color=TEST)
        axes.bar_label(bars, [f"{share:.1%}" for share in shares.values()], padding=3, fontsize=9)
        axes.set_yticks(range(len(shares)), names)
        axes.invert_yaxis()
        axes.margins(x=0.18, y=0.02)
        axes.set_xlabel("percent of the kernel's trace")

    return draw


def layers_height(count: int) -> float:
    """Return the height in inches of a picture of `count` layers."""
    return max(1.6, 0.24 * count + 0.9)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """Shorten a label; dollars in a user's text are escaped, since they do not enclose a formula."""
    return (name if len(name) <= longest else name[: longest - 1] + "…").replace("$", r"\$")


def _power(value: float) -> str:
    exponent = round(math.log10(value))
    return "1" if exponent == 0 else "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _name_blocks(axes: Axes, classes: ClassIds, names: Sequence[str], across: bool) -> None:
    """Name the blocks of sorted examples at their middles, and draw lines between them."""
    sizes = np.bincount(classes, minlength=len(names))
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        if 0 < end < len(classes) > len(names) and len(names) <= LINED:
            (axes.axvline if across else axes.axhline)(end - 0.5, color="white", lw=1)
    there = np.flatnonzero(sizes)
    middles = (ends - sizes / 2 - 0.5)[there]
    # Names that would overlap the one before are left out.
    inch = AXES_INCHES / len(classes)
    kept: list[int] = []
    for place, middle in enumerate(middles):
        if not kept or (middle - middles[kept[-1]]) * inch >= (SLANTED if across else LINE):
            kept.append(place)
    there, middles = there[kept], middles[kept]
    room = inch * min([*np.diff(middles), *(sizes[there] if len(there) > 1 else [len(classes)])])
    shown = [shortened(names[label]) for label in there.tolist()]
    longest = max(map(len, shown)) * LETTER
    if across:
        fits = longest < room
        axes.set_xticks(
            middles, shown, rotation=0 if fits else 35, ha="center" if fits else "right", rotation_mode="anchor"
        )
        if fits:
            axes.tick_params(axis="x", pad=10)
            for text in axes.get_xticklabels():
                text.set_verticalalignment("center")
    else:
        upright = longest < room
        axes.set_yticks(middles, shown, rotation=90 if upright else 0, va="center")
    axes.tick_params(axis="x" if across else "y", length=0)
