"""The bars of the scores: their heights, deviations and names."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lmntk.analysis.behaviour import BehaviourRow, SeedBehaviour, Thresholds, behaviour_row
from lmntk.report import behaviour_figure, plots
from lmntk.report.behaviour import CONSTANT, behaviour_plot


def row(name: str, *pretrained: float) -> BehaviourRow:
    seeds = [
        SeedBehaviour(
            task="sst-2", metric="acc", split="test", examples=100, seed=seed, formula="sgd", optimizer="sgd",
            last_step=9, pretrained=score, kernel=0.7, kernel_with_f0=None, linearised=0.75, finetuned=0.8,
            constant=0.55, errors={"kernel": 0.01, "finetuned": 0.01, "gain": 0.01}, logits_distance=0.2,
            equal_predictions=0.9, agreement=0.9, chi=0.5, distances=None,
        )
        for seed, score in enumerate(pretrained)
    ]  # fmt: skip
    return behaviour_row(name, seeds, Thresholds())


def test_a_task_has_four_bars_with_the_deviations_of_its_seeds_and_a_line_for_the_constant() -> None:
    rows = [row("tweets", 0.5, 0.6), row("film $reviews$", 0.4)]
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    behaviour_plot(rows)(axes)
    figure.draw_without_rendering()
    heights = [bar.get_height() for bar in axes.patches]
    assert heights == pytest.approx([55.0, 40.0, 70.0, 70.0, 75.0, 75.0, 80.0, 80.0])
    lines = [segment for found in axes.collections for segment in found.get_segments() if np.shape(segment) == (2, 2)]
    upright = [line[:, 1].tolist() for line in lines if line[0, 0] == line[1, 0] and np.isfinite(line).all()]
    level = [line[:, 1].tolist() for line in lines if line[0, 1] == line[1, 1]]
    assert upright == [pytest.approx([50.0, 60.0])]
    assert level == [pytest.approx([55.0, 55.0])] * 2
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tweets", r"film \$reviews\$"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == CONSTANT
    assert axes.get_ylabel() == "accuracy on test, percent"


@pytest.mark.parametrize("count", [1, 9])
def test_the_figure_is_a_png_as_wide_as_its_tasks_need(count: int) -> None:
    png = behaviour_figure([row(f"task {index}", 0.5, 0.6) for index in range(count)])
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20]) > plots.DPI * (4 if count == 1 else 10)
