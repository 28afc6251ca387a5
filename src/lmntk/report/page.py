"""The page of a report: the summaries of some runs as one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pandas import DataFrame

import lmntk
from lmntk.analysis.summary import RunSummary
from lmntk.report.calibration import CalibrationView, calibration_section
from lmntk.report.elements import columns_class, file_name, html_figure, html_table
from lmntk.report.figures import KINDS, make_overview, shared_scales
from lmntk.report.formatting import cosine, escaped, lead, method_of, metric_of, percent, quoted, short, solver_of
from lmntk.report.influence import InfluenceView, influence_section
from lmntk.report.plots import LONGEST_NAME
from lmntk.report.projections import projections_table
from lmntk.report.trainings import TrainingView, training_section

COSINE = (
    "by the cosine K̃<sub>ij</sub>/√(K̃<sub>ii</sub> K̃<sub>jj</sub>), with the distance "
    "√(K̃<sub>ii</sub> + K̃<sub>jj</sub> − 2K̃<sub>ij</sub>)"
)
RANKED = (
    "by K̃<sub>ij</sub>/√K̃<sub>ii</sub>, which ranks them as the cosine does; values are relative to the largest. The "
    "cosine itself needs K̃<sub>jj</sub>, which is known where K(x, x) is stored, the kernel is symmetric and each "
    "example has one prompt"
)

CSS = "\n" + Path(__file__).with_name("page.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Neighbour:
    """A training example that resembles a test example.

    Attributes:
        similarity: The cosine; without a distance, relative to the largest similarity of the test example; -1 to 1.
        distance: Their distance as the kernel has it; None where K(x, x) of the test example is not stored.
        label: The name of its label.
        index: Its place in the file, from 0.
        texts: Its sentences; empty if they cannot be shown.
    """

    similarity: float
    distance: float | None
    label: str
    index: int
    texts: Sequence[str]


@dataclass(frozen=True)
class Sentence:
    """A test example and the training examples most similar to it by the kernels of some runs.

    Attributes:
        index: Its place in the file, from 0.
        texts: Its sentences; empty if they cannot be shown.
        label: The name of its label.
        neighbours: By run: the predicted label, and the most similar training examples.
    """

    index: int
    texts: Sequence[str]
    label: str
    neighbours: Mapping[str, tuple[str, Sequence[Neighbour]]]


@dataclass(frozen=True)
class Group:
    """The runs of one task and the sentences to show.

    Attributes:
        key: The task in file names.
        summaries: The summaries of the runs.
        sentences: Test examples to show.
        remarks: Reasons for missing sentences.
        trainings: The trainings with snapshots among the runs.
        influences: What single train examples do in the runs that predict with `lstsq`.
        calibrations: How sure the predictions of these runs are.
    """

    key: str
    summaries: Sequence[RunSummary]
    sentences: Sequence[Sentence]
    remarks: Sequence[str] = ()
    trainings: Sequence[TrainingView] = ()
    influences: Sequence[InfluenceView] = ()
    calibrations: Sequence[CalibrationView] = ()


def make_page(groups: Sequence[Group]) -> tuple[str, dict[str, bytes]]:
    """Write the page, and draw its pictures.

    Args:
        groups: The runs to show, by task.

    Returns:
        The HTML, and the bytes of each picture by the name of its file.
    """
    files: dict[str, bytes] = {}
    runs = sum(len(group.summaries) for group in groups)
    tasks = ", ".join(group.key for group in groups)
    title = f"{tasks}: {groups[0].summaries[0].name}" if runs == 1 else f"{tasks}: {runs} runs"
    body = [f"<header><h1>{escaped(title)}</h1></header>", "<main>"]
    for group in groups:
        heading = f"<h2>{escaped(group.key)}</h2>" if len(groups) > 1 else ""
        body.append(f'<section id="{escaped(group.key)}">{heading}{_group(group, files)}</section>')
    body.append("</main>")
    body.append(f'<footer class="note"><p>Made by lmntk {lmntk.__version__}.</p></footer>')
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>lmntk report: {escaped(title)}</title><style>{CSS}</style>"
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"
    return text, files


def _group(group: Group, files: dict[str, bytes]) -> str:
    summaries = group.summaries
    parts = [lead(summaries), _table_of_runs(summaries)]
    remarks = [
        f"<strong>{escaped(summary.name)}</strong>: {escaped(remark)}"
        for summary in summaries
        for remark in summary.remarks
    ]
    remarks += [escaped(text) for text in group.remarks]
    if remarks:
        parts.append('<ul class="note">' + "".join(f"<li>{text}</li>" for text in remarks) + "</ul>")
    parts.append(_kinds(group, files))
    parts.append(projections_table(summaries))
    parts += [_layers_table(summary, named=len(summaries) > 1) for summary in summaries]
    parts += [_training(group.key, view, len(summaries) > 1, files) for view in group.trainings]
    parts += [_influence(group.key, view, len(summaries) > 1, files) for view in group.influences]
    parts += [_calibration(group.key, view, len(summaries) > 1, files) for view in group.calibrations]
    parts.append(_sentences(group))
    return "\n".join(filter(None, parts))


def _table_of_runs(summaries: Sequence[RunSummary]) -> str:
    splits = sorted(
        {split for summary in summaries for split in summary.scores}, key=lambda name: (name != "dev", name)
    )
    table = DataFrame([_cells(summary, splits) for summary in summaries]).fillna("")
    table = table.loc[:, table.ne("").any()]  # folders of older versions lack some numbers
    metric = ", ".join(dict.fromkeys(map(metric_of, summaries)))
    caption = f"{metric[0].upper()}{metric[1:]} in percent"
    sources = sorted({summary.kernel.solver.source.value for summary in summaries if summary.kernel is not None})
    if sources:
        caption += f"; predictions are recomputed from the kernels with {escaped(' or '.join(sources))}"
    return html_table(table, words=("run", "method", "solver"), name="runs", caption=caption + ".")


def _cells(summary: RunSummary, splits: Sequence[str]) -> dict[str, str]:
    """Return the row of a run by column; its column names and cells are HTML."""
    record, kernel = summary.run.record, summary.kernel
    spectrum = kernel.spectrum if kernel is not None else None
    parameters, seconds = summary.run.description.get("grad_dim"), record.get("seconds")
    return {
        "run": escaped(summary.name),
        "method": escaped(method_of(summary)),
        "solver": escaped(solver_of(summary)),
        **{escaped(split): percent(summary.scores.get(split)) for split in splits},
        "alignment,<br>train": cosine(kernel.alignments.get("train")) if kernel else "",
        "alignment,<br>test": cosine(kernel.alignments.get("test")) if kernel else "",
        "effective<br>rank": f"{spectrum.effective_rank:.1f}" if spectrum else "",
        "rank": f"{spectrum.rank} of {len(spectrum.values)}" if spectrum else "",
        "condition<br>number": short(spectrum.condition) if spectrum else "",
        "parameters": f"{parameters:,}" if kernel and isinstance(parameters, int) else "",
        "seconds": f"{seconds:,.1f}" if isinstance(seconds, int | float) else "",
    }


def _layers_table(summary: RunSummary, named: bool) -> str:
    rows = summary.run.layer_results()
    if not rows:
        return ""
    of = f" of {escaped(summary.name)}" if named else ""
    header, *body = [[escaped(cell) for cell in row] for row in rows]
    caption = "As the run wrote it: each layer's share of the trace, and the score of its part of the kernel alone."
    return f"<h3>Layers{of}, each alone</h3>" + html_table(
        DataFrame(body, columns=header), words=header[:1], caption=caption
    )


def _training(key: str, view: TrainingView, named: bool, files: dict[str, bytes]) -> str:
    text, png = training_section(view, named)
    if png is not None:
        files[file_name(key, view.name if named else "", "drift")] = png
    return text


def _influence(key: str, view: InfluenceView, named: bool, files: dict[str, bytes]) -> str:
    text, png = influence_section(view, named)
    if png is not None:
        files[file_name(key, view.name if named else "", "influence")] = png
    return text


def _calibration(key: str, view: CalibrationView, named: bool, files: dict[str, bytes]) -> str:
    text, png = calibration_section(view, named)
    if png is not None:
        files[file_name(key, view.name if named else "", "reliability")] = png
    return text


def _kinds(group: Group, files: dict[str, bytes]) -> str:
    summaries, scales = group.summaries, shared_scales(group.summaries)
    named = len(summaries) > 1
    sections = []
    for kind in KINDS:
        drawn = [(summary, kind.draw(summary, scales)) for summary in summaries]
        if not any(picture for _, picture in drawn):
            continue
        figures = []
        for summary, picture in drawn:
            name = summary.name if named else ""
            if picture is not None:
                files[file_name(group.key, name, kind.name)] = picture.png
                figures.append(html_figure(picture, name))
            elif len(summaries) <= 3:  # each run keeps its column
                why = "nothing to show" if summary.kernel else "no kernel"
                figures.append(f'<p class="note"><strong>{escaped(name)}</strong>: {why}</p>')
        inside = (
            f'<p class="note">{kind.text}</p><div class="grid {columns_class(len(figures))}">{"".join(figures)}</div>'
        )
        sections.append(f"<section><h3>{kind.title}</h3>{inside}</section>")
    for summary in summaries:
        if (overview := make_overview(summary, scales)) is not None:
            files[file_name(group.key, summary.name if named else "", "overview")] = overview
    joined = "\n".join(sections)
    return joined if named else f'<div class="grid alone">{joined}</div>'


def _sentences(group: Group) -> str:
    if not group.sentences:
        return ""
    several = len(group.summaries) > 1
    lists = [rows for sentence in group.sentences for _, rows in sentence.neighbours.values()]
    ways = dict.fromkeys(RANKED if row.distance is None else COSINE for rows in lists for row in rows)
    parts = [
        "<section><h3>Most similar training sentences</h3>",
        f'<p class="note">For some test sentences, the training sentences most similar to them {"; or ".join(ways)}. '
        "Numbers count from 0 in the files' order.</p>",
    ]
    shown = [_sentence(sentence, several) for sentence in group.sentences]
    joined = "\n".join(shown)
    return "\n".join([*parts, joined if several else f'<div class="grid alone">{joined}</div>', "</section>"])


def _similarity(row: Neighbour) -> dict[str, str]:
    if row.distance is None:
        return {"similarity": f"{row.similarity:.2f}"}
    return {"cosine": f"{row.similarity:.2f}", "distance": short(row.distance)}


def _kept_together(label: str) -> str:
    return escaped(label.replace(" ", "\u00a0") if len(label) <= LONGEST_NAME else label)


def _sentence(sentence: Sentence, several: bool) -> str:
    lists = []
    for name, (predicted, rows) in sentence.neighbours.items():
        right = "right" if predicted == sentence.label else "wrong"
        caption = f"{f'<strong>{escaped(name)}</strong>: ' if several else ''}predicted {escaped(predicted)}, {right}"
        cells = [
            {
                **_similarity(row),
                "label": _kept_together(row.label),
                "training sentence": quoted(row.texts) or f"sentence {row.index}",
            }
            for row in rows
        ]
        lists.append(html_table(DataFrame(cells), words=[*cells[0]], name="texts", caption=caption))
    count = len(sentence.neighbours)
    shown = f"<blockquote>{quoted(sentence.texts)}</blockquote>" if sentence.texts else ""
    return (
        f"<article><h4>Test sentence {sentence.index}, label {escaped(sentence.label)}</h4>{shown}"
        f'<div class="{f"grid {columns_class(count)}" if count > 1 else ""}">{"".join(lists)}</div></article>'
    )
