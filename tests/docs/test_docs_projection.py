"""The page on projected kernels: its commands run, on a tiny model, and what its measurements are computed by."""

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import agreement, projected_predictions
from benchmarks.agreement import Predictions, Split
from benchmarks.inputs import true_kernel
from command_line import ROOT, sst2_rows, write_rows
from doc_commands import commands, page_text
from lmntk.commands import splits
from lmntk.kernels.projection import Projection
from tiny_models import save_tiny_checkpoint

PAGE = page_text("projection")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("projection")
    save_tiny_checkpoint("bert", folder / ".cache" / "demo" / "bert-tiny")
    for split, number in (("train", 16), ("test", 10)):
        rows = [(label, text) for text, label in sst2_rows(number, split)]
        write_rows(folder / "data" / "demo" / "tweets" / "original" / "mr" / f"{split}.csv", rows)
    return folder


def test_the_commands_compare_predictions_and_a_width_beyond_the_sides_is_exact(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, draw, *draw_flags), (_, tool, *flags) = commands(PAGE)
    assert draw == "tools/generate_k_shot_data.py"
    assert (ROOT / tool).samefile(projected_predictions.__file__)
    few = ["--projection_width", "4", "32", "--projection_seeds", "1", "--threads", "1", "--json", "kept.json"]
    threads = torch.get_num_threads()
    try:
        with contextlib.chdir(folder):
            assert splits.main([*draw_flags, "--k", "4"]) == 0
            assert projected_predictions.main([*(word.replace("/64-", "/4-") for word in flags), *few]) == 0
            kept = json.loads(Path("kept.json").read_text(encoding="utf-8"))
    finally:
        torch.set_num_threads(threads)
    table = [re.split(r"\s*\|\s*", line[1:-1].strip()) for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    assert [(row["λ"], row["width"]) for row in rows] == [(x, y) for x in ("0.001", "loo") for y in ("4", "32")]
    assert {(row["N"], row["X"], row["splits × seeds"], row["majority %"]) for row in rows} == {
        ("8", "10", "3 × 1", "50.0")
    }
    for small, large in (rows[:2], rows[2:]):
        assert float(small["entries %"]) > 1 > float(small["logits %"]) / 1000
        assert large["equal classes %"] == "100.0 (100.0 to 100.0)"
        assert large["projected less exact, points"] == "+0.00 (+0.00 to +0.00)"
    exact = [one for split in kept for one in split["projected"] if one["projection"]["width"] == 32]
    assert len(exact) == 3
    assert max(one["entries"] for one in exact) < 1e-6, "no side of a weight is longer than 24"
    assert max(one["logits"]["0.001"] for one in exact) < 1e-4, "entries' rounding, over an eigenvalue of 0.001"


def test_predictions_are_those_of_the_kernel_of_autograd(folder: Path) -> None:
    (_, _, *draw_flags), (_, _, *flags) = commands(PAGE)
    with contextlib.chdir(folder):
        assert splits.main([*draw_flags, "--k", "4"]) == 0
        given = projected_predictions.make_parser().parse_args(
            [*(word.replace("/64-", "/4-") for word in flags), "--projection_width", "32", "--projection_seeds", "0"]
        )
        job = projected_predictions._job(given, given.data_dir[0])
        found = projected_predictions.measure_split(job, [Projection(32)], ["0.1"], lambda: None)
        inputs = projected_predictions.load_inputs(job)
        k_x = true_kernel(job, inputs)[0].flatten(0, 1).flatten(1).numpy()
        k = true_kernel(job, projected_predictions.replace(inputs, x=inputs.train))[0].flatten(0, 1).flatten(1).numpy()
    labels = [feature.label for feature in inputs.train.features]
    targets = np.eye(2)[labels].reshape(-1)
    logits = k_x.T @ np.linalg.solve(k + 0.1 * np.linalg.norm(k, 2) * np.eye(len(k)), targets)
    wanted = logits.reshape(-1, 2).argmax(axis=1).tolist()
    assert found.exact.classes["0.1"] == found.projected[0].classes["0.1"] == wanted
    assert found.labels == [feature.label for feature in inputs.x.features]


def test_a_row_of_the_table_is_a_mean_over_splits_and_seeds() -> None:
    def predictions(width: int | None, classes: list[int], seconds: float) -> Predictions:
        projection = None if width is None else Projection(width)
        return Predictions(projection, seconds, 0.02 * (width is not None), {"0.1": 0.04}, {"0.1": classes})

    labels = [0, 0, 0, 1]
    one = predictions(None, [0, 0, 1, 1], 8.0)  # three of four are right
    same, right, wrong = (predictions(8, classes, 2.0) for classes in ([0, 0, 1, 1], [0, 0, 0, 1], [1, 0, 1, 1]))
    found = [
        Split("a", 4, None, labels, one, [same, right, predictions(9, [1, 1, 1, 0], 1.0)]),
        Split("b", 4, None, labels, one, [same, wrong, predictions(9, [1, 1, 1, 0], 1.0)]),
    ]
    row = agreement.summarise(found, 8, "0.1")
    # Of 16 predictions one became right, one wrong, and so 14 stayed.
    assert row["projected less exact, points"].startswith("+0.00 (")
    assert row["equal classes %"].startswith("87.5 (")
    assert row["of single seeds %"] == "75.0 to 100.0"
    assert (row["majority %"], row["exact %"], row["entries %"], row["logits %"]) == ("75.0", "75.0", "2", "4")
    assert (row["exact s"], row["projected s"], row["splits × seeds"]) == ("8.0", "2.0", "2 × 2")


def test_intervals_are_those_of_a_mean_over_seeds_and_examples() -> None:
    constant = np.full((3, 5, 40), 0.25)
    assert agreement.interval(constant) == pytest.approx((0.25, 0.25), abs=1e-12)
    # Of X independent examples, the mean's standard error is s / √X; equal seeds and splits add nothing.
    examples = np.tile(np.arange(400) % 2, (2, 5, 1)).astype(float)
    low, high = agreement.interval(examples)
    assert (high - low) / (2 * 1.96) == pytest.approx(0.5 / 20, rel=0.05)
    # Of P seeds without differences between examples, the resampled means have the spread s / √P.
    seeds = np.tile((np.arange(50) % 2)[:, None], (1, 1, 400)).reshape(1, 50, 400).astype(float)
    low, high = agreement.interval(seeds)
    assert (high - low) / (2 * 1.96) == pytest.approx(0.5 / 50**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kernel_regularization", "small"], "a number of 0 or more, or loo"),
        (["--kernel_regularization", "-1"], "from 0"),
        (["--projection_width", "0"], "1 or more"),
        (["--model", "no/such/folder"], "there is no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, (_, _, *usual) = commands(PAGE)
    with contextlib.chdir(folder):
        assert projected_predictions.main([*usual, *flags]) == 2
    assert said in capsys.readouterr().err
