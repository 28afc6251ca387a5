"""The section of a report on trainings with snapshots: its numbers, its picture, and the kernels beside it."""

import html
import re
from pathlib import Path

import numpy as np
import pytest

from lmntk.errors import FileError
from lmntk.report import plots, write_report
from lmntk.report.trainings import TITLE
from training_folders import logits_for, split_of, write_kernel_run, write_training

LABELS = np.arange(8) % 2
STAND_IN = plots.as_png(lambda axes: axes.plot([0, 1]))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a second for each page."""
    monkeypatch.setattr(plots, "as_png", lambda *_, **__: STAND_IN)


def wrong(count: int) -> np.ndarray:
    return np.where(np.arange(8) < count, 1 - LABELS, LABELS)


def write(folder: Path, steps: tuple[int, ...] = (0, 4)) -> None:
    """A training from 4 of 8 right to 7, whose linearisation has 6 right and whose kernel doubles."""
    train = split_of([0, 1], np.zeros((2, 2)))
    start = {"train": train, "test": split_of(LABELS, logits_for(wrong(4)))}
    end = {"train": train, "test": split_of(LABELS, logits_for(wrong(1)), logits_for(wrong(2)))}
    kernel = np.random.default_rng(0).normal(size=(2, 2, 2, 2)) + 3
    found = {0: (start, kernel), 4: (end, 2 * kernel)}
    write_training(folder, {step: found[step] for step in steps})


def page(tmp_path: Path, *names: str) -> str:
    """The text of the report of some folders, tags left out."""
    path = write_report([tmp_path / name for name in names], tmp_path / "page")
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_a_training_with_snapshots_has_a_section_with_its_drift_and_a_picture(tmp_path: Path) -> None:
    write(tmp_path / "tuned")
    said = page(tmp_path, "tuned").partition(TITLE)[2]
    assert "4 – 87.5 75.0 0.67" in said and "4 1 1 1 1.0000" in said
    assert "after 4 steps the recovery is 0.67" in said and "K describes it" not in said
    assert (tmp_path / "page" / "sst-2-drift.png").read_bytes() == STAND_IN


def test_a_kernel_run_of_the_same_data_has_a_row_with_verdicts(tmp_path: Path) -> None:
    write(tmp_path / "tuned")
    write_kernel_run(tmp_path / "kernel", LABELS, wrong(2))
    write_kernel_run(tmp_path / "other", LABELS, wrong(2), kernel_formula="signgd")
    said = page(tmp_path, "tuned", "kernel", "other").partition(f"{TITLE} (tuned)")[2]
    assert "kernel 1 50.0 (–) 75.0 (–) 75.0 (–) 87.5 (–) 50.0 0.857 0.67" in said
    assert "relative distance (< 2)" in said and "kernel no yes yes no" in said
    assert "not compared" not in said
    assert (tmp_path / "page" / "sst-2-tuned-drift.png").is_file()


def test_a_kernel_run_of_other_data_is_named_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "tuned")
    write_kernel_run(tmp_path / "kernel", LABELS, wrong(2), few_shot_type="prompt-demo")
    said = page(tmp_path, "tuned", "kernel")
    assert "kernel is not compared" in said and "few_shot_type" in said and "K describes it" not in said


def test_a_run_without_snapshots_has_no_section_and_one_with_a_single_step_a_remark(tmp_path: Path) -> None:
    write_kernel_run(tmp_path / "kernel", LABELS, wrong(2))
    assert TITLE not in page(tmp_path, "kernel")
    write(tmp_path / "begun", steps=(0,))
    assert "does not hold snapshots of step 0 and of another step." in page(tmp_path, "begun")


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    write(tmp_path / "tuned")
    path = tmp_path / "tuned" / "step-000004_sst-2.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(FileError) as caught:
        write_report([tmp_path / "tuned"], tmp_path / "page")
    assert caught.value.data["path"] == path
