"""A page of pictures and numbers of saved runs: `write_report`."""

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmntk.analysis import statistics
from lmntk.analysis.saved_run import TextsUnavailableError, distinguishing_names, label_names, read_runs
from lmntk.analysis.summary import KernelSummary, RunSummary, summarise_run, typical_examples
from lmntk.errors import SettingError
from lmntk.report.behaviour import behaviour_figure
from lmntk.report.calibration import view_calibrations
from lmntk.report.drift import drift_figure
from lmntk.report.influence import influence_figure, view_influences
from lmntk.report.page import Group, Neighbour, Sentence, make_page
from lmntk.report.trainings import view_trainings
from lmntk.solvers.problem import Array
from lmntk.storage.atomic import prepare_output_dir, write_atomically

__all__ = ["behaviour_figure", "drift_figure", "influence_figure", "write_report"]

NEIGHBOURS = 3


def write_report(
    folders: Sequence[Path],
    output: Path,
    settings: Mapping[str, Any] | None = None,
    sentences: Sequence[int] | None = None,
    data_dir: Path | None = None,
    show_progress: bool = False,
) -> Path:
    """Write a page of pictures and numbers of saved runs, and its pictures beside it.

    Args:
        folders: The output folders of the runs, or folders with kernels of that layout.
        output: The folder to write to; it is made if necessary.
        settings: Solver settings by name, such as ``kernel_solver``, that replace those of the runs; None counts as
            absent.
        sentences: Indices of the test examples to show with their nearest training examples; None: a choice of typical
            ones.
        data_dir: The folder that has the data files now; None: where the kernels' descriptions record them.
        show_progress: Whether to show progress bars.

    Returns:
        The path of the page, ``output / "report.html"``.

    Raises:
        UsageError: A folder is not that of a run, or damaged; the error names it.
    """
    by_task = _summarise_folders(folders, settings or {}, show_progress)
    groups = [_make_group(key, summaries, sentences, data_dir, settings or {}) for key, summaries in by_task.items()]
    text, files = make_page(groups)
    output = prepare_output_dir(output)
    path = output / "report.html"
    for name, content in (files | {path.name: text.encode()}).items():
        write_atomically(output / name, operator.methodcaller("write", content), durable=False)
    return path


def _summarise_folders(
    folders: Sequence[Path], settings: Mapping[str, Any], show_progress: bool
) -> dict[str, list[RunSummary]]:
    """Summarise all runs in some folders, by task."""
    folders = list({folder.resolve(): folder for folder in folders}.values())
    by_task: dict[str, list[RunSummary]] = {}
    for folder, name in zip(folders, distinguishing_names(folders), strict=True):
        for run in read_runs(folder):
            by_task.setdefault(run.key, []).append(summarise_run(run, name, settings, show_progress))
    return by_task


def _make_group(
    key: str,
    summaries: Sequence[RunSummary],
    indices: Sequence[int] | None,
    data_dir: Path | None,
    settings: Mapping[str, Any],
) -> Group:
    """Choose the sentences to show of a task's runs; runs on the same data share them."""
    by_data: dict[str, list[RunSummary]] = {}
    for summary in summaries:
        if summary.kernel is not None and "test" in summary.kernel.others:
            data = summary.run.kernel("test").description.get("data_sha256") or summary.name
            by_data.setdefault(str(data), []).append(summary)
    sentences: list[Sentence] = []
    remarks: list[str] = []
    for same_data in by_data.values():
        chosen = typical_examples(same_data[0].splits["test"]) if indices is None else indices
        texts: dict[str, Sequence[Sequence[str]]] = {}
        for split in ("train", "test"):
            try:
                texts[split] = same_data[0].run.texts(split, data_dir)
            except TextsUnavailableError as error:
                texts[split] = ()
                remarks.append(str(error))
        sentences += [_find_neighbours(index, same_data, texts) for index in chosen]
    influences = view_influences(summaries, settings, data_dir)
    remarks += [view.texts.remark for view in influences if view.texts.remark]
    remarks = list(dict.fromkeys(remarks))
    calibrations = view_calibrations(summaries, settings)
    return Group(key, summaries, sentences, remarks, view_trainings(summaries), influences, calibrations)


def _find_neighbours(
    index: int, summaries: Sequence[RunSummary], texts: Mapping[str, Sequence[Sequence[str]]]
) -> Sentence:
    """Find the training examples most similar to a test example by the kernel of each run."""
    neighbours, label = {}, ""
    for summary in summaries:
        kernel, test = summary.kernel, summary.splits["test"]
        assert kernel is not None
        if not 0 <= index < len(test.labels):
            raise SettingError(
                f"`sentences={index}`: {summary.name} has test sentences 0 to {len(test.labels) - 1}",
                setting="sentences",
                value=index,
            )
        names = label_names(summary.run, kernel.num_classes)
        similarities, distances = _similarities(kernel, index)
        nearest = np.argsort(-similarities, kind="stable")[:NEIGHBOURS].tolist()
        label = names[int(test.labels[index])]
        neighbours[summary.name] = (
            names[int(test.predicted[index])],
            [
                Neighbour(
                    similarities[i],
                    None if distances is None else distances[i],
                    names[kernel.classes["train"][i]],
                    i,
                    _texts_at(texts["train"], i),
                )
                for i in nearest
            ],
        )
    return Sentence(index, _texts_at(texts["test"], index), label, neighbours)


def _similarities(kernel: KernelSummary, index: int) -> tuple[Array, Array | None]:
    """Return the cosine and the distance of each training example and a test example.

    Without K̃_jj of the test example it is the similarity that ranks as the cosine does, and None.
    """
    diagonal, columns = np.diag(kernel.train), kernel.others["test"][:, [index]]
    if "test" not in kernel.own:
        return statistics.similarities(diagonal, columns)[:, 0], None
    own = kernel.own["test"][[index]]
    return statistics.cosines(diagonal, columns, own)[:, 0], statistics.distances(diagonal, columns, own)[:, 0]


def _texts_at(texts: Sequence[Sequence[str]], index: int) -> Sequence[str]:
    """Return the sentences of an example; none where the texts cannot be shown."""
    return texts[index] if index < len(texts) else ()
