"""The section of a report on single train examples: labels that look wrong, examples that hurt; and their figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from pandas import DataFrame

from lmntk.analysis.influence import RunInfluence, run_influence
from lmntk.analysis.influence_tables import TrainTexts, remarks_of_influence
from lmntk.analysis.least_squares import read_least_squares
from lmntk.analysis.saved_run import label_names
from lmntk.analysis.summary import RunSummary
from lmntk.analysis.table_blocks import number
from lmntk.errors import SolverError
from lmntk.report import plots
from lmntk.report.elements import Picture, html_figure, html_table
from lmntk.report.formatting import escaped, quoted
from lmntk.solvers.problem import predicted_classes
from lmntk.storage.wording import quantity

TITLE = "Examples that hurt"
SHOWN = 8


@dataclass(frozen=True)
class InfluenceView:
    """What single train examples do to the predictions of a run.

    Attributes:
        name: What to call the run.
        found: The numbers; None where they are not defined.
        texts: The sentences of the train examples.
        remark: Why there are no numbers; empty if there are.
    """

    name: str
    found: RunInfluence | None
    texts: TrainTexts
    remark: str = ""

    @property
    def split(self) -> str | None:
        """The split by which examples help or hurt."""
        splits = {} if self.found is None else self.found.splits
        return next((split for split in ("test", "dev") if split in splits), None)


def view_influences(
    summaries: Sequence[RunSummary], settings: Mapping[str, Any], data_dir: Path | None
) -> list[InfluenceView]:
    """Compute the influence of the train examples of each run that predicts with `lstsq`.

    Args:
        summaries: The runs.
        settings: Solver settings by name that replace those of the runs; None counts as absent.
        data_dir: The folder that has the data files now; None: where the kernels' descriptions record them.
    """
    # A kernel that is too large for its spectrum is too large for this.
    chosen = [summary for summary in summaries if summary.kernel is not None and summary.kernel.spectrum is not None]
    return [
        _view(summary, settings, data_dir)
        for summary in chosen
        if summary.kernel is not None and summary.kernel.solver.solver == "lstsq"
    ]


def _view(summary: RunSummary, settings: Mapping[str, Any], data_dir: Path | None) -> InfluenceView:
    try:
        found = run_influence(read_least_squares(summary.run, settings))
    except SolverError as error:
        return InfluenceView(summary.name, None, TrainTexts(()), str(error))
    return InfluenceView(summary.name, found, TrainTexts.read(found, data_dir))


def influence_section(view: InfluenceView, named: bool) -> tuple[str, bytes | None]:
    """Write the section of a run.

    Args:
        view: From `view_influences`.
        named: Whether the page has several runs.

    Returns:
        The HTML and the bytes of the picture; None without one.
    """
    heading = f"<h3>{TITLE}{f' ({escaped(view.name)})' if named else ''}</h3>"
    if view.found is None:
        return f'<section>{heading}<p class="note">{escaped(view.remark)}.</p></section>', None
    found, split = view.found, view.split
    right = int(np.sum(predicted_classes(found.left_out) == found.classes))
    count, total = len(found.mislabelled), quantity(len(found.classes), "train example")
    intro = (
        "Each train example predicted by a fit to all others, and the other splits without it, in closed form. "
        f"{right} of {total} are predicted as labelled; the labels of {count} are contradicted."
    )
    parts = [heading, f'<p class="note">{intro}</p>', _mislabelled(view, found)]
    png = None
    if split is not None:
        parts.append(_harmful(view, found, split))
        png = influence_figure(found, split)
        alt = f"Leave-one-out margin of each train example against the change of the {split} loss without it"
        caption = f"left of 0: labels that the others contradict; below 0: examples without which {split} is better"
        parts.append(html_figure(Picture(png, alt, caption), view.name if named else ""))
    remarks = [remark for remark in remarks_of_influence(found, view.texts) if remark != view.texts.remark]
    parts += [f'<p class="note">{escaped(remark[0].upper() + remark[1:])}.</p>' for remark in remarks]
    return f"<section>{''.join(filter(None, parts))}</section>", png


def _mislabelled(view: InfluenceView, found: RunInfluence) -> str:
    names, predicted = label_names(found.of_run.run, max(2, found.left_out.shape[1])), predicted_classes(found.left_out)
    rows = [
        {
            "training sentence": _text(view, index),
            "label": escaped(names[found.classes[index]]),
            "without it": escaped(names[predicted[index]]),
            "margin": number(found.margins[index], ".2f"),
        }
        for index in found.mislabelled[:SHOWN]
    ]
    if not rows:
        return ""
    caption = "Labels that look wrong, the most contradicted first: margin is the label's logit less the largest other."
    return html_table(DataFrame(rows), words=[*rows[0]][:-1], name="texts", caption=caption)


def _harmful(view: InfluenceView, found: RunInfluence, split: str) -> str:
    names = label_names(found.of_run.run, max(2, found.left_out.shape[1]))
    changes = found.splits[split].loss_changes
    places = [place for place in found.by_helpfulness(split)[::-1][:SHOWN] if changes[place] < 0]
    rows = []
    for place in places:
        cells = {"training sentence": _text(view, place), "label": escaped(names[found.classes[place]])}
        for one in found.splits.values():
            cells[f"{escaped(one.column)} loss"] = number(one.loss_changes[place], "+.1e")
            cells[f"{escaped(one.column)} {escaped(one.metric)}"] = number(100 * one.score_changes[place], "+.1f")
        rows.append(cells)
    if not rows:
        return ""
    caption = (
        f"Train examples without which the mean squared error of {escaped(split)} falls most: changes without them, "
        "scores in points."
    )
    return html_table(DataFrame(rows), words=[*rows[0]][:2], name="texts", caption=caption)


def _text(view: InfluenceView, index: int) -> str:
    texts = view.texts.texts
    return quoted(texts[index]) if index < len(texts) else f"sentence {index}"


def influence_figure(found: RunInfluence, split: str) -> bytes:
    """Draw each train example at its leave-one-out margin and at the change of a split's loss without its group.

    Args:
        found: From `lmntk.analysis.influence.run_influence`.
        split: One of `found.splits`.

    Returns:
        The bytes of a PNG.
    """
    places = np.unique(found.groups, return_inverse=True)[1]
    changes = found.splits[split].loss_changes[places]
    names = label_names(found.of_run.run, max(2, found.left_out.shape[1]))

    def draw(axes: Axes) -> None:
        axes.axvline(0, color="#BBBBBB", lw=1, zorder=0)
        axes.axhline(0, color="#BBBBBB", lw=1, zorder=0)
        for label in np.unique(found.classes):
            chosen = found.classes == label
            colour, marker = plots.COLOURS[label % 8], plots.MARKERS[label % 8]
            at = found.margins[chosen], changes[chosen]
            axes.plot(*at, ls="", ms=5, alpha=0.8, label=names[label], color=colour, marker=marker)
        axes.set(xlabel="margin in leave-one-out", ylabel=f"{split} loss without it, change")
        axes.ticklabel_format(axis="y", scilimits=(-2, 2))
        if len(names) <= plots.NAMED:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.2, handletextpad=0.2)

    return plots.as_png(draw, height=3.9, width=4.8)
