"""The report's section on single train examples: whose label looks wrong, which hurt, and when there is none."""

from pathlib import Path
from typing import Any

import numpy as np

from kernel_folders import Folder
from lmntk.analysis.saved_run import read_runs
from lmntk.analysis.summary import summarise_run
from lmntk.report.influence import influence_section, view_influences


def sections_of(folder: Folder, **settings: Any) -> list[tuple[str, bytes | None]]:
    summaries = [summarise_run(run, "run", settings, curve=False) for run in read_runs(folder.path)]
    return [influence_section(view, named=False) for view in view_influences(summaries, settings, None)]


def test_a_flipped_label_is_shown_first_with_its_text_and_what_its_absence_brings(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=0.3)
    folder.record(kernel_regularization=0.1)
    folder.classes["train"][5] = 1 - folder.classes["train"][5]
    folder.texts("train").unlink()
    for split in ("train", "dev", "test"):
        folder.write(split)
    ((section, png),) = sections_of(folder)
    wrong, hurting = section.split("<table")[1:3]
    for table in (wrong, hurting):
        first = table.split("<tbody>")[1].split("</tr>")[0]
        assert "train sentence 5" in first and "0 (terrible)" in first
    assert "dev loss" in hurting and "test acc" in hurting
    assert png is not None and png.startswith(b"\x89PNG")


def test_a_singular_kernel_gets_a_sentence_and_other_solvers_no_section(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("train", np.tile(folder.kernel("train")[:4, :, :4], (2, 1, 2, 1)))
    ((section, png),) = sections_of(folder)
    assert "Examples that hurt" in section and "kernel_regularization=0.001" in section and png is None
    ((section, _),) = sections_of(folder, kernel_regularization=0.1)
    assert "are predicted as labelled" in section
    assert sections_of(folder, kernel_solver="svr") == []
