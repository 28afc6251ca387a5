"""The drift of a training: its numbers by hand, its means over seeds, its table, figure and refusals."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmntk.analysis.drift import Drift, drift_of_runs, mean_drift, training_drift
from lmntk.analysis.drift_tables import format_drift
from lmntk.analysis.kernel_distances import kernel_distances
from lmntk.analysis.saved_run import SavedRun
from lmntk.analysis.table_blocks import FORMS
from lmntk.commands import drift as command
from lmntk.errors import FileError, KernelMismatchError, UsageError
from lmntk.report import drift as pictures
from lmntk.report import plots
from lmntk.storage.paths import RunPaths
from training_folders import logits_for, split_of, write_training

ROUNDING = 1e-12  # of sums of a few float64 numbers
LABELS = np.arange(8) % 2
TRAIN = np.array([0, 1, 1, 0])


def wrong(count: int) -> np.ndarray:
    """Predictions of which the first few are wrong."""
    return np.where(np.arange(8) < count, 1 - LABELS, LABELS)


def kernel(step: int, seed: int = 0, samples: int = 1, logits: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(2, 4 * samples, logits, 30))
    moved = phi[0] + 0.02 * step * phi[1]
    return np.einsum("iaf,jbf->iajb", moved, moved)


def write(folder: Path, *, seed: int = 0, steps: tuple[int, ...] = (0, 1, 10), kernels: bool = True, **record: Any):
    """A training whose model has 4, 3, 1 and whose linearisation 4, 3, 2 of 8 test examples wrong."""
    counts = {0: (4, 4), 1: (3, 3), 5: (2, 2), 10: (1 + seed, 2 + seed)}
    train = split_of(TRAIN, np.zeros((4, 2)))
    snapshots = {}
    for step in steps:
        model, linear = (logits_for(wrong(count)) for count in counts[step])
        splits = {"train": train, "dev": split_of(LABELS[:4], model[:4]), "test": split_of(LABELS, 2 * model, linear)}
        snapshots[step] = (splits, kernel(step, seed) if kernels else None)
    facts = {step: {"train_loss": 1 / (1 + step), **({"sign_share": 0.75} if step else {})} for step in steps}
    return write_training(folder, snapshots, descriptions=facts, seed=seed, **record)


def test_each_step_has_the_numbers_computed_by_hand(tmp_path: Path) -> None:
    found = training_drift(write(tmp_path / "run"), "run")
    assert [step.step for step in found.steps] == [0, 1, 10] and not found.remarks
    first, _, last = found.steps
    assert (first.scores, last.scores) == ({"dev": 0.0, "test": 0.5}, {"dev": 0.75, "test": 7 / 8})
    assert (last.linearised_scores["test"], last.equal_predictions) == (6 / 8, 7 / 8)
    assert last.recovery == pytest.approx((6 / 8 - 4 / 8) / (7 / 8 - 4 / 8), rel=ROUNDING)
    assert np.isnan([first.recovery, first.logits_distance, first.sign_share]).all()
    # f is twice its class, the linearisation once: alike in 7 examples, apart in one. Against f0, twice its class too,
    # three examples have changed.
    assert last.logits_distance == pytest.approx(np.sqrt((7 * 1 + 5) / (3 * 8)), rel=ROUNDING)
    assert (last.sign_share, last.train_loss) == (0.75, 1 / 11)


def test_alignment_and_effective_rank_of_a_step_are_those_of_its_kernel(tmp_path: Path) -> None:
    last = training_drift(write(tmp_path / "run"), "run").steps[-1]
    values = kernel(10)
    assert last.distances == kernel_distances(values, kernel(0))
    half = np.array([[0.5, -0.5], [-0.5, 0.5]])
    centre = np.eye(4) - 1 / 4
    a = centre @ np.einsum("iajb,ab->ij", values, half) @ centre
    b = centre @ (TRAIN[:, None] == TRAIN).astype(float) @ centre
    assert last.alignment == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-10)
    shares = np.linalg.svd(values.reshape(8, 8), compute_uv=False)
    shares /= shares.sum()
    assert last.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)


def test_a_kernel_of_two_prompts_per_example_is_averaged_before_it_is_aligned(tmp_path: Path) -> None:
    splits = {"train": split_of(TRAIN, np.zeros((4, 2))), "test": split_of(LABELS, logits_for(LABELS))}
    twice = kernel(1, samples=2)
    once = twice.reshape(2, 4, 2, 2, 4, 2).mean(axis=(0, 3))
    found = [
        training_drift(write_training(tmp_path / name, {0: (splits, values), 1: (splits, values)}), name).steps[1]
        for name, values in (("twice", twice), ("once", once))
    ]
    assert found[0].alignment == pytest.approx(found[1].alignment, rel=1e-10)
    assert found[0].effective_rank > found[1].effective_rank


def test_seeds_are_averaged_and_the_recovery_is_that_of_the_means(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a"), write(tmp_path / "b", seed=1, data_dir="data/SST-2/16-13")]
    drifts = drift_of_runs(runs, ["a", "b"])
    mean = mean_drift(drifts)
    last = mean.steps[-1]
    assert (last.scores["test"], last.linearised_scores["test"]) == (13 / 16, 11 / 16)
    assert last.recovery == pytest.approx((11 - 8) / (13 - 8), rel=ROUNDING)
    lasts = [drift.steps[-1] for drift in drifts]
    assert last.logits_distance == pytest.approx(np.mean([step.logits_distance for step in lasts]), rel=ROUNDING)
    assert last.distances is not None and last.distances.entries == 128
    assert last.distances.cka == pytest.approx(
        np.mean([step.distances.cka for step in lasts if step.distances]), rel=ROUNDING
    )


def test_trainings_of_another_optimizer_are_not_averaged_and_other_rates_are_remarked(tmp_path: Path) -> None:
    first = write(tmp_path / "a", learning_rate=0.1)
    with pytest.raises(KernelMismatchError) as caught:
        drift_of_runs([first, write(tmp_path / "b", optimizer_variant="signgd")], ["a", "b"])
    assert "optimizer_variant" in str(caught.value)
    drifts = drift_of_runs([first, write(tmp_path / "c", learning_rate=0.2)], ["a", "c"])
    assert [remark for remark in mean_drift(drifts).remarks if "`learning_rate` (0.1, 0.2)" in remark]


def test_weights_at_the_start_may_differ_where_the_seed_draws_them_alone(tmp_path: Path) -> None:
    def pair(name: str, **record: Any) -> list[SavedRun]:
        hashes = ("a" * 64, "b" * 64)
        return [write(tmp_path / name / each[0], weights_sha256=each, **record) for each in hashes]

    with pytest.raises(KernelMismatchError, match="weights_sha256"):
        drift_of_runs(pair("all"), ["a", "b"])
    for name, record in (("lora", {"apply_lora": True}), ("head", {"few_shot_type": "finetune"})):
        assert len(drift_of_runs(pair(name, **record), ["a", "b"])) == 2


def test_a_variant_that_is_not_recorded_is_none(tmp_path: Path) -> None:
    runs = [write(tmp_path / "a"), write(tmp_path / "b", optimizer_variant="")]
    assert len(drift_of_runs(runs, ["a", "b"])) == 2


def test_only_the_steps_of_all_trainings_are_averaged_and_the_others_named(tmp_path: Path) -> None:
    drifts = [
        training_drift(write(tmp_path / name, steps=steps), name)
        for name, steps in (("a", (0, 1, 5, 10)), ("b", (0, 1, 10)))
    ]
    mean = mean_drift(drifts)
    assert [step.step for step in mean.steps] == [0, 1, 10]
    assert [remark for remark in mean.remarks if "steps 5" in remark]
    with pytest.raises(KernelMismatchError) as caught:
        mean_drift([training_drift(write(tmp_path / f"c{step}", steps=(0, step)), str(step)) for step in (1, 5)])
    assert caught.value.data["differences"] == ["kernel_steps"]


def test_snapshots_without_kernels_give_scores_and_a_remark(tmp_path: Path) -> None:
    found = training_drift(write(tmp_path / "run", kernels=False), "run")
    assert found.remarks == ["the snapshots of run hold no kernels"]
    text = format_drift([found], "text")
    assert "lin test" in text and "Frobenius  " not in text and "The snapshots of run hold no kernels." in text


@pytest.fixture(scope="module")
def drifts(tmp_path_factory: pytest.TempPathFactory) -> list[Drift]:
    folder = tmp_path_factory.mktemp("drifts")
    return drift_of_runs([write(folder / "a"), write(folder / "b", seed=1)], ["a", "b"])


@pytest.mark.parametrize("form", FORMS)
def test_the_table_has_a_row_for_each_step(drifts: list[Drift], form: str) -> None:
    table = format_drift(drifts, form)
    assert table.endswith("\n")
    if form == "json":
        content = json.loads(table)
        assert [step["step"] for step in content["mean"]] == [0, 1, 10]
        assert [training["name"] for training in content["trainings"]] == ["a", "b"]
        assert content["trainings"][1]["steps"][2]["distances"]["mean"] == drifts[1].steps[2].distances.mean
        assert content["mean"][0]["recovery"] is None
    elif form == "csv":
        lines = list(csv.DictReader(io.StringIO(table)))
        assert [(line["training"], line["step"]) for line in lines[:3]] == [("a", "0"), ("a", "1"), ("a", "10")]
        assert len(lines) == 9 and float(lines[2]["alignment"]) == drifts[0].steps[2].alignment
        assert lines[0]["recovery"] == ""
    else:
        assert max(map(len, table.splitlines())) <= 160 or form == "markdown"
        for step in ("0", "1", "10"):
            rows = [line for line in table.splitlines() if line.strip("| ").split(" ")[0] == step]
            assert len(rows) >= 2


def test_the_lines_of_the_figure_are_the_numbers_over_the_steps(drifts: list[Drift]) -> None:
    drawn: list[Any] = []
    figures = plots.Figure(layout="constrained"), mean_drift(drifts)
    for index, draw in enumerate((pictures._scores, pictures._linearisation, pictures._distances, pictures._kernel)):
        axes = figures[0].add_subplot(2, 2, index + 1)
        draw(figures[1])(axes)
        drawn.append({line.get_label(): line.get_xydata() for line in axes.lines})
        assert axes.get_xscale() == "symlog" and axes.get_xlim()[0] < 0
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "10"]
    steps = figures[1].steps
    assert drawn[0]["f, test"][:, 1] == pytest.approx([100 * step.scores["test"] for step in steps])
    assert drawn[0]["lin, dev"][:, 0].tolist() == [0, 1, 10]
    assert drawn[1]["equal predictions"][:, 1] == pytest.approx([step.equal_predictions for step in steps])
    assert drawn[2]["1 − CKA"][:, 1] == pytest.approx([1 - step.distances.cka for step in steps if step.distances])
    assert drawn[3]["alignment with labels"][:, 1] == pytest.approx([step.alignment for step in steps])


def test_without_kernels_the_figure_has_one_row_of_pictures(tmp_path: Path, drifts: list[Drift]) -> None:
    bare = training_drift(write(tmp_path / "run", kernels=False), "run")
    heights = [int.from_bytes(pictures.drift_figure(drift)[20:24]) for drift in (bare, drifts[0])]
    assert 1.8 * heights[0] < heights[1] < 2.2 * heights[0]


def test_the_command_prints_the_table_or_writes_it_with_a_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    runs = [str(tmp_path / name) for name in ("a", "b", "a")]
    assert command.main(runs) == 0
    printed = capsys.readouterr().out
    assert "mean of 2 trainings" in printed and printed.splitlines()[0].startswith("step")
    table, figure = tmp_path / "new" / "drift.json", tmp_path / "drift.png"
    words = ["--format", "json", "--output", str(table), "--figure", str(figure), "--split", "dev"]
    assert command.main([*runs, *words]) == 0
    said = capsys.readouterr()
    assert str(table) in said.out and str(figure) in said.out
    assert json.loads(table.read_text(encoding="utf-8"))["split"] == "dev"
    assert figure.read_bytes().startswith(b"\x89PNG")


def without_snapshots(run: SavedRun) -> None:
    for path in run.folder.glob("step-*"):
        path.unlink()


def of_the_start_alone(run: SavedRun) -> None:
    for step in (1, 10):
        run.paths.snapshot(step).unlink()


def cut(run: SavedRun) -> None:
    run.paths.snapshot(1).write_bytes(run.paths.snapshot(1).read_bytes()[:100])


def of_two_tasks(run: SavedRun) -> None:
    write(run.folder, task="mr")


@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (without_snapshots, "--kernel_steps 0,last"),
        (of_the_start_alone, "--kernel_steps 0,last"),
        (cut, "step-000001_sst-2.safetensors"),
        (of_two_tasks, "mr and sst-2"),
    ],
)
def test_damaged_and_missing_snapshots_are_reported_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[SavedRun], None], fact: str
) -> None:
    damage(write(tmp_path / "run"))
    assert command.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fact in error


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["run", "--figure", "a.pdf"], "--figure a.pdf"),
        (["run", "--split", "mist"], "take one of dev, test, train"),
        (["run", "other"], "task_name"),
        (["run", "signs"], "--kernel_formula"),
        (["run", "--output", "run/run_sst-2.json/x"], "--output run/run_sst-2.json"),
    ],
)
def test_mistakes_on_the_command_line_are_reported_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], fact: str
) -> None:
    write(tmp_path / "run")
    write(tmp_path / "other", task="mr")
    write(tmp_path / "signs", kernel_formula="signgd")
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and fact in error


def test_kernels_of_other_shapes_are_refused(tmp_path: Path) -> None:
    splits = {"train": split_of(TRAIN, np.zeros((4, 2))), "test": split_of(LABELS, logits_for(LABELS))}
    run = write_training(tmp_path / "run", {0: (splits, kernel(0)), 1: (splits, kernel(1, samples=2))})
    with pytest.raises(FileError) as caught:
        training_drift(run, "run")
    assert caught.value.data["path"] == RunPaths(run.folder, "sst-2").snapshot(1)


@pytest.mark.parametrize("name", ["kernel_formula", "kernel_dtype", "parameters", "grad_dim"])
def test_kernels_of_another_kind_in_one_training_are_refused(tmp_path: Path, name: str) -> None:
    """A training of earlier versions could go on with another formula."""
    splits = {"train": split_of(TRAIN, np.zeros((4, 2))), "test": split_of(LABELS, logits_for(LABELS))}
    descriptions = {0: {name: "one"}, 1: {name: "other"}}
    snapshots = {0: (splits, kernel(0)), 1: (splits, kernel(1))}
    run = write_training(tmp_path / "run", snapshots, descriptions=descriptions)
    with pytest.raises(FileError, match=f"hold kernels that differ in `{name}` .other and one."):
        training_drift(run, "run")


def test_a_split_with_other_examples_than_at_the_start_is_refused(tmp_path: Path) -> None:
    splits = [{"test": split_of(labels, logits_for(labels))} for labels in (LABELS, LABELS[::-1])]
    run = write_training(tmp_path / "run", {0: (splits[0], None), 1: (splits[1], None)})
    with pytest.raises(UsageError, match="different examples of test"):
        training_drift(run, "run")
