"""The kinds of pictures in a report; each picture shows one run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmntk.analysis import statistics
from lmntk.analysis.saved_run import label_names
from lmntk.analysis.summary import KernelSummary, RunSummary
from lmntk.report import plots
from lmntk.report.elements import Picture
from lmntk.report.formatting import cosine, escaped, metric_of, score_of, short, solver_of

DIFFERENCES = "K̃<sub>ij</sub> = Σ<sub>ab</sub> P<sub>ab</sub> K[i, a, j, b], P = I − 11ᵀ/C"


@dataclass(frozen=True)
class Scales:
    """Scales that the pictures of several runs share.

    Attributes:
        lowest: The lower end of the scale of relative singular values.
        scores: The ends of the scale of scores, in percent.
    """

    lowest: float
    scores: tuple[float, float]


@dataclass(frozen=True)
class Kind:
    """A kind of picture.

    Attributes:
        name: The name in file names.
        title: The title on the page.
        text: An explanation, as HTML.
        draw: Draws it for a run; returns None if the run has nothing to show.
    """

    name: str
    title: str
    text: str
    draw: Callable[[RunSummary, Scales], Picture | None]


def _names(summary: RunSummary) -> list[str]:
    count = len(summary.run.task.labels) if summary.run.task else 2
    return label_names(summary.run, summary.kernel.num_classes if summary.kernel else count)


def _other(kernel: KernelSummary) -> str | None:
    return next((split for split in ("test", "dev") if split in kernel.others), None)


def _train_map(summary: RunSummary, scales: Scales) -> Picture | None:
    if (kernel := summary.kernel) is None:
        return None
    ids = kernel.classes["train"]
    png = plots.as_png(plots.heat_map(kernel.train, ids, ids, _names(summary)))
    return Picture(
        png,
        "Heat map of the kernel of the training examples",
        f"alignment with the labels {cosine(kernel.alignments['train'])}",
    )


def _other_map(summary: RunSummary, scales: Scales) -> Picture | None:
    if (kernel := summary.kernel) is None or (split := _other(kernel)) is None:
        return None
    matrix, ids = kernel.others[split], kernel.classes
    png = plots.as_png(plots.heat_map(matrix, ids["train"], ids[split], _names(summary), ("train", split)))
    return Picture(
        png,
        f"Heat map of the kernel of train and {split}",
        f"alignment with the labels {cosine(kernel.alignments[split])}",
    )


def _spectrum(summary: RunSummary, scales: Scales) -> Picture | None:
    if (kernel := summary.kernel) is None or kernel.spectrum is None:
        return None
    found = kernel.spectrum
    caption = (
        f"effective rank {found.effective_rank:.1f}, rank {found.rank} of {len(found.values)}, condition number "
        f"{short(found.condition)}"
    )
    return Picture(plots.as_png(plots.spectrum_plot(found, scales.lowest)), "Singular values of the kernel", caption)


def _components(summary: RunSummary, scales: Scales) -> Picture | None:
    if (kernel := summary.kernel) is None or (split := _other(kernel)) is None:
        return None
    found, ids = kernel.components[split], kernel.classes
    png = plots.as_png(
        plots.components_plot(found, ids["train"], ids[split], _names(summary), split), height=plots.HEIGHT + 0.5
    )
    caption = f"the two axes hold {100 * found.shares.sum():.0f} % of the variance of train"
    return Picture(png, f"Training and {split} examples on two principal axes, coloured by label", caption)


def _confusion(summary: RunSummary, scales: Scales) -> Picture | None:
    split = next((split for split in ("test", "dev") if split in summary.splits), None)
    if split is None:
        return None
    found = summary.splits[split]
    caption = escaped(score_of(summary, split))
    if summary.run.task is not None and summary.run.task.regression:
        png = plots.as_png(plots.scores_plot(found.labels, found.predicted, split))
        return Picture(png, f"Predicted scores of {split} against the labels", caption)
    names = _names(summary)
    counts = statistics.confusion(found.labels, found.predicted, len(names))
    height = plots.HEIGHT if len(names) <= plots.WRITTEN_OUT else plots.HEIGHT + 0.7
    errors = "; ".join(
        f"{names[row]} taken for {names[column]}: {count}"
        for (row, column), count in np.ndenumerate(counts)
        if len(names) < 4
    )
    alt = f"Confusion matrix of {split}{f'. {errors}' if errors else ''}"
    return Picture(plots.as_png(plots.confusion_plot(counts, names, split), height=height), alt, caption)


def _curve(summary: RunSummary, scales: Scales) -> Picture | None:
    if (kernel := summary.kernel) is None or (curve := kernel.curve) is None or len(curve.values) < 2:
        return None
    png = plots.as_png(plots.curve_plot(curve.values, curve.scores, curve.own, metric_of(summary), scales.scores))
    best = [
        f"{escaped(split)} at λ = {curve.values[int(np.nanargmax(line))]:g}"
        for split, line in curve.scores.items()
        if np.isfinite(line).any()
    ]
    caption = f"{escaped(solver_of(summary))}; best on {' and on '.join(best)}"
    return Picture(png, f"{metric_of(summary)} on dev and test against regularisation", caption)


def _layers(summary: RunSummary, scales: Scales) -> Picture | None:
    if not summary.layer_shares:
        return None
    png = plots.as_png(plots.layers_plot(summary.layer_shares), height=plots.layers_height(len(summary.layer_shares)))
    largest = max(summary.layer_shares, key=lambda name: summary.layer_shares[name])
    return Picture(png, "Share of the kernel's trace by layer", f"largest: {escaped(largest)}")


KINDS = (
    Kind(
        "train-map",
        "The kernel of the training examples",
        f"{DIFFERENCES}: the kernel of the logits' differences, since a part that all logits share changes no "
        "prediction. Examples are sorted by label; shades span the middle 98 % of the values off the diagonal. The "
        "alignment with the labels, at most 1, is ⟨HK̃H, YYᵀ⟩ over the norms, both centred (Cortes et al. 2012).",
        _train_map,
    ),
    Kind(
        "other-map",
        "The kernel of train and test",
        "The same for training examples (rows) and test examples (columns).",
        _other_map,
    ),
    Kind(
        "components",
        "Kernel PCA",
        "The training and test examples on the principal axes of K̃, centred at the training examples (Schölkopf et "
        "al. 1998).",
        _components,
    ),
    Kind(
        "spectrum",
        "Spectrum",
        "Singular values σ of the matrix that the solver sees, [N·C, N·C]. The effective rank is exp(−Σ p ln p), "
        "p = σ/Σσ (Roy and Vetterli 2007); the rank counts the values above the solver's cut-off; the condition "
        "number is the largest value over the smallest.",
        _spectrum,
    ),
    Kind(
        "confusion",
        "Confusion matrix",
        "Rows are labels, columns predictions; shades are shares of each label's examples.",
        _confusion,
    ),
    Kind(
        "regularisation",
        "Scores against regularisation",
        "The same solver is fitted again to K + λ‖K‖₂ I for each λ.",
        _curve,
    ),
    Kind(
        "layers",
        "Layers",
        "The share of each layer's parameters in the trace of the training kernel, from the input on.",
        _layers,
    ),
)


def shared_scales(summaries: Sequence[RunSummary]) -> Scales:
    """Return scales that contain the values of all runs."""
    spectra = [summary.kernel.spectrum.values for summary in summaries if summary.kernel and summary.kernel.spectrum]
    smallest = min((values[-1] / values[0] for values in spectra if values[0]), default=1e-3)
    curves = [summary.kernel.curve.scores for summary in summaries if summary.kernel and summary.kernel.curve]
    scores = [100 * score for curve in curves for line in curve.values() for score in line if np.isfinite(score)]
    low, high = min(scores, default=0), max(scores, default=100)
    margin = max(3.0, (high - low) / 10)
    return Scales(max(10 ** np.floor(np.log10(max(smallest, 1e-17))), 1e-17), (low - margin, min(high + margin, 101)))


def make_overview(summary: RunSummary, scales: Scales) -> bytes | None:
    """Draw three pictures of a kernel in one PNG file, to show elsewhere; None without a kernel and its curve."""
    kernel = summary.kernel
    if kernel is None or kernel.curve is None or len(kernel.curve.values) < 2 or (split := _other(kernel)) is None:
        return None
    ids, names, curve = kernel.classes, _names(summary), kernel.curve
    return plots.as_png(
        plots.heat_map(kernel.train, ids["train"], ids["train"], names),
        plots.components_plot(kernel.components[split], ids["train"], ids[split], names, split),
        plots.curve_plot(curve.values, curve.scores, curve.own, metric_of(summary), scales.scores),
        titles=(
            "kernel of the training examples",
            f"kernel PCA: train outlined, {split} small",
            f"{metric_of(summary)} against regularisation",
        ),
    )
