"""The section of a report on how sure the predictions are: their likelihood, their calibration and its picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame

from lmntk.analysis.calibration import RunCalibration, run_calibration
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.summary import RunSummary
from lmntk.analysis.table_blocks import number
from lmntk.errors import SettingError, SolverError
from lmntk.report import plots
from lmntk.report.elements import Picture, html_figure, html_table
from lmntk.report.formatting import escaped, percent

TITLE = "How sure the predictions are"


@dataclass(frozen=True)
class CalibrationView:
    """How sure the predictions of a run are.

    Attributes:
        name: What to call the run.
        found: The numbers; None where they are not defined.
        remark: Why there are no numbers; empty if there are.
    """

    name: str
    found: RunCalibration | None
    remark: str = ""

    @property
    def split(self) -> str | None:
        """The split whose reliability is drawn."""
        splits = {} if self.found is None else self.found.splits
        return next((split for split in ("test", "dev") if split in splits), next(iter(splits), None))


def view_calibrations(summaries: Sequence[RunSummary], settings: Mapping[str, Any]) -> list[CalibrationView]:
    """Compute how sure the predictions are of each run that predicts with `lstsq`.

    Args:
        summaries: The runs.
        settings: Solver settings by name that replace those of the runs; None counts as absent.
    """
    # A kernel that is too large for its spectrum is too large for this.
    chosen = [summary for summary in summaries if summary.kernel is not None and summary.kernel.spectrum is not None]
    return [
        _view(summary, settings)
        for summary in chosen
        if summary.kernel is not None and summary.kernel.solver.solver == "lstsq" and summary.kernel.others
    ]


def _view(summary: RunSummary, settings: Mapping[str, Any]) -> CalibrationView:
    try:
        found = run_calibration(read_least_squares(summary.run, settings))
    except (SolverError, SettingError) as error:
        return CalibrationView(summary.name, None, str(error))
    return CalibrationView(summary.name, found)


def calibration_section(view: CalibrationView, named: bool) -> tuple[str, bytes | None]:
    """Write the section of a run.

    Args:
        view: From `view_calibrations`.
        named: Whether the page has several runs.

    Returns:
        The HTML and the bytes of the picture; None without one.
    """
    heading = f"<h3>{TITLE}{f' ({escaped(view.name)})' if named else ''}</h3>"
    found, split = view.found, view.split
    remarks = [view.remark] if found is None else found.remarks
    notes = "".join(f'<p class="note">{escaped(remark[:1].upper() + remark[1:])}.</p>' for remark in remarks)
    if found is None or split is None:
        return f"<section>{heading}{notes}</section>", None
    intro = (
        "The Gaussian process whose mean is the predictions of lstsq: its covariance is σ² times the kernel, with "
        f"σ² = {number(found.scale, '.3g')} for which the train targets are most likely, and its noise has the "
        f"variance {number(found.noise, '.3g')}."
    )
    rows = [
        {
            "split": escaped(name),
            "examples": f"{len(one.classes):,}",
            "negative log-likelihood, nats": number(one.nll, ".3f"),
            "calibration error, percent": percent(one.ece),
            "mean confidence, percent": percent(float(one.probabilities.max(axis=1).mean())),
        }
        for name, one in found.splits.items()
    ]
    caption = (
        "Class probabilities of the process. The expected calibration error is the mean distance of the bars below "
        "from the line, weighted by their examples (Guo et al. 2017)."
    )
    bins = found.splits[split].bins
    png = plots.as_png(plots.reliability_plot(bins, split), height=plots.HEIGHT + 0.3)
    said = "; ".join(f"{one.confidence:.0%} sure: {one.accuracy:.0%} right of {one.count}" for one in bins)
    picture = Picture(png, f"Accuracy of {split} by confidence. {said}", "numbers on the bars: examples")
    table = html_table(DataFrame(rows), words=["split"], name="runs", caption=caption)
    figure = html_figure(picture, view.name if named else "")
    return f'<section>{heading}<p class="note">{intro}</p>{table}{figure}{notes}</section>', png
