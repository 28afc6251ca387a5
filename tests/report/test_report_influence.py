"""The report's section on single train examples: whose label looks wrong, which hurt, and when there is none."""

from pathlib import Path

import numpy as np

from kernel_folders import Folder
from lmntk.report import write_report


def page_of(folder: Folder, output: Path, **settings: object) -> str:
    return write_report([folder.path], output, settings).read_text(encoding="utf-8")


def test_a_flipped_label_is_shown_first_with_its_text_and_what_its_absence_brings(tmp_path: Path) -> None:
    folder = Folder(tmp_path, noise=0.3)
    folder.record(kernel_regularization=0.1)
    folder.classes["train"][5] = 1 - folder.classes["train"][5]
    folder.texts("train").unlink()
    for split in ("train", "dev", "test"):
        folder.write(split)
    section = page_of(folder, tmp_path / "page").split("Examples that hurt</h3>")[1].split("</section>")[0]
    wrong, hurting = section.split("<table")[1:3]
    for table in (wrong, hurting):
        first = table.split("<tbody>")[1].split("</tr>")[0]
        assert "train sentence 5" in first and "0 (terrible)" in first
    assert "dev loss" in hurting and "test acc" in hurting
    assert (tmp_path / "page" / "influence.png").read_bytes().startswith(b"\x89PNG")


def test_a_singular_kernel_gets_a_sentence_and_other_solvers_no_section(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("train", np.tile(folder.kernel("train")[:4, :, :4], (2, 1, 2, 1)))
    page = page_of(folder, tmp_path / "singular")
    assert "Examples that hurt" in page and "kernel_regularization=0.001" in page
    assert "Labels that look wrong" in page_of(folder, tmp_path / "regular", kernel_regularization=0.1)
    assert "Examples that hurt" not in page_of(folder, tmp_path / "svr", kernel_solver="svr")
