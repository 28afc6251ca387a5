"""The report's section on how sure the predictions are, and its cosines: with a diagonal, and what is said without."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernel_folders import Folder
from lmntk.analysis.calibration import run_calibration
from lmntk.analysis.least_squares import find_kernel_run, read_least_squares
from lmntk.analysis.saved_run import read_runs
from lmntk.analysis.statistics import logit_differences
from lmntk.analysis.summary import summarise_run
from lmntk.report import _make_group, plots
from lmntk.report.calibration import calibration_section, view_calibrations
from lmntk.report.page import _sentences


def sections_of(folder: Folder, **settings: Any) -> list[tuple[str, bytes | None]]:
    summaries = [summarise_run(run, "run", settings, curve=False) for run in read_runs(folder.path)]
    return [calibration_section(view, named=False) for view in view_calibrations(summaries, settings)]


def similar_sentences(folder: Folder, *indices: int) -> str:
    summaries = [summarise_run(run, "run", {}, curve=False) for run in read_runs(folder.path)]
    return _sentences(_make_group("sst-2", summaries, indices, Path("no texts"), {"kernel_solver": "svr"}))


def test_the_section_has_the_numbers_of_the_process_and_its_reliability(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.record(kernel_regularization=0.1)
    folder.write_diagonals()
    ((section, png),) = sections_of(folder)
    found = run_calibration(read_least_squares(find_kernel_run(folder.path), {}))
    assert "How sure the predictions are" in section and f"σ² = {found.scale:.3g}" in section
    for split in ("dev", "test"):
        one = found.splits[split]
        row = re.search(f">{split}</th>(.*?)</tr>", section)
        assert row is not None and f">{one.nll:.3f}<" in row[1] and f">{100 * one.ece:.1f}<" in row[1]
    assert sum(int(count) for count in re.findall(r"right of (\d+)", section)) == 10
    assert png is not None and png.startswith(b"\x89PNG")


def test_where_no_process_is_defined_a_sentence_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "as_png", lambda *_, **__: b"\x89PNG" + bytes(20))
    older = Folder(tmp_path, "older")
    ((section, png),) = sections_of(older)
    assert "test_diagonal_sst-2.pt is missing" in section and "kernel_variance=True" in section and png is None
    assert sections_of(older, kernel_solver="svr") == []
    singular = Folder(tmp_path, "singular")
    singular.write("train", np.tile(singular.kernel("train")[:4, :, :4], (2, 1, 2, 1)))
    singular.write_diagonals()
    assert "take `kernel_regularization=" in sections_of(singular)[0][0]
    for name, cause, traits in (
        ("asymmetric", "needs a symmetric kernel", {"asymmetric": True}),
        ("templates", "each of train has 2", {"samples": 2}),
    ):
        odd = Folder(tmp_path, name, **traits)
        odd.write_diagonals()
        ((section, png),) = sections_of(odd, kernel_regularization=0.1)
        assert cause in section and png is None
        assert "relative to the largest" in similar_sentences(odd, 3) and "distance" not in similar_sentences(odd, 3)


@pytest.mark.parametrize("logits", [1, 3])
def test_similar_sentences_have_their_cosine_and_distance(tmp_path: Path, logits: int) -> None:
    """Against the features, of which logits' means are taken away: with three logits K̃ is their inner product."""
    folder = Folder(tmp_path, logits=logits)
    assert "cosine itself" in similar_sentences(folder, 4)
    folder.write_diagonals()
    centred = {
        split: (phi - (phi.mean(axis=1, keepdims=True) if logits > 1 else 0)).reshape(len(phi), -1)
        for split, phi in folder.features.items()
    }
    train, test = centred["train"], centred["test"][4]
    np.testing.assert_allclose(logit_differences(folder.kernel("test"))[:, 4], train @ test, rtol=1e-10)
    cosines = train @ test / np.linalg.norm(train, axis=1) / np.linalg.norm(test)
    distances = np.linalg.norm(train - test, axis=1)
    page = similar_sentences(folder, 4)
    assert "relative to the largest" not in page
    nearest = np.argsort(-cosines)[:3]
    rows = re.findall(r'<th scope="row">(-?[\d.]+)</th><td>([\d.]+)</td>', page)
    assert rows == [(f"{cosines[i]:.2f}", f"{distances[i]:.3g}") for i in nearest]
